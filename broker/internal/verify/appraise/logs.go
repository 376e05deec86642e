package appraise

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/internal/verify/reference"
)

// Logs are what a host shows beside its quote to explain the quoted values.
type Logs struct {
	Event, Userspace []byte // empty: the host has none, or EventKnown
	EventKnown       bool   // they are those of the Known that the challenge named
	IMA              []byte // from IMAOffset on
	IMAOffset        int
	IMAPresent       bool
}

// ErrResync says that what was sent doesn't continue what is known: the host
// has to send its logs whole. It is no finding; a host that can't is silent.
var ErrResync = errors.New("the logs don't continue those that are known; send them whole")

// Known is what was proven of one host's logs in one boot, so that only news
// have to be sent. The zero value knows nothing; nobody but Appraise makes
// another. It is not changed once it is made.
type Known struct {
	boot       string          // agent's word, by which it knows what it needn't send
	reset      uint32          // of the TPM, which is what tells boots apart
	problem    string          // why there are no facts of an event log that was shown
	logs       evidence.Digest // of event and userspace log
	facts      *boot.Facts
	pcrs       map[int]evidence.Digest // the values that facts were proven against
	shownBytes int                     // of the logs that facts were made of
	ima        *imaappraise.State      // nil: no list was shown
	files      *files
	fresh      []file   // those of this request
	violations []string // where; bounded
	told       int      // of them, how many were judged
	rules      string   // by which all but the fresh files were judged
	unexpected []string // what those rules didn't allow, and were told to let be; bounded
	count      int      // of all such
	others     []string // what those rules didn't allow, and don't hold; bounded
	othersSeen int      // of all such
}

// Resume is what a host needs to know in order to send only news.
func (k *Known) Resume() (bootID string, logs evidence.Digest, imaOffset int) {
	if k == nil {
		return "", evidence.Digest{}, 0
	}
	if k.ima != nil {
		imaOffset = k.ima.Offset
	}
	return k.boot, k.logs, imaOffset
}

// Size is about how much memory k takes, in bytes: facts may take a few times as
// much as the logs that they were made of.
func (k *Known) Size() int { return k.files.size() + 4*k.shownBytes + 64<<10 }

// Violations is how many files could not be measured.
func (k *Known) Violations() int {
	if k.ima == nil {
		return 0
	}
	return k.ima.Violations
}

// BootFacts are those of the event log; nil where none was appraised.
func (k *Known) BootFacts() *boot.Facts { return k.facts }

// Measured lists the proven files, each name and digest once; nil where no list
// was shown.
func (k *Known) Measured() []imaappraise.Measurement {
	if k.ima == nil {
		return nil
	}
	return sorted(k.files.all())
}

// appraiseLogs holds logs against the quoted values, going on from prior.
func appraiseLogs(l Logs, bootID string, reset uint32, pcrs map[int]evidence.Digest, prior *Known) (*Known, error) {
	k := &Known{boot: bootID, reset: reset}
	if prior == nil || prior.reset != reset {
		prior = &Known{}
	}
	// The list first: the event log isn't held to what the list explains.
	list := k.list(l, pcrs, prior)
	if errors.Is(list, ErrResync) {
		return nil, list
	}
	if err := k.event(l, k.withoutIMA(pcrs), prior); err != nil {
		return nil, err
	}
	return k, list
}

func (k *Known) event(l Logs, pcrs map[int]evidence.Digest, prior *Known) error {
	none := !l.EventKnown && len(l.Event) == 0
	digest := evidence.LogsDigest(l.Event, l.Userspace)
	same := prior.facts != nil && (none || l.EventKnown || digest == prior.logs)
	if same {
		for pcr, value := range prior.pcrs {
			same = same && pcrs[pcr] == value
		}
	}
	switch {
	case same: // what was proven of these values still is
		k.logs, k.facts, k.pcrs, k.shownBytes = prior.logs, prior.facts, prior.pcrs, prior.shownBytes
		return nil
	case l.EventKnown:
		return ErrResync
	case none && prior.facts != nil:
		return &evidence.Rejected{Check: boot.CheckReplay, Detail: "the host showed an event log before in this boot, and now, with other PCR values, shows none"}
	case none:
		return nil
	}
	facts, err := boot.Appraise(l.Event, l.Userspace, pcrs)
	if evidence.CheckOf(err) == boot.CheckStructure && prior.facts == nil {
		// Firmware writes odd logs. One that isn't understood gives no facts, and
		// fails whoever asks for some.
		k.problem = err.Error()[:min(len(err.Error()), maxProblem)]
		return nil
	}
	if err != nil {
		return err
	}
	k.logs, k.facts, k.pcrs, k.shownBytes = digest, &facts, maps.Clone(pcrs), len(l.Event)+len(l.Userspace)
	delete(k.pcrs, ima.DefaultPCR) // grows while the host runs, and nothing of the facts rests on it
	return nil
}

