package appraise

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// A mutant is a log with one change.
type mutant struct {
	what   string
	events []boot.Event
}

// otherTypes are what a mutant's event is called: one of each kind that a rule
// looks at, one that none does, and one of no specification.
var otherTypes = []boot.EventType{boot.NoAction, boot.Separator, boot.EFIAction, boot.CRTMVersion, 0x07, boot.IPL, boot.EventTag,
	boot.VariableDriverConfig, boot.VariableAuthority, boot.BootServicesApplication, boot.GPT, 0x8401}

// mutants calls f for each change of one event: dropped, doubled, swapped with the
// next of the log and of its PCR, retyped, moved to another PCR, and its digest and
// data flipped, cut, lengthened and exchanged.
func mutants(events []boot.Event, i int, f func(mutant)) {
	e := events[i]
	change := func(what string, edit func(e *boot.Event)) {
		changed := slices.Clone(events)
		edit(&changed[i])
		f(mutant{fmt.Sprintf("event %d %s", e.Number, what), changed})
	}

	f(mutant{fmt.Sprintf("event %d dropped", e.Number), slices.Delete(slices.Clone(events), i, i+1)})
	f(mutant{fmt.Sprintf("event %d doubled", e.Number), slices.Insert(slices.Clone(events), i, e)})
	f(mutant{fmt.Sprintf("cut before event %d", e.Number), events[:i]})
	samePCR := slices.IndexFunc(events[i+1:], func(o boot.Event) bool { return o.PCR == e.PCR }) + i + 1
	for _, j := range []int{i + 1, samePCR} {
		if j > i && j < len(events) {
			swapped := slices.Clone(events)
			swapped[i], swapped[j] = swapped[j], swapped[i]
			f(mutant{fmt.Sprintf("event %d swapped with %d", e.Number, j), swapped})
			change(fmt.Sprintf("with the data of %d", j), func(e *boot.Event) { e.Data = events[j].Data })
		}
	}
	for n, kind := range otherTypes {
		change(fmt.Sprintf("called %s", kind), func(e *boot.Event) { e.Type = kind })
		if (n+i)%4 != 0 {
			continue
		}
		change(fmt.Sprintf("called %s, with other data", kind), func(e *boot.Event) { e.Type, e.Data = kind, append(bytes.Clone(e.Data), 1, 2) })
	}
	for _, pcr := range []uint32{0, 1, 4, 7, 8, 10, 12, 14, 16, 23} {
		change(fmt.Sprintf("moved to PCR %d", pcr), func(e *boot.Event) { e.PCR = pcr })
	}
	change("with a flipped digest", func(e *boot.Event) {
		e.Digests = slices.Clone(e.Digests)
		for j, d := range e.Digests {
			if d.Algorithm == boot.SHA256 {
				e.Digests[j].Value = bytes.Clone(d.Value)
				e.Digests[j].Value[7] ^= 4
			}
		}
	})
	change("without data", func(e *boot.Event) { e.Data = nil })
	for _, more := range []int{1, 5, 6} {
		change(fmt.Sprintf("with %d bytes more", more), func(e *boot.Event) { e.Data = append(bytes.Clone(e.Data), make([]byte, more)...) })
		if more <= len(e.Data) {
			change(fmt.Sprintf("with %d bytes less", more), func(e *boot.Event) { e.Data = e.Data[:len(e.Data)-more] })
		}
	}
	step := max(1, len(e.Data)/4)
	for at := 0; at < len(e.Data); at += step {
		change(fmt.Sprintf("with a flip at %d", at), func(e *boot.Event) { e.Data = bytes.Clone(e.Data); e.Data[at] ^= 1 << (at % 8) })
	}
}

// With the PCR values fixed, whatever a log is changed to: it is refused, or each
// fact is equal or absent.
func TestMutants(t *testing.T) {
	list := machines(t, "logs")
	for _, fixture := range []string{"clean", "direct-kernel"} {
		log, pcrs := recorded(t, fixture)
		list = append(list, machine{name: fixture, log: log, pcrs: pcrs})
	}
	for name, l := range map[string]*boot.Log{"made here": plain(), "made here, with odd events": odd()} {
		list = append(list, machine{name: name, log: l.Encode(), pcrs: recompute(l, map[int]evidence.Digest{12: {}, 13: {}, 14: {}})})
	}

	var tried, replayed atomic.Int64
	for _, m := range list {
		t.Run(m.name, func(t *testing.T) {
			honest := accepted(t, m.log, m.pcrs)
			events := parse(t, m.log).Events
			everywhere(len(events), func(i int) {
				if i%mutantStride != 0 || testing.Short() && i%sample != 0 {
					return
				}
				if pcr := events[i].PCR; (pcr == pcrGRUB || pcr == pcrFiles) && i%10 != 0 {
					return // GRUB measures dozens of one kind
				}
				log := parse(t, m.log)
				mutants(events, i, func(c mutant) {
					tried.Add(1)
					log.Events = c.events
					f, err := Appraise(log.Encode(), nil, m.pcrs)
					if err != nil {
						if evidence.CheckOf(err) == "" {
							t.Errorf("%s: %v is no rejection", c.what, err)
						}
						return
					}
					replayed.Add(1)
					if wrong := falseFacts(honest, f); wrong != nil {
						t.Errorf("%s: false facts %q", c.what, wrong)
					}
				})
			})
		})
	}
	t.Logf("%d mutants of %d logs, of which %d replay", tried.Load(), len(list), replayed.Load())
	if replayed.Load() == 0 {
		t.Error("no mutant replays")
	}
}

