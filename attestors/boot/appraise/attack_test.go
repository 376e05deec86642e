package appraise

import (
	"bytes"
	"slices"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// at is the place of the first event of a PCR with such a type, counted from the
// one that is nth of them.
func at(t *testing.T, log *boot.Log, pcr uint32, kind boot.EventType, nth int) int {
	t.Helper()
	for i, e := range log.Events {
		if e.PCR == pcr && e.Type == kind {
			if nth == 0 {
				return i
			}
			nth--
		}
	}
	t.Fatalf("the log has no such event of %s in PCR %d", kind, pcr)
	return 0
}

// Each attack starts from the clean boot, changes the log in one way, and is
// named. Where recompute is set the PCRs are those of a machine that really
// extended so, for rules that must hold even then; else they are the quoted ones.
// A log that replays is accepted: no fact may be false then, and lost names those
// that have to be absent.
func TestAttacks(t *testing.T) {
	empty := []byte{0, 0, 0, 0}
	exitEvent := func(text string) boot.Event { return event(5, boot.EFIAction, []byte(text), []byte(text)) }
	insert := func(l *boot.Log, i int, e ...boot.Event) { l.Events = slices.Insert(l.Events, i, e...) }
	remove := func(l *boot.Log, i int) { l.Events = slices.Delete(l.Events, i, i+1) }

	for _, a := range []struct {
		name      string
		change    func(t *testing.T, l *boot.Log)
		recompute bool
		check     evidence.Check // empty: accepted
		detail    string         // of the refusal, or the facts that are lost
	}{
		{"no separator", func(t *testing.T, l *boot.Log) { remove(l, at(t, l, 3, boot.Separator, 0)) }, true, CheckReplay, "PCR 3 was quoted as"},
		{"two separators", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.Separator, 0)
			insert(l, i, l.Events[i])
		}, true, "", ""},
		{"a second separator of ones", func(t *testing.T, l *boot.Log) {
			ones := []byte{0xff, 0xff, 0xff, 0xff}
			insert(l, at(t, l, 4, boot.Separator, 0)+1, event(4, boot.Separator, ones, ones))
		}, true, "", ""},
		{"a separator under another type", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 7, boot.Separator, 0)].Type = boot.EFIAction
		}, false, "", ""},
		{"a separator with other data", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 2, boot.Separator, 0)].Data = []byte{0, 0, 0, 1}
		}, false, "", ""},
		{"another event called separator", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 7, boot.VariableDriverConfig, 1)].Type = boot.Separator
		}, false, "", ""},
		{"firmware's error separator", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 1, boot.Separator, 0)
			l.Events[i] = event(1, boot.Separator, []byte{1, 0, 0, 0}, []byte{1, 0, 0, 0})
		}, true, "", ""},
		{"a variable behind the separator", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 0)
			insert(l, at(t, l, 7, boot.Separator, 0)+1, l.Events[i])
		}, true, "", "more"},
		{"firmware behind the separator", func(t *testing.T, l *boot.Log) {
			insert(l, at(t, l, 0, boot.Separator, 0)+1, event(0, 0x80000008, []byte("late"), nil))
		}, true, "", ""},
		{"Secure Boot's state as an authority behind the separator", func(t *testing.T, l *boot.Log) {
			e := l.Events[at(t, l, 7, boot.VariableDriverConfig, 0)]
			e.Type = boot.VariableAuthority
			insert(l, at(t, l, 7, boot.Separator, 0)+1, e)
		}, true, "", "more"},
		{"Secure Boot's state under another type", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 7, boot.VariableDriverConfig, 0)].Type = boot.VariableAuthority
		}, false, "", ""},
		{"Secure Boot's state twice", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 0)
			off := bytes.Clone(l.Events[i].Data)
			off[len(off)-1] = 0
			insert(l, i+1, event(7, boot.VariableDriverConfig, off, off))
		}, true, "", "secure boot"},
		{"Secure Boot's state is neither", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 0)
			two := bytes.Clone(l.Events[i].Data)
			two[len(two)-1] = 2
			l.Events[i] = event(7, boot.VariableDriverConfig, two, two)
		}, true, "", "secure boot"},
		{"Secure Boot told to be on", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 0)
			l.Events[i].Data = bytes.Clone(l.Events[i].Data)
			l.Events[i].Data[52] = 0
		}, false, "", "secure boot"},
		{"an unknown type in PCR 7 that hides its data", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 0)
			l.Events[i].Type, l.Events[i].Data = 0x8401, nil
		}, false, "", "secure boot"},
		{"an authority that isn't a variable", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 7, boot.VariableAuthority, 0)
			l.Events[i] = event(7, boot.VariableAuthority, []byte("db"), []byte("db"))
		}, true, "", "more"},
		{"an image called an action", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 4, boot.BootServicesApplication, 1)].Type = boot.EFIAction
		}, false, "", "images"},
		{"a boot option of other content", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 1, boot.VariableBoot, 1)
			l.Events[i].Data = bytes.Clone(l.Events[i].Data)
			l.Events[i].Data[60] ^= 1
		}, false, "", ""},
		{"an event called no action", func(t *testing.T, l *boot.Log) {
			l.Events[at(t, l, 4, boot.BootServicesApplication, 1)].Type = boot.NoAction
		}, false, CheckReplay, "PCR 4 was quoted as"},
		{"an image left out", func(t *testing.T, l *boot.Log) {
			remove(l, at(t, l, 4, boot.BootServicesApplication, 1))
		}, false, CheckReplay, "PCR 4 was quoted as"},
		{"a whole PCR left out", func(t *testing.T, l *boot.Log) {
			l.Events = slices.DeleteFunc(l.Events, func(e boot.Event) bool { return e.PCR == 4 })
		}, false, CheckReplay, "and the log has no event of it"},
		{"an event that wasn't measured", func(t *testing.T, l *boot.Log) {
			l.Events = append(l.Events, event(8, boot.IPL, []byte("insmod"), []byte("grub_cmd: insmod\x00")))
		}, false, CheckReplay, "event 45 (PCR 8, EV_IPL) wasn't measured"},
		{"an event in a PCR that is unused", func(t *testing.T, l *boot.Log) {
			l.Events = append(l.Events, event(12, boot.IPL, []byte("x"), []byte("x")))
		}, false, CheckReplay, "event 45 (PCR 12, EV_IPL) wasn't measured"},
		{"another command line", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 8, boot.IPL, 6)
			l.Events[i].Data = bytes.Replace(l.Events[i].Data, []byte("quiet"), []byte("debug"), 1)
		}, false, "", "command line"},
		{"another MOK", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 14, boot.IPL, 0)
			l.Events[i] = event(14, boot.IPL, []byte("mine"), []byte("MokList\x00"))
		}, false, CheckReplay, "PCR 14 was quoted as"},
		{"another kernel read by GRUB", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 9, boot.IPL, 1)
			l.Events[i] = event(9, boot.IPL, []byte("kernel"), []byte("/vmlinuz\x00"))
		}, false, CheckReplay, "PCR 9 was quoted as"},

		{"an event without a SHA-256 digest", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 4, boot.BootServicesApplication, 0)
			l.Events[i].Digests = l.Events[i].Digests[:1]
		}, false, CheckReplay, "PCR 4 was quoted as"},
		{"SHA-256's digest as another algorithm's", func(t *testing.T, l *boot.Log) {
			l.SpecID.Banks = append(l.SpecID.Banks, boot.Bank{Algorithm: 0x12, Size: 32})
			i := at(t, l, 4, boot.BootServicesApplication, 0)
			l.Events[i].Digests[1].Algorithm = 0x12
		}, false, CheckReplay, "PCR 4 was quoted as"},
		{"a log of SHA-1 alone", func(t *testing.T, l *boot.Log) {
			l.SpecID = nil
			for i := range l.Events {
				l.Events[i].Digests = l.Events[i].Digests[:1]
			}
		}, false, CheckStructure, "the log has no SHA-256 digests, only SHA-1"},

		{"no ExitBootServices", func(t *testing.T, l *boot.Log) { l.Events = l.Events[:42] }, true, "", ""},
		{"ExitBootServices left out of the log", func(t *testing.T, l *boot.Log) { l.Events = l.Events[:42] }, false, CheckReplay, "PCR 5 was quoted as"},
		{"ExitBootServices that never returned", func(t *testing.T, l *boot.Log) { l.Events = l.Events[:43] }, true, "", ""},
		{"ExitBootServices returned and wasn't called", func(t *testing.T, l *boot.Log) { remove(l, 42) }, true, "", ""},
		{"ExitBootServices called twice", func(t *testing.T, l *boot.Log) {
			insert(l, 42, exitEvent("Exit Boot Services Invocation"))
		}, true, "", ""},
		{"ExitBootServices done twice", func(t *testing.T, l *boot.Log) {
			l.Events = append(l.Events, l.Events[42:44]...)
		}, true, "", ""},
		{"ExitBootServices in the other order", func(t *testing.T, l *boot.Log) {
			l.Events[42], l.Events[43] = l.Events[43], l.Events[42]
		}, true, "", ""},
		{"ExitBootServices under another type", func(t *testing.T, l *boot.Log) { l.Events[42].Type = boot.IPL }, false, "", ""},
		{"ExitBootServices under other data", func(t *testing.T, l *boot.Log) {
			l.Events[42].Type, l.Events[42].Data = boot.IPL, []byte("x")
		}, false, "", ""},
		{"ExitBootServices in another PCR", func(t *testing.T, l *boot.Log) {
			insert(l, 42, event(4, boot.EFIAction, []byte("Exit Boot Services Invocation"), []byte("Exit Boot Services Invocation")))
		}, true, "", ""},
		{"ExitBootServices before the separator", func(t *testing.T, l *boot.Log) {
			i := at(t, l, 5, boot.Separator, 0)
			insert(l, i, l.Events[42:44]...)
		}, true, "", ""},
		{"something within ExitBootServices", func(t *testing.T, l *boot.Log) {
			insert(l, 43, event(5, boot.GPT, []byte("x"), []byte("x")))
		}, true, "", ""},
		{"an image after ExitBootServices", func(t *testing.T, l *boot.Log) {
			l.Events = append(l.Events, event(4, boot.BootServicesApplication, []byte("late"), nil))
		}, true, "", "more"},

		{"a start-up locality after PCR 0's first event", func(t *testing.T, l *boot.Log) {
			insert(l, 1, locality(0, 3))
		}, false, CheckReplay, "PCR 0 was quoted as"},
		{"a start-up locality of another PCR", func(t *testing.T, l *boot.Log) { insert(l, 0, locality(1, 3)) }, false, "", ""},
		{"two start-up localities", func(t *testing.T, l *boot.Log) { insert(l, 0, locality(0, 3), locality(0, 4)) }, false, CheckReplay, "PCR 0 was quoted as"},
		{"a start-up locality that is none", func(t *testing.T, l *boot.Log) { insert(l, 0, locality(0, 5)) }, false, "", ""},
		{"a start-up locality that wasn't", func(t *testing.T, l *boot.Log) { insert(l, 0, locality(0, 3)) }, false,
			CheckReplay, "PCR 0 was quoted as"},
		{"an empty log", func(t *testing.T, l *boot.Log) { l.Events = nil }, false, CheckReplay, "PCR 0 was quoted as"},
		{"an event of no such PCR", func(t *testing.T, l *boot.Log) {
			l.Events = append(l.Events, event(24, boot.IPL, empty, empty))
		}, false, CheckStructure, "its PCR is 0x18: a TPM has 24"},
	} {
		t.Run(a.name, func(t *testing.T) {
			log, pcrs := recorded(t, "clean")
			honest := accepted(t, log, pcrs)
			changed := parse(t, log)
			a.change(t, changed)
			if a.recompute {
				pcrs = recompute(changed, pcrs)
			}
			f, err := Appraise(changed.Encode(), nil, pcrs)
			if a.check != "" {
				rejected(t, err, a.check, a.detail)
				return
			}
			if err != nil {
				t.Fatalf("the log replays, and yet: %v", err)
			}
			lost := map[string]bool{ // and nothing else
				"secure boot": f.SecureBoot == nil && f.SecureBootMode == "" && f.Databases == nil && f.Authorities == nil && !f.Complete(pcrSecureBoot),
				"images":      componentsOf(f, pcrImages) == nil && !f.Complete(pcrImages), "command line": f.KernelCommandLine == nil && !f.LinesComplete,
			}
			for what, is := range lost {
				if is != (what == a.detail) {
					t.Errorf("%s: absent %v; %+v", what, is, f.PCRs)
				}
			}
			// A machine that really measured more shows more, and Secure Boot as it was.
			if a.detail == "more" {
				shown := func(f Facts) int { return len(f.Components) + len(f.Authorities) + len(f.SecureBootNotes) }
				if f.SecureBoot == nil || !*f.SecureBoot || shown(f) < shown(honest) {
					t.Errorf("something is hidden: %+v", f)
				}
				return
			}
			if wrong := falseFacts(honest, f); wrong != nil {
				t.Errorf("false facts: %q", wrong)
			}
		})
	}
}