// withoutIMA is what PCRs would hold that a proven list extends beside IMA's own, if it didn't: nothing,
// since it explains them whole. An event log that has events of one doesn't lead there.
func (k *Known) withoutIMA(quoted map[int]evidence.Digest) map[int]evidence.Digest {
	pcrs := maps.Clone(quoted)
	if k.ima != nil {
		for _, pcr := range k.ima.PCRs() {
			if pcr > ima.DefaultPCR {
				pcrs[pcr] = evidence.Digest{}
			}
		}
	}
	return pcrs
}

func (k *Known) list(l Logs, pcrs map[int]evidence.Digest, prior *Known) error {
	if !l.IMAPresent {
		if prior.ima != nil {
			return &evidence.Rejected{Check: imaappraise.CheckReplay, Detail: "the host showed an IMA list before in this boot, and now shows none"}
		}
		return nil
	}
	state := imaappraise.State{}
	if l.IMAOffset != 0 {
		if prior.ima == nil || prior.ima.Offset != l.IMAOffset {
			return ErrResync
		}
		state = *prior.ima
	}
	r, err := imaappraise.Appraise(state, l.IMA, pcrs)
	if err != nil {
		if l.IMAOffset != 0 {
			return ErrResync // a list that was replaced, or a state that isn't this host's: from its start
		}
		return err
	}
	proven := r.State // alone: r has the list
	k.ima = &proven
	if l.IMAOffset != 0 {
		k.files, k.violations = prior.files, slices.Clip(prior.violations)
		k.told = prior.told
		k.rules, k.unexpected, k.count = prior.rules, slices.Clip(prior.unexpected), prior.count
		k.others, k.othersSeen = slices.Clip(prior.others), prior.othersSeen
	}
	k.files, k.fresh = k.files.with(func(yield func(file) bool) {
		for m := range r.Measurements() {
			switch {
			case m.Violation:
				if len(k.violations) < shown {
					k.violations = append(k.violations, fmt.Sprintf("entry %d, which the list calls %.200q,", m.Index, m.Name))
				}
			case !m.IsAggregate():
				if !yield(fileOf(m)) {
					return
				}
			}
		}
	})
	return nil
}

// shown bounds what is told of many of a kind, maxProblem what is told of one.
const (
	shown      = 10
	maxProblem = 500
)

// A Reference is the set that a host has to match: the boot has to match one of
// the versions in force, and each file has to be one that any of them, or a
// release, allows, so that a fleet can move from one to the next.
type Reference struct {
	Name     string
	Rules    string    // names versions, releases and leniency as they are: files are judged once under each
	Versions []Version // the newest first
	Expected Expected  // files that releases announced
	Lenient  bool      // maintenance: files that aren't allowed are told, and let be
}

// A Version is one that is in force.
type Version struct {
	Content reference.Content
	Files   *imaappraise.Rules // nil: it doesn't speak of files
}

// Expected are files that releases announced: digests by name, as IMA writes it.
type Expected map[string][]string

// Add expects a file; its path is in the merged form.
func (e Expected) Add(path, digest string) {
	name := imaName(path)
	e[name] = append(e[name], digest)
}

func (e Expected) has(m imaappraise.Measurement) bool {
	return slices.Contains(e[reference.Merged(m.Name)], m.Digest)
}

// match holds a host against its reference. What it lets be, it writes down in k.
func (r *Reference) match(k *Known, pcrs map[int]evidence.Digest) error {
	rules := k.rules
	k.rules = "" // unless they are judged now
	if r == nil {
		return nil
	}
	reject := func(diffs []string) error {
		return &evidence.Rejected{Check: CheckReference, Detail: fmt.Sprintf("reference set %s: %s", r.Name, reference.Words(diffs))}
	}
	var newest []string
	matched := false
	for _, v := range r.Versions {
		diffs := v.Content.Mismatch(k.facts, pcrs)
		if len(diffs) > 0 && k.problem != "" {
			diffs = append(diffs, k.problem)
		}
		if len(diffs) == 0 {
			matched = true
			break
		}
		if newest == nil {
			newest = diffs
		}
	}
	if !matched {
		if newest == nil {
			newest = []string{"no version of it is in force; `countersign reference approve` puts one"}
		}
		return reject(newest)
	}
	if !slices.ContainsFunc(r.Versions, func(v Version) bool { return v.Files != nil }) {
		return nil
	}
	if k.ima == nil {
		return reject([]string{"no IMA list was shown"})
	}
	if !k.isInForce(r) {
		return reject([]string{"no file was measured: its IMA policy is not in force"})
	}
	return r.judge(k, rules, reject)
}

