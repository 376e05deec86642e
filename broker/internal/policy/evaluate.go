package policy

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/glob"
	"github.com/countersign/countersign/internal/hclread"
)

// Results of one selector.
const (
	pass   = "pass"
	fail   = "fail"
	absent = "absent" // could not be evaluated
)

// compiled is what Parse made ready of a scope.
type compiled struct {
	when     cel.Program // nil: no condition
	mappings []glob.Pattern
}

// Evaluate says what a scope makes of facts. It is pure: nothing but its
// arguments and the set decides. Its Reason names selectors and no values, as
// hosts may read it; the selectors hold the rest, for operators.
func (s *Set) Evaluate(scope string, f appraise.Facts, now time.Time) Result {
	r := Result{Scope: bounded.Text(scope, maxName), Outcome: Fault, Policy: s.Version}
	sc := s.Scope(scope)
	if sc == nil {
		r.Reason = fmt.Sprintf("no scope %q is in force", r.Scope)
		saw := r.Scope
		if near := hclread.Nearest(scope, slices.Collect(maps.Keys(s.scopes))); near != "" {
			saw = fmt.Sprintf("%s; did you mean %q?", saw, near)
		}
		r.Selectors = []Selector{{Name: "scope", Wanted: "a scope of the set in force", Saw: saw, Result: absent}}
		return r
	}
	var e evaluation
	e.host(sc.Host, f.Host)
	e.process(sc, f)
	e.when(sc, f, now)
	r.Selectors = e.selectors
	if unknown := e.with(absent); unknown != "" {
		r.Reason = "could not be evaluated: " + unknown
		return r
	}
	if failed := e.with(fail); failed != "" {
		r.Outcome, r.Reason = Refused, "not as the scope wants: "+failed
		return r
	}
	r.Outcome = Allowed
	return r
}

type evaluation struct{ selectors []Selector }

// with lists the selectors that came out so.
func (e *evaluation) with(result string) string {
	var out []string
	for _, s := range e.selectors {
		if s.Result == result {
			out = append(out, s.Name)
		}
	}
	return strings.Join(out, ", ")
}

func (e *evaluation) add(name, wanted, saw, result string) {
	e.selectors = append(e.selectors, Selector{Name: name, Wanted: wanted, Saw: saw, Result: result})
}

func (e *evaluation) is(name, wanted, saw string, ok bool) {
	result := fail
	if ok {
		result = pass
	}
	if saw == "" {
		saw = "(none)"
	}
	e.add(name, wanted, saw, result)
}

func (e *evaluation) host(want HostSelector, h appraise.Host) {
	for _, k := range slices.Sorted(maps.Keys(want.Labels)) {
		e.is("host.labels."+k, want.Labels[k], h.Labels[k], h.Labels[k] == want.Labels[k])
	}
	if len(want.Tier) > 0 {
		e.is("host.tier", strings.Join(want.Tier, " or "), h.Tier, slices.Contains(want.Tier, h.Tier))
	}
	if want.SecureBoot != nil {
		const name = "host.secure_boot"
		if wanted := fmt.Sprint(*want.SecureBoot); h.SecureBoot == nil {
			e.add(name, wanted, noEventLog(h), absent)
		} else {
			e.is(name, wanted, fmt.Sprint(*h.SecureBoot), *h.SecureBoot == *want.SecureBoot)
		}
	}
	if want.Reference != "" {
		e.is("host.reference", want.Reference, h.Reference, h.Reference == want.Reference)
	}
	if want.IMA != "" {
		if h.IMA == nil {
			e.add("host.ima", want.IMA, "no IMA list was appraised", absent)
		} else {
			e.is("host.ima", want.IMA, *h.IMA, *h.IMA == appraise.IMAVerified)
		}
	}
	e.boot(want, h)
}

// boot holds what was measured against what may be.
func (e *evaluation) boot(want HostSelector, h appraise.Host) {
	log := h.EventLog
	for _, part := range []struct {
		name     string
		pcr      int // that has to be explained; 0: the command lines'
		want     []string
		measured func() []string
		same     func(want, measured string) bool
	}{
		{"host.boot_images", 4, want.BootImages, func() []string { return log.Images }, func(a, b string) bool { return a == b }},
		{"host.kernel_command_line", 0, want.KernelCommandLines, func() []string { return log.CommandLines() }, reference.CommandLineMatches},
	} {
		if len(part.want) == 0 {
			continue
		}
		wanted := strings.Join(part.want, " or ")
		if log == nil {
			e.add(part.name, wanted, noEventLog(h), absent)
			continue
		}
		measured := part.measured()
		var odd []string
		for _, m := range measured {
			if !slices.ContainsFunc(part.want, func(w string) bool { return part.same(w, m) }) {
				odd = append(odd, m)
			}
		}
		if part.pcr == 0 && !log.LinesComplete {
			e.is(part.name, wanted, "PCR 8 and 12 hold what may be another", false)
		} else if part.pcr != 0 && slices.Contains(log.Incomplete, part.pcr) {
			what := fmt.Sprintf("PCR %d is not explained by the event log", part.pcr)
			if limit := log.Limit(part.pcr); limit != "" {
				what += ": " + limit
			}
			e.is(part.name, wanted, what, false)
		} else if len(odd) > 0 {
			e.is(part.name, wanted, strings.Join(odd[:min(len(odd), 5)], ", "), false)
		} else {
			e.is(part.name, wanted, strings.Join(measured, ", "), len(measured) > 0)
		}
	}
}

func noEventLog(h appraise.Host) string {
	if h.EventLogProblem != "" {
		return "no facts: " + h.EventLogProblem
	}
	return "no event log was appraised"
}

