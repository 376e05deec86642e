package appraise

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// record is one of systemd's, as it writes them.
func record(pcr int, kind, text string) string {
	return fmt.Sprintf("\x1e"+`{"pcr":%d,"digests":[{"hashAlg":"sha256","digest":"%s"}],"content_type":"systemd",`+
		`"content":{"eventType":"%s","bootId":"d5a1a2a4c1a94c0a8a1e0b8e5a1f7c11","timestamp":1234567,"string":"%s"}}`+"\n",
		pcr, evidence.Sum([]byte(text)), kind, text)
}

// unified is a boot of a unified kernel image with systemd's stub, which measures
// each section's name and content, and of the systemd that then measures phases.
func unified(t *testing.T) (log []byte, later string, pcrs map[int]evidence.Digest) {
	log, pcrs = recorded(t, "clean")
	l := parse(t, log)
	l.Events = slices.DeleteFunc(l.Events, func(e boot.Event) bool { return e.PCR == 8 || e.PCR == 9 })
	exit := len(l.Events) - 2
	section := func(name, content string) []boot.Event {
		return []boot.Event{
			event(11, boot.IPL, []byte(name+"\x00"), utf16Bytes(name+"\x00")),
			event(11, boot.IPL, []byte(content), utf16Bytes(name+"\x00")),
		}
	}
	options := utf16Bytes("root=/dev/vda2 quiet\x00")
	l.Events = slices.Insert(l.Events, exit, slices.Concat(section(".linux", "kernel"), section(".initrd", "initrd"),
		[]boot.Event{event(12, boot.IPL, options, options)})...)
	for _, pcr := range []int{8, 9} {
		pcrs[pcr] = evidence.Digest{}
	}
	pcrs = recompute(l, pcrs)
	for _, m := range []struct {
		pcr  int
		kind string
		text string
	}{{11, "phase", "enter-initrd"}, {11, "phase", "leave-initrd"}, {15, "machine-id", "machine-id:d5a1a2a4c1a94c0a8a1e0b8e5a1f7c11"}} {
		pcrs[m.pcr] = extend(pcrs[m.pcr], evidence.Sum([]byte(m.text)))
		later += record(m.pcr, m.kind, m.text)
	}
	return l.Encode(), later, pcrs
}

func TestUnifiedKernelImage(t *testing.T) {
	log, later, pcrs := unified(t)
	f, err := Appraise(log, []byte(later), pcrs)
	if err != nil {
		t.Fatal(err)
	}
	if f.PCRsUnreplayed != nil || f.PCRsUnexplained != nil || !slices.Contains(f.PCRsReplayed, 11) || !slices.Contains(f.PCRsReplayed, 15) {
		t.Errorf("replayed %v, unreplayed %v, unexplained %v", f.PCRsReplayed, f.PCRsUnreplayed, f.PCRsUnexplained)
	}
	for name, content := range map[string]string{".linux": "kernel", ".initrd": "initrd"} {
		if !slices.Contains(f.Components, Component{PCR: 11, Kind: "section " + name, SHA256: evidence.Sum([]byte(content))}) {
			t.Errorf("no section %s in %v", name, f.Components)
		}
	}
	if f.KernelCommandLine == nil || *f.KernelCommandLine != "root=/dev/vda2 quiet" {
		t.Errorf("command line %v", f.KernelCommandLine)
	}
	var texts []string
	for _, r := range f.Userspace {
		texts = append(texts, r.Text)
	}
	if !slices.Equal(texts, []string{"enter-initrd", "leave-initrd", "machine-id:d5a1a2a4c1a94c0a8a1e0b8e5a1f7c11"}) {
		t.Errorf("systemd measured %q", texts)
	}
	// What systemd measured after the quote isn't proven, and does no harm.
	again, err := Appraise(log, []byte(later+record(11, "phase", "ready")), pcrs)
	if err != nil || len(again.Userspace) != 3 {
		t.Errorf("a log that went on: %v, %v", again.Userspace, err)
	}
	// A name that another record's digest doesn't prove is no text.
	forged := strings.Replace(later, `"string":"leave-initrd"`, `"string":"ready"`, 1)
	f, err = Appraise(log, []byte(forged), pcrs)
	if err != nil || f.Userspace[1].Text != "" {
		t.Errorf("a text that wasn't measured: %v, %v", f.Userspace, err)
	}
}