// isInForce reports whether the IMA policy measured something of what r is about.
func (k *Known) isInForce(r *Reference) bool {
	for f := range k.files.all() {
		if r.newest().Counts(f.measurement()) {
			return true
		}
	}
	return false
}

// judge holds the files that weren't yet against the rules.
func (r *Reference) judge(k *Known, rules string, reject func([]string) error) error {
	list := slices.Values(k.fresh)
	if rules != r.Rules {
		list, k.unexpected, k.count, k.told = k.files.all(), nil, 0, 0
		k.others, k.othersSeen = nil, 0
	}
	var bad, others []string
	lenient := r.Lenient || r.newest().Observes()
	if r.why(imaappraise.Measurement{Index: -1, PCR: ima.DefaultPCR, Violation: true}) != "" {
		for _, where := range k.violations[k.told:] {
			bad = append(bad, where+" is a violation: a file was written while it was measured")
		}
	}
	for f := range list {
		m := f.measurement()
		why := r.why(m)
		switch {
		case why == "":
		case r.newest().Holds(m):
			bad = append(bad, why)
		default:
			others = append(others, why)
		}
	}
	slices.Sort(bad)
	if len(bad) > 0 && !lenient {
		return reject(bad)
	}
	k.rules, k.count, k.told = r.Rules, k.count+len(bad), len(k.violations)
	k.unexpected = append(k.unexpected, bad[:min(len(bad), max(0, shown-len(k.unexpected)))]...)
	slices.Sort(others)
	k.othersSeen += len(others)
	k.others = append(k.others, others[:min(len(others), max(0, shown-len(k.others)))]...)
	return nil
}

// newest is what the newest version with files says, which says how it is meant. There is one where files
// are judged.
func (r *Reference) newest() *imaappraise.Rules {
	return r.Versions[slices.IndexFunc(r.Versions, func(v Version) bool { return v.Files != nil })].Files
}

// why says why no version, and no release, allows a file; empty: one does.
func (r *Reference) why(m imaappraise.Measurement) (why string) {
	if !m.Violation && r.Expected.has(m) {
		return ""
	}
	for _, v := range r.Versions {
		if v.Files == nil {
			continue
		}
		said := v.Files.Judge(m)
		if said == "" {
			return ""
		}
		if why == "" {
			why = said
		}
	}
	return why
}

// A Measured says what the IMA list of the same quote knows of a program.
type Measured struct {
	Exe        bool     `json:"exe"`                  // its digest was measured, under its path or another
	Unmeasured []string `json:"unmeasured,omitempty"` // executable mappings that weren't; the first few
	// Unlisted are the program's files that were measured, and that the host's reference set
	// doesn't allow, though it doesn't hold the host to them; the first few.
	Unlisted []string `json:"unlisted,omitempty"`
}

// measured looks a program up. A path is as the kernel saw it, so in a container
// it is the container's; the digest is what counts for the exe. Of a mapping
// only the path is known.
func (k *Known) measured(p *process.Program, r *Reference) *Measured {
	if k.ima == nil {
		return nil
	}
	m := &Measured{Exe: k.files.hasDigest("sha256:" + p.Main().SHA256.String())}
	for _, mapping := range p.Mappings {
		if mapping.Path != process.Anonymous && !k.files.hasName(imaName(mapping.Path)) && len(m.Unmeasured) < shown {
			m.Unmeasured = append(m.Unmeasured, mapping.Path)
		}
	}
	m.Unlisted = k.unlisted(p, r)
	return m
}

// unlisted are a program's files of which nothing that was measured is allowed. Of one path several
// files may have been measured, in mounts that any user made; the agent has told the host's.
func (k *Known) unlisted(p *process.Program, r *Reference) []string {
	if r == nil || r.Lenient || k.rules != r.Rules || k.othersSeen == 0 {
		return nil // the host is held to all that was measured
	}
	exe := digestOf(plain + p.Main().SHA256.String())
	wanted := map[string]string{} // paths, by IMA's names
	for _, mapping := range p.Mappings {
		if mapping.Path != process.Anonymous {
			wanted[imaName(mapping.Path)] = mapping.Path
		}
	}
	measured, allowed := map[string]bool{}, map[string]bool{}
	for f := range k.files.all() {
		var of []string
		if f.digest == exe {
			of = append(of, p.Main().Path)
		}
		if path, ok := wanted[f.name]; ok {
			of = append(of, path)
		}
		if len(of) == 0 {
			continue
		}
		fine := r.why(f.measurement()) == ""
		for _, path := range of {
			measured[path] = true
			allowed[path] = allowed[path] || fine
		}
	}
	var list []string
	for path := range measured {
		if !allowed[path] {
			list = append(list, path)
		}
	}
	slices.Sort(list)
	return list[:min(len(list), shown)]
}

// imaName is a path as IMA's list has it.
func imaName(path string) string { return strings.ReplaceAll(path, " ", "_") }
