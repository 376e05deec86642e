package reference_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	ima "github.com/countersign/countersign/attestors/ima/appraise"
	tpm "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/test/check"
)

// learn is what a recorded boot has shown, and the set of it.
func learn(t *testing.T, name string) (reference.Content, boot.Facts, map[int]evidence.Digest) {
	t.Helper()
	file := func(name2 string) []byte {
		return check.Must(os.ReadFile(filepath.Join("../../../../test/vectors/boots", name, name2)))(t)
	}
	pcrs := check.Must(tpm.ParsePCRRead(string(file("pcrs.txt"))))(t)
	facts := check.Must(boot.Appraise(file("binary_bios_measurements"), nil, pcrs))(t)
	list := check.Must(ima.Appraise(ima.State{}, file("ima_binary_runtime_measurements"), pcrs))(t)
	return reference.Learn(&facts, pcrs, nil, slices.Collect(list.Measurements())), facts, pcrs
}

func TestLearnedSets(t *testing.T) {
	clean, facts, pcrs := learn(t, "clean")
	if diffs := clean.Mismatch(&facts, pcrs); diffs != nil {
		t.Errorf("a host differs from what was learned of it: %v", diffs)
	}
	if len(clean.PCRs) != 0 {
		t.Error("raw values were learned beside facts")
	}
	// As JSON it is the same set.
	again := check.Must(reference.Parse(check.Must(json.Marshal(clean))(t)))(t)
	if diffs := reference.Diff(clean, again); diffs != nil {
		t.Errorf("read again: %v", diffs)
	}
	// Memory and network cards change PCR 0, 1 and 2, and no facts.
	other := maps.Clone(pcrs)
	for _, pcr := range []int{0, 1, 2} {
		other[pcr] = evidence.Sum([]byte{byte(pcr)})
	}
	if diffs := clean.Mismatch(&facts, other); diffs != nil {
		t.Errorf("another machine of the fleet: %v", diffs)
	}
	cmdline, changed, _ := learn(t, "cmdline")
	if diffs := reference.Diff(clean, cmdline); !slices.Contains(diffs, "kernel command line gained init_on_alloc=0 module.sig_enforce=0 nokaslr") || len(diffs) != 3 {
		t.Errorf("clean to cmdline: %q", diffs)
	}
	if diffs := reference.Diff(cmdline, clean); !slices.Contains(diffs, "kernel command line lost init_on_alloc=0 module.sig_enforce=0 nokaslr") {
		t.Errorf("cmdline to clean: %q", diffs)
	}
	if diffs := clean.Mismatch(&changed, pcrs); len(diffs) != 2 || diffs[1] != "kernel command line gained init_on_alloc=0 module.sig_enforce=0 nokaslr" {
		t.Errorf("cmdline against clean: %q", diffs)
	}
	tampered, _, _ := learn(t, "tampered")
	if diffs := reference.Diff(clean, tampered); len(diffs) != 1 || !strings.HasPrefix(diffs[0], "/usr/local/bin/app gained sha256:") {
		t.Errorf("clean to tampered: %q", diffs)
	}
}