// odd is the plain boot with some of what real firmware adds to it.
func odd() *boot.Log {
	l := plain()
	both := func(pcr uint32, kind boot.EventType, data []byte) boot.Event { return event(pcr, kind, data, data) }
	shim := append(variableData(guidShim, "Shim", []byte("certificate")), 0, 0, 0, 0, 0, 0xaf)
	sbat := variableData(guidShim, "SbatLevel", []byte("sbat,1\n"))
	late := []boot.Event{
		event(1, 0x80000009, []byte("tables"), make([]byte, 32)),
		both(7, boot.EFIAction, []byte("DMA Protection Disabled")),
		both(7, boot.EFIAction, []byte("Security Level 0")),
		event(7, boot.VariableAuthority, shim[:len(shim)-1], shim),
		both(7, boot.VariableAuthority, sbat),
		event(4, boot.EFIAction, []byte("Booting from disk"), []byte("Booting from disk\x00")),
		event(14, boot.IPL, []byte("key"), []byte("MokList\x00")),
	}
	events := slices.Insert(l.Events, len(l.Events)-2, late...)
	return number(slices.Insert(events, 0, locality(0, 3), event(0, 0x07, []byte("acm"), []byte("Boot Guard Measured S-CRTM\x00"))), l)
}

// secureBootOff is the plain boot with Secure Boot off.
func secureBootOff(t *testing.T) (l *boot.Log, state int) {
	l = plain()
	state = at(t, l, 7, boot.VariableDriverConfig, 0)
	data := variableData(guidGlobal, "SecureBoot", []byte{0})
	l.Events[state] = event(7, boot.VariableDriverConfig, data, data)
	return l, state
}

// A machine that booted without Secure Boot is never presented as one that had it,
// whatever root writes into the log, and whatever it extends after boot.
func TestSecureBootOffPresentedAsOn(t *testing.T) {
	on := variableData(guidGlobal, "SecureBoot", []byte{1})
	event1 := event(7, boot.VariableDriverConfig, on, on)
	separator := event(7, boot.Separator, make([]byte, 4), make([]byte, 4))
	for name, attack := range map[string]struct {
		extended []boot.Event // by root, after boot
		rewrite  func(l *boot.Log, state int)
	}{
		"other data":            {nil, func(l *boot.Log, i int) { l.Events[i].Data = on }},
		"other data and type":   {nil, func(l *boot.Log, i int) { l.Events[i].Data, l.Events[i].Type = on, boot.IPL }},
		"hidden":                {nil, func(l *boot.Log, i int) { l.Events[i].Data, l.Events[i].Type = nil, 0x8401 }},
		"left out":              {nil, func(l *boot.Log, i int) { l.Events = slices.Delete(l.Events, i, i+1) }},
		"another one beside it": {nil, func(l *boot.Log, i int) { l.Events = slices.Insert(l.Events, i, event1) }},
		"an event that is never extended": {nil, func(l *boot.Log, i int) {
			e := event1
			e.Type = boot.NoAction
			l.Events[i].Data, l.Events = nil, slices.Insert(l.Events, i, e)
		}},
		"measured on, after boot":             {[]boot.Event{event1}, func(*boot.Log, int) {}},
		"the same, and hidden":                {[]boot.Event{event1}, func(l *boot.Log, i int) { l.Events[i].Data = nil }},
		"measured on, before a new separator": {[]boot.Event{event1, separator}, func(l *boot.Log, i int) { l.Events[i].Data = nil }},
		"a separator that calls itself otherwise": {[]boot.Event{event1, separator}, func(l *boot.Log, i int) {
			l.Events[i].Data = nil
			s := slices.IndexFunc(l.Events, func(e boot.Event) bool { return e.PCR == 7 && e.Type == boot.Separator })
			l.Events[s].Type, l.Events[s].Data = boot.EFIAction, []byte("x")
		}},
		"a whole boot's measurements again": {slices.DeleteFunc(plain().Events, func(e boot.Event) bool { return e.PCR != 7 }), func(l *boot.Log, i int) {
			l.Events = slices.DeleteFunc(l.Events, func(e boot.Event) bool { return e.PCR == 7 && e.Number != 0 && e.Number <= i+5 })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l, state := secureBootOff(t)
			if f := appraised(t, l); f.SecureBoot == nil || *f.SecureBoot {
				t.Fatalf("the unchanged log: %v", f.SecureBoot)
			}
			l.Events = append(l.Events, attack.extended...)
			pcrs := recompute(l, nil)
			attack.rewrite(l, state)
			if f, err := Appraise(l.Encode(), nil, pcrs); err == nil && f.SecureBoot != nil && *f.SecureBoot {
				t.Error("Secure Boot is said to be on")
			}
		})
	}
}