func locality(pcr uint32, n byte) boot.Event {
	return boot.Event{PCR: pcr, Type: boot.NoAction, Data: append(bytes.Clone(startupLocality), n), Digests: []boot.Digest{
		{Algorithm: boot.SHA1, Value: make([]byte, 20)}, {Algorithm: boot.SHA256, Value: make([]byte, 32)},
	}}
}

// What looks odd and is no attack: padding, types that nobody knows, certificates
// that Go can't parse, a locality that was, an ExitBootServices that failed first.
func TestOddities(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	honest := accepted(t, log, pcrs)

	for _, fill := range []byte{0, 0xff} {
		padded := append(bytes.Clone(log), bytes.Repeat([]byte{fill}, 1000)...)
		if f := accepted(t, padded, pcrs); f.Asserted.Padding != 1000 || *f.KernelCommandLine != *honest.KernelCommandLine {
			t.Errorf("padding with %x: %+v", fill, f.Asserted)
		}
	}

	for name, change := range map[string]func(l *boot.Log){
		"unknown types": func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 3, event(0, 0x8401, []byte("x"), nil), event(1, 0x40e, []byte("y"), []byte("y")))
		},
		"a locality": func(l *boot.Log) { l.Events = slices.Insert(l.Events, 0, locality(0, 3)) },
		"ExitBootServices failed once": func(l *boot.Log) {
			failed := []byte("Exit Boot Services Returned with Failure")
			l.Events = slices.Insert(l.Events, 43, event(5, boot.EFIAction, failed, failed), l.Events[42])
		},
		"a bad certificate": func(l *boot.Log) {
			i := at(t, l, 7, boot.VariableDriverConfig, 3)
			bad := bytes.Clone(l.Events[i].Data)
			bad[200] ^= 0xff
			l.Events[i] = event(7, boot.VariableDriverConfig, bad, bad)
		},
	} {
		changed := parse(t, log)
		change(changed)
		f := accepted(t, changed.Encode(), recompute(changed, pcrs))
		if *f.SecureBoot != *honest.SecureBoot || *f.KernelCommandLine != *honest.KernelCommandLine || len(f.Databases["db"].Certificates) != 2 {
			t.Errorf("%s: other facts", name)
		}
		if name == "a bad certificate" && (f.Databases["db"].Certificates[0].Subject != "" || f.Databases["db"].Certificates[0].SHA256.IsZero()) {
			t.Errorf("the certificate is %+v", f.Databases["db"].Certificates[0])
		}
	}
}