// Each demand is one that a change of its facts fails, by its words.
func TestMismatch(t *testing.T) {
	set, honest, pcrs := learn(t, "clean")
	set.PCRs = map[int]evidence.Digest{5: pcrs[5]}
	strange := evidence.Sum([]byte("strange"))
	off, line := false, "/vmlinuz init=/bin/sh"
	for name, tt := range map[string]struct {
		change func(*boot.Facts)
		says   string
	}{
		"nothing":             {func(*boot.Facts) {}, ""},
		"secure boot off":     {func(f *boot.Facts) { f.SecureBoot = &off }, "Secure Boot is off"},
		"secure boot unknown": {func(f *boot.Facts) { f.SecureBoot = nil }, "not proven"},
		"another mode":        {func(f *boot.Facts) { f.SecureBootMode = "setup" }, `mode "setup", not "user"`},
		"another db":          {func(f *boot.Facts) { f.Databases["db"] = &boot.SignatureDatabase{SHA256: strange} }, "db is another one"},
		"no PK":               {func(f *boot.Facts) { delete(f.Databases, "PK") }, "PK was not measured"},
		"another dbx":         {func(f *boot.Facts) { f.Databases["dbx"] = &boot.SignatureDatabase{SHA256: strange} }, ""},
		"another authority":   {func(f *boot.Facts) { f.Authorities = append(f.Authorities, boot.Authority{SHA256: strange}) }, "an authority that verified an image isn't in the set"},
		"another image": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 4, Kind: boot.KindApplication, SHA256: strange})
		}, "a boot image isn't in the set"},
		"no image": {func(f *boot.Facts) { f.Components = nil }, "nothing was measured of what should be a boot image"},
		"another initrd": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 9, Kind: boot.KindFile, SHA256: strange})
		}, "a file that the boot loader read isn't in the set"},
		"another option ROM": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 2, Kind: boot.KindDriver, SHA256: strange})
		}, ""},
		"another MOK":          {func(f *boot.Facts) { f.MOK = append(f.MOK, strange) }, "key list isn't in the set"},
		"another command line": {func(f *boot.Facts) { f.KernelCommandLines = []string{line} }, "kernel command line gained init=/bin/sh and lost"},
		"two readings": {func(f *boot.Facts) {
			f.KernelCommandLine = nil
			f.KernelCommandLines = append(f.KernelCommandLines, line)
		}, "gained init=/bin/sh"},
		"a file in systemd's log": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 9, Kind: boot.KindUserspace, SHA256: strange})
		}, "a file that the boot loader read isn't in the set"},
		"an add-on": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 12, Kind: boot.KindConfig, SHA256: strange})
		}, "what was measured into PCR 12 isn't in the set"},
		"an extension": {func(f *boot.Facts) {
			f.Components = append(f.Components, boot.Component{PCR: 13, Kind: boot.KindExtension, SHA256: strange})
		}, "what was measured into PCR 13 isn't in the set"},
		"a line that can't be read": {func(f *boot.Facts) { f.LinesComplete = false }, "may be another kernel command line"},
		"an unexplained PCR 9": {func(f *boot.Facts) {
			f.PCRsReplayed = slices.DeleteFunc(slices.Clone(f.PCRsReplayed), func(i int) bool { return i == 9 })
		}, "PCR 9 is not explained"},
		"an unexplained PCR 12": {func(f *boot.Facts) {
			f.PCRsUnused = slices.DeleteFunc(slices.Clone(f.PCRsUnused), func(i int) bool { return i == 12 })
		}, "PCR 12 is not explained"},
	} {
		t.Run(name, func(t *testing.T) {
			f := honest
			f.Databases, f.Components, f.Authorities = maps.Clone(f.Databases), slices.Clone(f.Components), slices.Clone(f.Authorities)
			tt.change(&f)
			diffs := set.Mismatch(&f, pcrs)
			if (tt.says == "") != (diffs == nil) || !strings.Contains(fmt.Sprint(diffs), tt.says) {
				t.Errorf("%q, want %q", diffs, tt.says)
			}
		})
	}
	if diffs := set.Mismatch(nil, pcrs); !slices.Contains(diffs, "no event log was appraised") {
		t.Errorf("no event log: %q", diffs)
	}
	wrong := maps.Clone(pcrs)
	wrong[5] = strange
	if diffs := set.Mismatch(&honest, wrong); len(diffs) != 1 || !strings.HasPrefix(diffs[0], "PCR 5 is ") {
		t.Errorf("another PCR 5: %q", diffs)
	}
	delete(wrong, 5)
	if diffs := set.Mismatch(&honest, wrong); len(diffs) != 1 || diffs[0] != "PCR 5 was not quoted" {
		t.Errorf("no PCR 5: %q", diffs)
	}
}

// A host measures what it likes, and how it differs is told in a few words.
func TestManyCommandLines(t *testing.T) {
	set, facts, pcrs := learn(t, "clean")
	facts.KernelCommandLines = append([]string{strings.Repeat("a ", 3000)}, slices.Repeat([]string{"/vmlinuz init=/bin/sh"}, 20)...)
	diffs := set.Mismatch(&facts, pcrs)
	if len(diffs) != 21 || diffs[0] != "a kernel command line of 6000 bytes isn't in the set" || diffs[20] != "a kernel command line of 21 bytes isn't in the set" ||
		!strings.HasPrefix(diffs[9], "kernel command line gained init=/bin/sh and lost") {
		t.Errorf("%d: %q", len(diffs), diffs)
	}
}