// What verified an image is in the list, or there is no list.
func TestHiddenAuthority(t *testing.T) {
	evil := variableData(guidShim, "MokList", []byte("evil"))
	trail := append(bytes.Clone(evil), 0, 0, 0, 0, 0)
	for name, measured := range map[string][]byte{"plain": evil, "with shim's trail": trail} {
		for what, rewrite := range map[string]func(l *boot.Log, i int){
			"unchanged":    func(*boot.Log, int) {},
			"without data": func(l *boot.Log, i int) { l.Events[i].Data = nil },
			"a byte less":  func(l *boot.Log, i int) { l.Events[i].Data = l.Events[i].Data[:len(l.Events[i].Data)-1] },
			"a byte more":  func(l *boot.Log, i int) { l.Events[i].Data = append(bytes.Clone(l.Events[i].Data), 'x') },
			"a text": func(l *boot.Log, i int) {
				l.Events[i].Type, l.Events[i].Data = boot.EFIAction, []byte("DMA Protection Disabled")
			},
			"a separator":       func(l *boot.Log, i int) { l.Events[i].Type, l.Events[i].Data = boot.Separator, make([]byte, 4) },
			"another variable":  func(l *boot.Log, i int) { l.Events[i].Data = l.Events[i-1].Data },
			"never extended":    func(l *boot.Log, i int) { l.Events[i].Type = boot.NoAction },
			"left out":          func(l *boot.Log, i int) { l.Events = slices.Delete(l.Events, i, i+1) },
			"of IMA's PCR":      func(l *boot.Log, i int) { l.Events[i].PCR = pcrIMA },
			"of the debug PCR":  func(l *boot.Log, i int) { l.Events[i].PCR = 16 },
			"without a SHA-256": func(l *boot.Log, i int) { l.Events[i].Digests = l.Events[i].Digests[:1] },
		} {
			l := plain()
			i := at(t, l, 7, boot.VariableAuthority, 0) + 1
			l.Events = slices.Insert(l.Events, i, event(7, boot.VariableAuthority, measured, measured))
			pcrs := recompute(l, nil)
			digest := evidence.Sum(measured)
			rewrite(l, i)
			f, err := Appraise(l.Encode(), nil, pcrs)
			if err != nil {
				continue
			}
			listed := slices.ContainsFunc(f.Authorities, func(a Authority) bool { return a.SHA256 == digest })
			if !listed && (f.Authorities != nil || f.Complete(pcrSecureBoot)) {
				t.Errorf("%s, %s: hidden among %+v", name, what, f.Authorities)
			}
			if f.SecureBoot == nil || !*f.SecureBoot {
				t.Errorf("%s, %s: Secure Boot's state was lost: %+v", name, what, f.PCRs)
			}
		}
	}
}

// A kernel whose file has the name of a command is no command.
func TestDecoyKernels(t *testing.T) {
	const decoy = "/vmlinuz root=/dev/sda1 ro"
	for _, kernel := range []string{"echo", "set", "a=b", "linux", "menuentry", "[", "(http)echo"} {
		for _, command := range []string{"linux ", "linuxefi ", "linux16 "} {
			for _, prefix := range []string{"grub_cmd: ", "grub_cmd ", "kernel_cmdline: "} {
				line := kernel + " init=/evil"
				l := plain()
				i := at(t, l, 8, boot.IPL, 1) // linux, and what the kernel gets two events later
				l.Events[i] = grubCommand(command+line, "grub_cmd: ")
				l.Events[i+2] = grubCommand(line, prefix)
				l.Events = slices.Insert(l.Events, i+3, grubCommand(decoy, "kernel_cmdline: "))
				f := appraised(t, l)
				if f.KernelCommandLine != nil {
					t.Errorf("%s%s as %q: the command line is said to be %q", command, line, prefix, *f.KernelCommandLine)
				}
				if f.LinesComplete && !slices.ContainsFunc(f.KernelCommandLines, func(l string) bool { return strings.Contains(l, "/evil") }) {
					t.Errorf("%s%s as %q: these are said to be all: %q", command, line, prefix, f.KernelCommandLines)
				}
			}
		}
	}
	// A line that was quoted is one line; two that GRUB was given are not.
	l := plain()
	i := at(t, l, 8, boot.IPL, 1)
	l.Events[i] = grubCommand(`linux /vmlinuz dm="1 vroot none"`, "grub_cmd: ")
	l.Events[i+2] = grubCommand(`/vmlinuz "dm=\"1 vroot none\""`, "kernel_cmdline: ")
	if f := appraised(t, l); f.KernelCommandLine == nil || *f.KernelCommandLine != `/vmlinuz "dm=\"1 vroot none\""` {
		t.Errorf("a quoted line: %q", f.KernelCommandLines)
	}
	l.Events = slices.Insert(l.Events, i, grubCommand("linux /vmlinuz.old quiet", "grub_cmd: "))
	if f := appraised(t, l); f.KernelCommandLine != nil || len(f.KernelCommandLines) != 2 {
		t.Errorf("two kernels: %q", f.KernelCommandLines)
	}
}
