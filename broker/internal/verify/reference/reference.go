// Package reference says what a host must be: how it boots, and which files may
// run on it. A set is learned from a host that an operator trusts, or written
// by hand, and speaks of facts first: facts hold for a fleet whose machines
// differ in memory and network cards, where raw PCR values don't.
//
// It trusts its inputs: facts come from the appraisal, a set's content from
// operators. It promises that a host which matches has shown nothing beyond
// the set, and that a difference is told in words, with the event or the entry.
package reference

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	ima "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/internal/strictjson"
)

// A Content is what a version of a set demands. A part that is missing demands
// nothing.
type Content struct {
	Boot *Boot                   `json:"boot,omitempty"`
	IMA  *ima.Policy             `json:"ima,omitempty"`
	PCRs map[int]evidence.Digest `json:"pcrs,omitempty"` // raw values of the SHA-256 bank, where no facts are
}

// A Boot is what is demanded of an event log's facts. Of a list, everything
// that was measured must be in it, and not everything in it was measured; an
// empty list demands nothing.
type Boot struct {
	SecureBoot         *bool                        `json:"secure_boot,omitempty"`
	SecureBootMode     string                       `json:"secure_boot_mode,omitempty"`
	Databases          map[string][]evidence.Digest `json:"signature_databases,omitempty"` // PK, KEK and db: one of these contents each
	Authorities        []evidence.Digest            `json:"authorities,omitempty"`         // what images were verified by
	Images             []evidence.Digest            `json:"images,omitempty"`              // Authenticode: boot loaders, kernels
	Files              []evidence.Digest            `json:"files,omitempty"`               // what the boot loader read: configuration, kernel, initrd
	MOK                []evidence.Digest            `json:"mok,omitempty"`
	KernelCommandLines []string                     `json:"kernel_command_lines,omitempty"` // '*' is any run of characters that aren't spaces

	// Extended are digests of what was measured beside that into PCR 11 (sections
	// of a unified kernel image), 12 (configuration) and 13 (extensions). A PCR
	// that is here with an empty list demands that nothing was.
	Extended map[int][]evidence.Digest `json:"extended,omitempty"`
}

// MaxContent bounds a set's JSON.
const MaxContent = 16 << 20