// Without systemd's log, or with one that was cut, the PCRs that it extended prove
// nothing and are named; the others keep their facts.
func TestSystemdUnreplayed(t *testing.T) {
	log, later, pcrs := unified(t)
	for name, c := range map[string]struct {
		later      string
		unreplayed []int
		unexplaned []int
	}{
		"none":          {"", []int{11}, []int{15}},
		"first missing": {later[strings.Index(later[1:], "\x1e")+1:], []int{11}, nil},
		"last missing":  {later[:strings.LastIndex(later, "\x1e")], nil, []int{15}},
		"forged":        {record(11, "phase", "ready") + record(15, "machine-id", "x"), []int{11, 15}, nil},
	} {
		f, err := Appraise(log, []byte(c.later), pcrs)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !slices.Equal(f.PCRsUnreplayed, c.unreplayed) || !slices.Equal(f.PCRsUnexplained, c.unexplaned) {
			t.Errorf("%s: unreplayed %v, unexplained %v", name, f.PCRsUnreplayed, f.PCRsUnexplained)
		}
		if c.unreplayed != nil && slices.ContainsFunc(f.Components, func(c Component) bool { return c.PCR == 11 }) {
			t.Errorf("%s: facts of a PCR that didn't replay", name)
		}
		if f.SecureBoot == nil || !*f.SecureBoot || f.KernelCommandLine == nil {
			t.Errorf("%s: the other PCRs' facts are gone", name)
		}
	}
}

// Systemd's log explains systemd's PCRs and no others, and hides nothing that was
// moved into it from the end of a PCR.
func TestEventsMovedToSystemdsLog(t *testing.T) {
	moved := func(l *boot.Log, pcr uint32) (log []byte, later string) {
		for i := len(l.Events) - 1; i >= 0; i-- {
			if e := l.Events[i]; e.PCR == pcr {
				l.Events = slices.Delete(l.Events, i, i+1)
				return l.Encode(), fmt.Sprintf("\x1e"+`{"pcr":%d,"digests":[{"hashAlg":"sha256","digest":"%x"}]}`+"\n", pcr, e.Digest(boot.SHA256))
			}
		}
		t.Fatal("the PCR has no events")
		return nil, ""
	}
	for _, pcr := range []uint32{0, 4, 7, 8, 14} {
		log, pcrs := recorded(t, "clean")
		accepted(t, log, pcrs)
		log, later := moved(parse(t, log), pcr)
		_, err := Appraise(log, []byte(later), pcrs)
		if evidence.CheckOf(err) == "" {
			t.Errorf("PCR %d: %v", pcr, err)
		}
	}
	log, pcrs := recorded(t, "clean")
	honest := accepted(t, log, pcrs)
	log, later := moved(parse(t, log), 9)
	f, err := Appraise(log, []byte(later), pcrs)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range honest.Components {
		if !slices.ContainsFunc(f.Components, func(d Component) bool { return d.PCR == c.PCR && d.SHA256 == c.SHA256 }) {
			t.Errorf("%v is hidden", c)
		}
	}
	log, _, pcrs = unified(t)
	delete(pcrs, 11)
	log, later = moved(parse(t, log), 12)
	f, err = Appraise(log, []byte(later), pcrs)
	if err != nil {
		t.Fatal(err)
	}
	if f.KernelCommandLine != nil || !slices.ContainsFunc(f.Components, func(c Component) bool { return c.PCR == 12 && c.Kind == KindUserspace }) {
		t.Errorf("a command line was moved out of the log: %v, %v", f.KernelCommandLine, f.Components)
	}
}