// A list that comes to demand nothing is told as such, not as a digest less.
func TestDiffOfDemands(t *testing.T) {
	parse := func(text string) reference.Content { return check.Must(reference.Parse([]byte(text)))(t) }
	sum := evidence.Sum(nil).String()
	with := parse(`{"boot":{"secure_boot":true,"images":["` + sum + `"],"extended":{"12":[]},"kernel_command_lines":["/vmlinuz ro"]}}`)
	without := parse(`{"boot":{"secure_boot":true}}`)
	if got, want := reference.Diff(with, without), []string{"boot images: demanded no more", "boot images lost " + sum,
		"what is measured into PCR 12: demanded no more", "kernel command lines: demanded no more", "kernel command line /vmlinuz ro is gone"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got, want := reference.Diff(without, with), []string{"boot images: demanded now", "boot images gained " + sum,
		"what is measured into PCR 12: demanded now", "kernel command lines: demanded now", "kernel command line /vmlinuz ro is new"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestCommandLines(t *testing.T) {
	for _, tt := range []struct {
		pattern, line string
		want          bool
	}{
		{"/vmlinuz ro quiet", "/vmlinuz ro quiet", true},
		{"/vmlinuz ro quiet", "/vmlinuz  ro   quiet", true},
		{"/vmlinuz ro quiet", "/vmlinuz quiet ro", false},
		{"/vmlinuz ro quiet", "/vmlinuz ro quiet init=/bin/sh", false},
		{"/vmlinuz-* root=UUID=* ro", "/vmlinuz-6.1.0-56 root=UUID=12-34 ro", true},
		{"/vmlinuz-* root=UUID=* ro", "/vmlinuz-6.1.0-56 root=UUID=12 init=/bin/sh ro", false},
		{"a*b*c", "axxbyyc", true},
		{"a*b*c", "axxc", false},
		{"a*a", "a", false},
		{"*", "", false},
		{"*", "anything", true},
	} {
		if got := reference.CommandLineMatches(tt.pattern, tt.line); got != tt.want {
			t.Errorf("%q against %q: %v", tt.pattern, tt.line, got)
		}
	}
}

func TestParse(t *testing.T) {
	for text, says := range map[string]string{
		`{}`:                        "demands nothing",
		`{"bot":{}}`:                "unknown field",
		`{"pcrs":{"1":"ab"}}`:       "64 hex digits",
		`{"boot":{}} {}`:            "follows its end",
		`{"ima":{"mode":"observ"}}`: "neither enforce nor observe",
		`{"ima":{"allow":[{"path":"/x","digests":["md4"]}]}}`: "no digest",
		`[`:                      "reference set",
		`{"boot":{}}`:            "demands nothing",
		`{"boot":{"images":[]}}`: "demands nothing",
		`{"pcrs":{"99":"` + strings.Repeat("0", 64) + `"}}`:                 "PCR 0 to 15",
		`{"boot":{"secure_boot":true},"BOOT":null,"ima":{"allow":[]}}`:      "twice",
		`{"boot":{"secure_boot":true},"IMA":{"mode":"observe","allow":[]}}`: `did you mean "ima"`,
		`{"boot":{"secure_boot":true,"secure_boot":false}}`:                 "twice",
		`{"boot":{"signature_databases":{"Db":[]}, "secure_boot":true}}`:    "none of",
		`{"boot":{"extended":{"10":[]}}}`:                                   "none of",
	} {
		if _, err := reference.Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", text, err, says)
		}
	}
}

func TestMerged(t *testing.T) {
	for path, want := range map[string]string{"/bin/sh": "/usr/bin/sh", "/lib64/ld.so": "/usr/lib64/ld.so", "/usr/bin/sh": "/usr/bin/sh", "/binary": "/binary", "/opt/bin/x": "/opt/bin/x"} {
		if got := reference.Merged(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

// The agent's own files are excluded where IMA measured some, and nowhere else.
func TestOwnFolders(t *testing.T) {
	learned := func(names ...string) *ima.Policy {
		list := []ima.Measurement{{Index: 1, Name: "/usr/bin/true", Digest: "sha256:" + strings.Repeat("0", 64)}}
		for i, name := range names {
			list = append(list, ima.Measurement{Index: i + 2, Name: name, Digest: "sha256:" + strings.Repeat("1", 64)})
		}
		return reference.Learn(nil, nil, nil, list).IMA
	}
	if p := learned(); p.Exclude != nil || len(p.Allow) != 1 {
		t.Errorf("without files of its own: %+v", p)
	}
	p := learned("/var/lib/countersign-agent/keys.json", "/var/lib/countersign-agent-too/x")
	if !slices.Equal(p.Exclude, []string{"/var/lib/countersign-agent/**"}) || len(p.Allow) != 2 {
		t.Errorf("with one: %+v", p)
	}
}

// A log with an event that isn't understood is learned from, and its set holds the
// host that it is of: by the value of the PCR that has no facts.
func TestLearnOfOddLog(t *testing.T) {
	facts := boot.Facts{PCRsReplayed: []int{4, 7, 8}, KernelCommandLines: []string{"/vmlinuz a", "/vmlinuz b"}}
	for _, pcr := range []int{4, 7, 8} {
		facts.PCRs = append(facts.PCRs, boot.PCR{Index: pcr, Proven: true})
	}
	pcrs := map[int]evidence.Digest{4: evidence.Sum([]byte("4")), 7: evidence.Sum([]byte("7")), 8: evidence.Sum([]byte("8"))}
	c := reference.Learn(&facts, pcrs, nil, nil)
	if len(c.Boot.KernelCommandLines) != 0 || len(c.PCRs) != 1 || c.PCRs[8] != pcrs[8] {
		t.Errorf("learned %+v, PCRs %v", c.Boot, c.PCRs)
	}
	if diffs := c.Mismatch(&facts, pcrs); diffs != nil {
		t.Errorf("its own host differs: %q", diffs)
	}
	pcrs[8] = evidence.Sum([]byte("other"))
	if c.Mismatch(&facts, pcrs) == nil {
		t.Error("another command line matches")
	}
}