// Parse reads a set's JSON, strictly.
func Parse(b []byte) (Content, error) {
	var c Content
	if len(b) > MaxContent {
		return c, fmt.Errorf("a reference set of %d bytes; %d are looked at", len(b), MaxContent)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, fmt.Errorf("reference set: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return c, errors.New("reference set: something follows its end")
	}
	if err := exactKeys(b); err != nil {
		return c, fmt.Errorf("reference set: %w", err)
	}
	if c.DemandsNothing() {
		return c, errors.New("a reference set that demands nothing would match every host")
	}
	for pcr := range c.PCRs {
		if pcr < 0 || pcr > 15 {
			return c, fmt.Errorf("pcrs: hosts quote PCR 0 to 15, not %d", pcr)
		}
	}
	if c.Boot != nil {
		for name := range c.Boot.Databases {
			if !slices.Contains(learned, name) {
				return c, fmt.Errorf("signature_databases: %q is none of %v", name, learned)
			}
		}
		for pcr := range c.Boot.Extended {
			if !slices.Contains(extended, pcr) {
				return c, fmt.Errorf("extended: PCR %d is none of %v", pcr, extended)
			}
		}
	}
	if c.IMA != nil {
		if _, err := c.IMA.Compile(); err != nil {
			return c, fmt.Errorf("ima: %w", err)
		}
	}
	return c, nil
}

func (b *Boot) demandsNothing() bool {
	return b == nil || b.SecureBoot == nil && b.SecureBootMode == "" && len(b.Databases)+len(b.Authorities)+len(b.Images)+len(b.Files)+len(b.MOK)+len(b.KernelCommandLines)+len(b.Extended) == 0
}

// exactKeys refuses what Go's decoder takes: a key twice, where the last would
// count, and one in other letters. Those of databases are names of variables.
func exactKeys(b []byte) error {
	return strictjson.Keys(b, func(under, key string) error {
		if folded := strings.ToLower(key); key != folded && under != "signature_databases" {
			return fmt.Errorf("unknown field %q; did you mean %q?", key, folded)
		}
		return nil
	})
}

// DemandsNothing reports whether every host would match the set.
func (c Content) DemandsNothing() bool {
	return c.Boot.demandsNothing() && c.IMA == nil && len(c.PCRs) == 0
}

// Learn makes a set of what one host has shown: facts where its event log was
// appraised, and the files that it measured. It demands the raw values of the given
// PCRs, and of those that the log explains, and that have no facts because an event
// isn't understood.
func Learn(facts *boot.Facts, pcrs map[int]evidence.Digest, raw []int, measured []ima.Measurement) Content {
	var c Content
	if facts != nil {
		c.Boot = learnBoot(facts)
		for _, p := range facts.PCRs {
			lines := len(facts.KernelCommandLines) > 0 && !facts.LinesComplete && slices.Contains(linePCRs, p.Index)
			if _, given := pcrs[p.Index]; given && p.Proven && (slices.Contains(listPCRs, p.Index) && !facts.Complete(p.Index) || lines) {
				raw = append(slices.Clone(raw), p.Index)
			}
		}
	}
	for _, pcr := range raw {
		if c.PCRs == nil {
			c.PCRs = map[int]evidence.Digest{}
		}
		c.PCRs[pcr] = pcrs[pcr]
	}
	if measured != nil {
		c.IMA = &ima.Policy{Allow: allow(measured)}
		for _, folder := range ownFolders {
			inside := func(a ima.Allowed) bool { return strings.HasPrefix(a.Path, folder) }
			if slices.ContainsFunc(c.IMA.Allow, inside) {
				c.IMA.Allow = slices.DeleteFunc(c.IMA.Allow, inside)
				c.IMA.Exclude = append(c.IMA.Exclude, folder+"**")
			}
		}
	}
	return c
}

// learned are the databases that only a signed update changes; dbx grows, with
// every update of the system, and is left to facts.
var learned = []string{"PK", "KEK", "db"}

// ownFolders are the agent's. Where IMA's policy measures what root reads, their
// files stand in the list and change while the agent works: they are excluded
// then, and only then, since what is excluded can be anything.
var ownFolders = []string{"/var/lib/countersign-agent/", "/run/countersign-agent/"}

func learnBoot(f *boot.Facts) *Boot {
	b := &Boot{SecureBoot: f.SecureBoot, SecureBootMode: f.SecureBootMode, MOK: distinct(f.MOK)}
	if f.LinesComplete {
		b.KernelCommandLines = f.KernelCommandLines
	}
	for _, name := range learned {
		if db := f.Databases[name]; db != nil {
			if b.Databases == nil {
				b.Databases = map[string][]evidence.Digest{}
			}
			b.Databases[name] = []evidence.Digest{db.SHA256}
		}
	}
	for _, a := range f.Authorities {
		b.Authorities = append(b.Authorities, a.SHA256)
	}
	b.Authorities = distinct(b.Authorities)
	b.Images = distinct(components(f, 4))
	b.Files = distinct(components(f, 9))
	for _, pcr := range extended {
		if f.Complete(pcr) {
			if b.Extended == nil {
				b.Extended = map[int][]evidence.Digest{}
			}
			b.Extended[pcr] = append([]evidence.Digest{}, distinct(components(f, pcr))...)
		}
	}
	return b
}

// listPCRs hold boot images and authorities, linePCRs kernel command lines.
var (
	listPCRs = []int{4, 7}
	linePCRs = []int{8, 12}
)

// extended are the PCRs that Boot.Extended can speak of.
var extended = []int{11, 12, 13}

// components are what was measured into a PCR, by whatever name it is told.
func components(f *boot.Facts, pcr int) (list []evidence.Digest) {
	for _, c := range f.Components {
		if c.PCR == pcr {
			list = append(list, c.SHA256)
		}
	}
	return list
}

func distinct(list []evidence.Digest) []evidence.Digest {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b evidence.Digest) int { return bytes.Compare(a[:], b[:]) })
	return slices.Compact(list)
}

