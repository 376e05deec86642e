package policy

import (
	"bytes"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode"

	"cel.dev/cel-go/cel"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/glob"
	"github.com/countersign/countersign/internal/hclread"
)

// Defaults and bounds of times.
const (
	DefaultReprove = 15 * time.Minute
	DefaultGrace   = time.Hour

	minReprove = 5 * time.Second
	minGrace   = time.Second
	maxGrace   = 30 * 24 * time.Hour
	minTTL     = time.Minute
	maxTTL     = 366 * 24 * time.Hour
)

var (
	scopeName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`) // part of URIs and of Vault's names
	labelKey  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}$`)
	unitName  = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,255}\.(service|scope)$`)
)

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

func (r *reader) scope(hb *hclsyntax.Block) *Scope {
	if len(hb.Labels) != 1 {
		r.Problem(hb.TypeRange, `a scope has one name: scope "name" { … }`, "")
		return nil
	}
	s := &Scope{Name: hb.Labels[0]}
	at := hb.LabelRanges[0]
	if !scopeName.MatchString(s.Name) || len(s.Name) > maxName {
		r.Problem(at, fmt.Sprintf("scope name %.80q: 1 to %d lowercase letters, digits, - and _, the first no sign", s.Name, maxName), "")
	}
	if first, taken := r.first[s.Name]; taken {
		r.Problem(at, fmt.Sprintf("scope %q is already at %s:%d", s.Name, first.Filename, first.Start.Line), "")
	} else {
		r.first[s.Name] = at
	}
	b := r.Block(hb.Body, "a scope",
		[]string{"description", "owner", "mode", "audience", "reprove", "grace", "when"},
		append([]string{"host", "process"}, r.options.kinds()...))
	b.At = at
	s.Description, s.Owner = b.Text("description", hclread.Anything), b.Text("owner", hclread.Anything)
	s.Audience = b.Texts("audience", place)
	s.Observe = b.Text("mode", hclread.OneOf("enforce", "observe")) == "observe"
	if hb := b.One("host"); hb != nil {
		s.Host = r.host(hb)
	}
	if hb := b.One("process"); hb != nil {
		s.Process, s.compiled.mappings = r.process(hb)
	} else {
		r.Problem(at, "a scope wants a process block: whose credential is it?", "")
	}
	s.When, s.compiled.when = condition(b)
	r.credential(s, b)
	return s
}

// credential reads where the credential comes from, and the times that hang
// on it.
func (r *reader) credential(s *Scope, b hclread.Block) {
	var found []Kind
	for _, k := range r.options.Kinds {
		if len(b.Blocks(k.Name)) > 0 {
			found = append(found, k)
		}
	}
	choice := "a " + strings.Join(r.options.kinds(), " or a ") + " block"
	switch {
	case len(found) == 0:
		r.Problem(b.At, "a scope wants "+choice+": what is the credential?", "")
	case len(found) > 1:
		r.Problem(b.Blocks(found[1].Name)[0].TypeRange, "a scope has "+choice+", not both", "")
	}
	for _, k := range found {
		block := r.Block(b.One(k.Name).Body, "a "+k.Name+" block", append([]string{"ttl", "overlap"}, k.Arguments...), nil)
		s.Kind, s.Source = k.Name, k.Decode(block, r.options)
		s.TTL, s.Overlap = life(block)
	}

	most, otherwise := maxTTL, DefaultReprove
	if s.TTL > 0 {
		most, otherwise = s.TTL, min(DefaultReprove, s.TTL/2)
	}
	s.Reprove = b.Duration("reprove", minReprove, most, otherwise)
	s.Grace = b.Duration("grace", minGrace, maxGrace, DefaultGrace)
}

// place checks an entry of an audience.
func place(a string) (why, meant string) {
	u, err := url.Parse(a)
	switch {
	case err != nil || u.Scheme == "" || u.Host == "":
		why = "is no URL with a scheme and a host, as postgres://db.example.com:5432/billing"
	case u.User != nil:
		why = "names a user; an audience is a place, and no secret stands in a scope"
	}
	return why, ""
}

// condition compiles `when`; its mistakes are told by the file's lines.
func condition(b hclread.Block) (string, cel.Program) {
	text := b.Text("when", hclread.Anything)
	if text == "" {
		return "", nil
	}
	program, mistakes := compile(text)
	at, written := b.Range("when")
	first := at.Start.Line
	if bytes.HasPrefix(written, []byte("<<")) {
		first++ // the text of a heredoc starts below
	}
	for _, m := range mistakes {
		at.Start.Line = first + m.line - 1
		b.Problem(at, "when: "+m.message, m.suggestion)
	}
	return text, program
}

func (r *reader) host(hb *hclsyntax.Block) HostSelector {
	b := r.Block(hb.Body, "a host block", []string{"labels", "tier", "secure_boot", "reference", "ima", "boot_images", "kernel_command_line"}, nil)
	return HostSelector{
		Labels:     b.Pairs("labels", label, hclread.Printable),
		Tier:       b.Texts("tier", hclread.OneOf(appraise.TierCertified, appraise.TierKnown)),
		SecureBoot: b.Flag("secure_boot"),
		Reference:  b.Text("reference", hclread.Printable),
		IMA:        b.Text("ima", hclread.OneOf("required")),

		BootImages:         b.Texts("boot_images", digest),
		KernelCommandLines: b.Texts("kernel_command_line", commandLine),
	}
}

func commandLine(s string) (why, meant string) {
	if s == "" || len(s) > 4096 || strings.ContainsFunc(s, unprintable) {
		why = "is not 1 to 4096 printable characters"
	}
	return why, ""
}

func label(key string) (why, meant string) {
	if !labelKey.MatchString(key) {
		why = "is no label: letters, digits and _ . / -, at most 63"
	}
	return why, ""
}

func (r *reader) process(hb *hclsyntax.Block) (ProcessSelector, []glob.Pattern) {
	b := r.Block(hb.Body, "a process block", []string{"user", "unit", "exe", "sha256", "release", "before_start", "mappings"}, nil)
	if !b.Has("user") && !b.Has("unit") && !b.Has("exe") && !b.Has("sha256") && !b.Has("release") {
		r.Problem(hb.TypeRange, "a process block wants at least one of user, unit, exe, sha256 and release", "")
	}
	p := ProcessSelector{
		User:     b.Text("user", user),
		Unit:     b.Text("unit", unit),
		Exe:      b.Text("exe", absolute),
		SHA256:   b.Texts("sha256", digest),
		Release:  b.Text("release", hclread.Printable),
		Mappings: b.Texts("mappings", pathGlob),
	}
	if flag := b.Flag("before_start"); flag != nil {
		p.BeforeStart = *flag
	}
	if p.BeforeStart && !b.Has("unit") {
		b.Bad("before_start", "wants a unit: nothing else has a start to wait for")
	}
	var globs []glob.Pattern
	for _, m := range p.Mappings {
		if g, err := glob.Compile(m); err == nil {
			globs = append(globs, g)
		}
	}
	return p, globs
}

func user(name string) (why, meant string) {
	if len(name) > 256 || strings.ContainsAny(name, ":/ ") || strings.ContainsFunc(name, unprintable) {
		why = "is no user's name"
	}
	return why, ""
}

func unit(unit string) (why, meant string) {
	name, _, _ := strings.Cut(unit, ".")
	switch {
	case !unitName.MatchString(unit) && unitName.MatchString(unit+".service"):
		return "is no service or scope unit", unit + ".service"
	case !unitName.MatchString(unit):
		why = "is no service or scope unit, as billing.service"
	case strings.HasSuffix(name, "@"):
		why = "is a template; name its instance"
	case strings.HasPrefix(unit, "user@") || strings.HasPrefix(unit, "session-") && strings.HasSuffix(unit, ".scope"):
		why = "holds whatever a user starts; name a unit of the system manager"
	}
	return why, ""
}

func absolute(p string) (why, meant string) {
	if !path.IsAbs(p) || p == "/" || strings.ContainsFunc(p, unprintable) {
		return "is not an absolute path of a file", ""
	}
	if clean := path.Clean(p); clean != p {
		return "is not the path's plain form", clean
	}
	return "", ""
}

func digest(s string) (why, meant string) {
	if _, err := evidence.ParseDigest(s); err != nil {
		return "is wrong: " + err.Error(), ""
	}
	return "", ""
}

// pathGlob checks a glob of files.
func pathGlob(pattern string) (why, meant string) {
	if _, err := glob.Compile(pattern); err != nil {
		return "is not a valid pattern", ""
	}
	return absolute(pattern)
}

// life reads ttl and overlap.
func life(b hclread.Block) (ttl, overlap time.Duration) {
	if !b.Has("ttl") {
		b.Bad("ttl", "is missing")
	}
	ttl = b.Duration("ttl", minTTL, maxTTL, 0)
	overlap = b.Duration("overlap", 0, maxTTL, 0)
	if ttl > 0 && overlap >= ttl {
		b.Bad("overlap", "%s is not shorter than the ttl, %s", overlap, ttl)
	}
	return ttl, overlap
}