func (e *evaluation) process(sc *Scope, f appraise.Facts) {
	want, p := sc.Process, f.Program
	if p == nil {
		e.add("process", "a program", "only the host was proven", absent)
		return
	}
	if want.User != "" {
		e.is("process.user", want.User, p.User, p.User == want.User)
	}
	if want.Unit != "" {
		e.is("process.unit", want.Unit, p.Unit(), p.Unit() == want.Unit)
	}
	if want.Exe != "" {
		e.is("process.exe", want.Exe, p.Main().Path, p.Main().Path == want.Exe)
	}
	if len(want.SHA256) > 0 {
		saw := p.Main().SHA256.String()
		e.is("process.sha256", strings.Join(want.SHA256, " or "), saw, slices.Contains(want.SHA256, saw))
	}
	wanted, saw := "running", "running"
	if want.BeforeStart {
		wanted = "running or starting"
	}
	if p.Starting {
		saw = "starting"
	}
	e.is("process.before_start", wanted, saw, !p.Starting || want.BeforeStart)
	if want.Release != "" {
		e.is("process.release", want.Release, strings.Join(f.Releases, ", "), slices.Contains(f.Releases, want.Release))
	}
	e.mappings(sc, p)
	if m := f.Measured; m != nil && len(m.Unlisted) > 0 {
		e.is("process.files", "allowed by the host's reference set", strings.Join(m.Unlisted, ", "), false)
	}
	if sc.Host.IMA != "" {
		e.measured(p, f.Measured)
	}
}

// measured wants the kernel's word, under the TPM's signature, for what the
// agent says of the program. One that is about to start has not been run, and
// is held against the list at its next proof.
func (e *evaluation) measured(p *process.Program, m *appraise.Measured) {
	const exe, mappings = "process.measured", "process.measured_mappings"
	switch {
	case m == nil:
		e.add(exe, "in the IMA list", "no IMA list was appraised", absent)
		return
	case p.Starting:
		e.is(exe, "in the IMA list", "not started yet", true)
		return
	}
	saw := "in the IMA list"
	if !m.Exe {
		saw = "not in the IMA list"
	}
	e.is(exe, "in the IMA list", saw, m.Exe)
	saw = "all in the IMA list"
	if len(m.Unmeasured) > 0 {
		saw = "not in the IMA list: " + strings.Join(m.Unmeasured, ", ")
	}
	e.is(mappings, "all in the IMA list", saw, len(m.Unmeasured) == 0)
}

// mappings looks for code in the program that its exe doesn't account for, as
// LD_PRELOAD puts there.
func (e *evaluation) mappings(sc *Scope, p *process.Program) {
	allowed, wanted := func(m process.Mapping) bool { return ordinary(m, p.Main().Path) }, "the system's libraries and the program's own"
	if globs := sc.compiled.mappings; len(globs) > 0 {
		wanted = strings.Join(sc.Process.Mappings, " or ")
		allowed = func(m process.Mapping) bool {
			return m.Path != process.Anonymous && !m.Deleted &&
				slices.ContainsFunc(globs, func(g glob.Pattern) bool { return g.Match(m.Path) })
		}
	}
	const shown = 5
	var odd []string
	count := 0
	for _, m := range p.Mappings {
		if allowed(m) {
			continue
		}
		if count++; count > shown {
			continue
		}
		if m.Deleted {
			odd = append(odd, m.Path+" (deleted)")
		} else {
			odd = append(odd, m.Path)
		}
	}
	if count > shown {
		odd = append(odd, fmt.Sprintf("and %d more", count-shown))
	}
	saw := fmt.Sprintf("%d executable mappings, all allowed", len(p.Mappings))
	if count > 0 {
		saw = strings.Join(odd, ", ")
	}
	e.is("process.mappings", wanted, saw, count == 0)
}

var (
	// Only root writes here.
	libraries = []string{"/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/local/lib"}
	// Others write here, whatever program lives below.
	writable = []string{"/tmp", "/var/tmp", "/dev/shm", "/run/user", "/home"}
)

// ordinary says whether a mapping is what programs have that nobody tampered
// with. A library that an upgrade replaced is deleted and still ordinary, or
// every upgrade of libc would cost running programs their credentials; memory
// without a file is what JITs make.
func ordinary(m process.Mapping, exe string) bool {
	if m.Path == process.Anonymous {
		return true
	}
	in := func(folder string) bool { return strings.HasPrefix(m.Path, folder+"/") }
	if slices.ContainsFunc(libraries, in) {
		return true
	}
	if m.Deleted || slices.ContainsFunc(writable, in) {
		return false
	}
	own := path.Dir(exe)
	if own == "/" {
		return false
	}
	if in(own) {
		return true
	}
	prefix := path.Dir(own) // of /opt/app/bin/app it is /opt/app
	return path.Base(own) == "bin" && prefix != "/" && (in(prefix+"/lib") || in(prefix+"/lib64"))
}

func (e *evaluation) when(sc *Scope, f appraise.Facts, now time.Time) {
	if sc.compiled.when == nil {
		return
	}
	const name = "when"
	out, _, err := sc.compiled.when.Eval(activation(f, now))
	if err != nil {
		e.add(name, sc.When, err.Error(), absent)
		return
	}
	ok, isBool := out.Value().(bool)
	if !isBool {
		e.add(name, sc.When, fmt.Sprintf("a %s", out.Type().TypeName()), absent)
		return
	}
	saw := fmt.Sprint(ok)
	if risk := f.Subject.Risk; risk != nil && strings.Contains(sc.When, "risk") {
		saw += fmt.Sprintf(", with a subject.risk of %d", *risk)
	}
	e.is(name, sc.When, saw, ok)
}