// Every bit of systemd's log is refused, takes its PCR's facts, or changes nothing.
func TestEveryBitOfSystemdsLog(t *testing.T) {
	log, later, pcrs := unified(t)
	honest, err := Appraise(log, []byte(later), pcrs)
	if err != nil {
		t.Fatal(err)
	}
	everywhere(8*len(later), func(bit int) {
		changed := []byte(later)
		changed[bit/8] ^= 1 << (bit % 8)
		f, err := Appraise(log, changed, pcrs)
		if err != nil {
			if evidence.CheckOf(err) != CheckStructure {
				t.Errorf("bit %d: %v", bit, err)
			}
			return
		}
		for _, c := range f.Components {
			if c.Kind != KindUserspace && !slices.Contains(honest.Components, c) {
				t.Errorf("bit %d: a component of no boot: %v", bit, c)
			}
		}
		for _, r := range f.Userspace {
			if r.Text != "" && !slices.Contains(honest.Userspace, r) {
				t.Errorf("bit %d: a record that nobody measured: %v", bit, r)
			}
		}
	})
}

// Where nothing of systemd was booted, its PCRs are held to the log like others.
func TestSystemdPCRsWithoutSystemd(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	accepted(t, log, pcrs)
	extended := maps.Clone(pcrs)
	extended[9] = extend(pcrs[9], evidence.Sum([]byte("x")))
	_, err := Appraise(log, nil, extended)
	rejected(t, err, CheckReplay, "PCR 9 was quoted as")

	// Its log explains what it measured on top of GRUB's files.
	f, err := Appraise(log, []byte(record(9, "nvpcr-init", "x")), extended)
	if err != nil || !slices.Contains(f.PCRsReplayed, 9) {
		t.Errorf("%v, %v", f.PCRsReplayed, err)
	}
	// PCR 10 is IMA's.
	extended = maps.Clone(pcrs)
	extended[10] = evidence.Sum(nil)
	accepted(t, log, extended)
	// One that no log speaks of is named.
	extended[13] = evidence.Sum(nil)
	if f := accepted(t, log, extended); !slices.Equal(f.PCRsUnexplained, []int{13}) {
		t.Errorf("unexplained %v", f.PCRsUnexplained)
	}
}

func TestSystemdsLogIsStrict(t *testing.T) {
	log, later, pcrs := unified(t)
	digest := hex.EncodeToString(bytes.Repeat([]byte{1}, 32))
	for name, bad := range map[string]string{
		"no separator": later[1:],
		"cut":          later[:len(later)-1],
		"no JSON":      "\x1e{\n",
		"no PCR":       "\x1e" + `{"digests":[{"hashAlg":"sha256","digest":"` + digest + `"}]}` + "\n",
		"no digest":    "\x1e" + `{"pcr":11,"digests":[{"hashAlg":"sha1","digest":"00"}]}` + "\n",
		"short digest": "\x1e" + `{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"00"}]}` + "\n",
		"two digests":  "\x1e" + `{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"` + digest + `"},{"hashAlg":"sha256","digest":"` + digest + `"}]}` + "\n",
		"PCR 24":       "\x1e" + `{"pcr":24,"digests":[{"hashAlg":"sha256","digest":"` + digest + `"}]}` + "\n",
		"PCR -1":       "\x1e" + `{"pcr":-1,"digests":[{"hashAlg":"sha256","digest":"` + digest + `"}]}` + "\n",
	} {
		if _, err := Appraise(log, []byte(bad), pcrs); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			rejected(t, err, CheckStructure, "systemd's log can't be read: record ")
		}
	}
	nv := "\x1e" + `{"nv_index":25166336,"digests":[{"hashAlg":"sha256","digest":"` + digest + `"}],"content_type":"systemd","content":{}}` + "\n"
	if f, err := Appraise(log, []byte(nv+later), pcrs); err != nil || len(f.Userspace) != 3 {
		t.Errorf("with a record of an NV index: %v, %v", f.Userspace, err)
	}
}