func allow(measured []ima.Measurement) []ima.Allowed {
	digests := map[string][]string{}
	for _, m := range measured {
		if !m.IsAggregate() && !m.Violation {
			digests[m.Name] = append(digests[m.Name], m.Digest)
		}
	}
	list := make([]ima.Allowed, 0, len(digests))
	for _, path := range slices.Sorted(maps.Keys(digests)) {
		d := digests[path]
		slices.Sort(d)
		list = append(list, ima.Allowed{Path: escapeGlob(path), Digests: slices.Compact(d)})
	}
	return list
}

// escapeGlob is a pattern for just this path.
func escapeGlob(path string) string {
	if !strings.ContainsAny(path, `*?[]{}\`) {
		return path
	}
	var b strings.Builder
	for _, r := range path {
		if strings.ContainsRune(`*?[]{}\`, r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}

// Mismatch says in words how a boot differs from what is demanded; nothing:
// it matches. Facts are nil where no event log was appraised.
func (c Content) Mismatch(facts *boot.Facts, pcrs map[int]evidence.Digest) (diffs []string) {
	if c.Boot != nil {
		if facts == nil {
			diffs = append(diffs, "no event log was appraised")
		} else {
			diffs = append(diffs, c.Boot.mismatch(facts)...)
		}
	}
	for _, i := range slices.Sorted(maps.Keys(c.PCRs)) {
		switch have, ok := pcrs[i]; {
		case !ok:
			diffs = append(diffs, fmt.Sprintf("PCR %d was not quoted", i))
		case !have.Equal(c.PCRs[i]):
			diffs = append(diffs, fmt.Sprintf("PCR %d is %s, not %s", i, have, c.PCRs[i]))
		}
	}
	return diffs
}

// How a kernel command line differs is told of the first few, and of none that is
// longer than Linux takes: a host can measure a megabyte of words.
const (
	maxLines = 10
	maxLine  = 4096
)

func (b *Boot) mismatch(f *boot.Facts) (diffs []string) {
	bad := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	if b.SecureBoot != nil {
		if f.SecureBoot == nil {
			bad("whether Secure Boot is on is not proven")
		} else if *f.SecureBoot != *b.SecureBoot {
			bad("Secure Boot is %s", onOff(*f.SecureBoot))
		}
	}
	if b.SecureBootMode != "" && f.SecureBootMode != b.SecureBootMode {
		bad("Secure Boot is in mode %q, not %q", f.SecureBootMode, b.SecureBootMode)
	}
	for _, name := range slices.Sorted(maps.Keys(b.Databases)) {
		if db := f.Databases[name]; db == nil {
			bad("Secure Boot's %s was not measured", name)
		} else if !slices.Contains(b.Databases[name], db.SHA256) {
			bad("Secure Boot's %s is another one, %s", name, db.SHA256)
		}
	}
	var authorities []evidence.Digest
	for _, a := range f.Authorities {
		authorities = append(authorities, a.SHA256)
	}
	for _, part := range []struct {
		what        string
		pcr         int
		want, shown []evidence.Digest
	}{
		{"an authority that verified an image", 7, b.Authorities, authorities},
		{"a boot image", 4, b.Images, components(f, 4)},
		{"a file that the boot loader read", 9, b.Files, components(f, 9)},
		{"a machine owner's key list", 14, b.MOK, f.MOK},
	} {
		if len(part.want) == 0 {
			continue
		}
		if !f.Complete(part.pcr) {
			bad("PCR %d is not explained by the event log", part.pcr)
			continue
		}
		if len(part.shown) == 0 {
			bad("nothing was measured of what should be %s of the set", part.what)
		}
		for _, d := range distinct(part.shown) {
			if !slices.Contains(part.want, d) {
				bad("%s isn't in the set: %s", part.what, d)
			}
		}
	}
	for _, pcr := range slices.Sorted(maps.Keys(b.Extended)) {
		if !f.Complete(pcr) {
			bad("PCR %d is not explained by the event log", pcr)
		}
		for _, d := range distinct(components(f, pcr)) {
			if !slices.Contains(b.Extended[pcr], d) {
				bad("what was measured into PCR %d isn't in the set: %s", pcr, d)
			}
		}
	}
	if len(b.KernelCommandLines) > 0 {
		if !f.LinesComplete { // GRUB's, and a unified kernel image's
			bad("PCR 8 and 12 hold what may be another kernel command line")
		}
		if len(f.KernelCommandLines) == 0 {
			bad("no kernel command line was measured")
		}
		for i, line := range f.KernelCommandLines {
			switch {
			case slices.ContainsFunc(b.KernelCommandLines, func(p string) bool { return CommandLineMatches(p, line) }):
			case i >= maxLines || len(line) > maxLine:
				bad("a kernel command line of %d bytes isn't in the set", len(line))
			default:
				bad("kernel command line %s", words(nearest(b.KernelCommandLines, line), line))
			}
		}
	}
	return diffs
}

// Words is a list of differences in one line, the first ones in full.
func Words(diffs []string) string {
	const shown = 10
	if len(diffs) > shown {
		return fmt.Sprintf("%s; and %d more", strings.Join(diffs[:shown], "; "), len(diffs)-shown)
	}
	return strings.Join(diffs, "; ")
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// CommandLineMatches holds a kernel command line against a pattern, word by word;
// * is any run of characters that aren't spaces.
func CommandLineMatches(pattern, line string) bool {
	want, have := strings.Fields(pattern), strings.Fields(line)
	return slices.EqualFunc(want, have, wordMatches)
}

func wordMatches(pattern, word string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == word
	}
	if !strings.HasPrefix(word, parts[0]) {
		return false
	}
	word = word[len(parts[0]):]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(word, part)
		if i < 0 {
			return false
		}
		word = word[i+len(part):]
	}
	return strings.HasSuffix(word, parts[len(parts)-1])
}

// nearest is the line that shares the most words with another.
func nearest(lines []string, line string) string {
	have := strings.Fields(line)
	return slices.MaxFunc(lines, func(a, b string) int { return shared(a, have) - shared(b, have) })
}

func shared(line string, words []string) (n int) {
	for _, w := range strings.Fields(line) {
		if slices.Contains(words, w) {
			n++
		}
	}
	return n
}

// words says how one command line became another.
func words(was, is string) string {
	gained := missing(is, was, func(word, pattern string) bool { return wordMatches(pattern, word) })
	lost := missing(was, is, wordMatches)
	switch {
	case len(gained) > 0 && len(lost) > 0:
		return fmt.Sprintf("gained %s and lost %s", strings.Join(gained, " "), strings.Join(lost, " "))
	case len(gained) > 0:
		return "gained " + strings.Join(gained, " ")
	case len(lost) > 0:
		return "lost " + strings.Join(lost, " ")
	}
	return fmt.Sprintf("has another order: %s, not %s", printable(is), printable(was))
}

// missing are the words of one line that another has none like, the first ones.
func missing(of, in string, same func(of, in string) bool) (list []string) {
	const shown = 20
	others := strings.Fields(in)
	for _, w := range strings.Fields(of) {
		if slices.ContainsFunc(others, func(o string) bool { return same(w, o) }) {
			continue
		}
		if len(list) == shown {
			return append(list, "…")
		}
		list = append(list, printable(w))
	}
	return list
}

// printable keeps what a host measured from acting on a terminal.
func printable(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	if q := fmt.Sprintf("%q", s); q != `"`+s+`"` {
		return q
	}
	return s
}

// Merged is a path where /bin, /lib and their like are links into /usr, which is
// how the kernel sees it; packages still name files by the old one.
func Merged(path string) string {
	for _, dir := range []string{"/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/"} {
		if strings.HasPrefix(path, dir) {
			return "/usr" + path
		}
	}
	return path
}
