package appraise

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

const bootedWith = "/vmlinuz root=/dev/nvme0n1p2 rw console=ttyS0 ima_policy=tcb panic=-1 quiet init=/sbin/init"

// What root can do with GRUB's configuration before boot, with the TPM after it,
// and with the log at last, never makes the fact another command line than the
// kernel had. The PCRs are what the attack really leaves behind.
func TestCommandLineAttacks(t *testing.T) {
	const evil = "/vmlinuz root=/dev/nvme0n1p2 init=/evil"
	for _, a := range []struct {
		name   string
		change func(l *boot.Log)
	}{
		{"a line of grub.cfg that is no command, told as the kernel's", func(l *boot.Log) {
			l.Events[36] = grubCommand("linux "+evil, "grub_cmd: ")
			l.Events[40] = grubCommand(evil, "grub_cmd: ")
			l.Events = slices.Insert(l.Events, 41, grubCommand(bootedWith, "kernel_cmdline: "))
		}},
		{"the same, from a list of blocks", func(l *boot.Log) {
			l.Events[36] = grubCommand("linux 2048+9000 init=/evil", "grub_cmd: ")
			l.Events[40] = grubCommand("2048+9000 init=/evil", "grub_cmd: ")
			l.Events = slices.Insert(l.Events, 41, grubCommand(bootedWith, "kernel_cmdline: "))
		}},
		{"the kernel chain-loaded, the rest extended after boot", func(l *boot.Log) {
			l.Events[36] = grubCommand("chainloader "+evil, "grub_cmd: ")
			l.Events = append(l.Events, grubCommand("linux "+bootedWith, "grub_cmd: "))
		}},
		{"booted with systemd-boot, GRUB's texts extended after boot", func(l *boot.Log) {
			text := utf16Bytes(evil + "\x00")
			l.Events = slices.Insert(l.Events, 30, event(12, boot.IPL, text, text))
		}},
		{"the same, under a description", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 30, event(12, boot.IPL, utf16Bytes(evil+"\x00"), utf16Bytes("x\x00")))
		}},
		{"the same, closed as Windows does", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 30, event(12, boot.EventTag, utf16Bytes(evil+"\x00"), nil))
			l.Events = append(l.Events, event(12, boot.EventTag, []byte("WBCL"), nil))
		}},
		{"another one extended after boot", func(l *boot.Log) {
			l.Events = append(l.Events, grubCommand(evil, "kernel_cmdline: "))
		}},
		{"a kernel's relative path, told as a command", func(l *boot.Log) {
			l.Events[36] = grubCommand("linux vmlinuz init=/evil", "grub_cmd: ")
			l.Events[40] = grubCommand("vmlinuz init=/evil", "grub_cmd: ")
			l.Events = slices.Insert(l.Events, 41, grubCommand(bootedWith, "kernel_cmdline: "))
		}},
		{"a loader behind GRUB's negation, after a decoy", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 41, grubCommand("! chainloader "+evil, "grub_cmd: "))
		}},
		{"a kernel's relative path behind GRUB's negation", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 41, grubCommand("! linux echo init=/evil", "grub_cmd: "), grubCommand("echo init=/evil", "grub_cmd: "))
		}},
		{"a loader that is timed", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 41, grubCommand("time time chainloader "+evil, "grub_cmd: "))
		}},
		{"GRUB left behind its negation", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 41, grubCommand("! exit", "grub_cmd: "))
		}},
		{"the command line overwritten in memory", func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 41, grubCommand("write_dword 0x1000 0x6c697665", "grub_cmd: "))
		}},
		{"GRUB's text without its prefix", func(l *boot.Log) {
			l.Events[36] = event(8, boot.IPL, []byte("linux "+evil), []byte("linux "+evil))
			l.Events[40] = event(8, boot.IPL, []byte(evil), []byte(evil))
			l.Events = slices.Insert(l.Events, 41, grubCommand(bootedWith, "kernel_cmdline: "))
		}},
	} {
		t.Run(a.name, func(t *testing.T) {
			log, pcrs := recorded(t, "clean")
			if f := accepted(t, log, pcrs); *f.KernelCommandLine != bootedWith {
				t.Fatal("the unchanged log has another command line")
			}
			changed := parse(t, log)
			a.change(changed)
			f, err := Appraise(changed.Encode(), nil, recompute(changed, pcrs))
			if err != nil {
				t.Fatalf("the log is consistent, and yet: %v", err)
			}
			if f.KernelCommandLine != nil {
				t.Errorf("the command line is said to be %q", *f.KernelCommandLine)
			}
			if f.LinesComplete && !slices.ContainsFunc(f.KernelCommandLines, func(line string) bool { return strings.Contains(line, "/evil") }) {
				t.Errorf("these are said to be all: %q", f.KernelCommandLines)
			}
		})
	}
}

// Nor does leaving all of a PCR's events out of the log.
func TestCommandLineNeedsBothPCRs(t *testing.T) {
	const evil = "/vmlinuz init=/evil"
	log, pcrs := recorded(t, "clean")
	if f := accepted(t, log, pcrs); f.KernelCommandLine == nil {
		t.Fatal("the unchanged log has no command line")
	}
	// Booted with systemd-boot, which measured into PCR 12; GRUB's texts extended after.
	pcrs[12] = extend(pcrs[12], evidence.Sum(utf16Bytes(evil+"\x00")))
	if f := accepted(t, log, pcrs); f.KernelCommandLine != nil || !slices.Equal(f.PCRsUnexplained, []int{12}) {
		t.Errorf("the command line is said to be %q", *f.KernelCommandLine)
	}
	delete(pcrs, 12)
	if f := accepted(t, log, pcrs); f.KernelCommandLine != nil {
		t.Errorf("with PCR 12 not quoted it is said to be %q", *f.KernelCommandLine)
	}
}

// An image's digest is the hash of most of its bytes, so that its event can be
// given data that hash to it. It stays a component, whatever the event's type.
func TestImageDisguisedByItsPreimage(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	honest := accepted(t, log, pcrs)
	image := append([]byte("MZ\x90\x00"), bytes.Repeat([]byte("evil"), 100)...)
	for _, kind := range []boot.EventType{boot.EFIAction, boot.Action, 0x8401, boot.BootServicesApplication} {
		changed := parse(t, log)
		changed.Events = slices.Insert(changed.Events, 24, event(4, kind, image, image))
		f := accepted(t, changed.Encode(), recompute(changed, pcrs))
		if len(f.Components) != len(honest.Components)+1 {
			t.Errorf("%v hides an image", kind)
		}
	}
	// Shim's variables likewise: their content hashes to the digest.
	changed := parse(t, log)
	changed.Events = slices.Insert(changed.Events, 25, event(14, boot.IPL, []byte("key"), []byte("key")))
	if f := accepted(t, changed.Encode(), recompute(changed, pcrs)); len(f.MOK) != 4 {
		t.Error("a MOK is hidden")
	}
}

// What says that it is a command of GRUB, and isn't a loader, runs nothing else.
func TestCommandsAreSorted(t *testing.T) {
	for word := range commands {
		if meddling[word] || wrappers[word] {
			t.Errorf("%q is harmless, and isn't", word)
		}
	}
}

// kernels is how many a log of the largest size can name.
const kernels = 9000

// manyKernels is a log that names so many kernels, each in quotes.
func manyKernels(t testing.TB) ([]byte, map[int]evidence.Digest) {
	log, pcrs := recorded(t, "clean")
	l := parse(t, log)
	l.SpecID.Banks = slices.DeleteFunc(l.SpecID.Banks, func(b boot.Bank) bool { return b.Algorithm != boot.SHA256 })
	for i := range l.Events {
		l.Events[i].Digests = slices.DeleteFunc(l.Events[i].Digests, func(d boot.Digest) bool { return d.Algorithm != boot.SHA256 })
	}
	for i := range kernels {
		e := grubCommand(fmt.Sprintf("linux '%043d", i), "grub_cmd ")
		e.Digests = e.Digests[len(e.Digests)-1:]
		l.Events = append(l.Events, e)
	}
	return l.Encode(), recompute(l, pcrs)
}

// Each kernel that a log names is a candidate. How long that takes is
// BenchmarkKernels's subject: compared one by one they took a minute.
func TestManyKernels(t *testing.T) {
	log, pcrs := manyKernels(t)
	f, err := Appraise(log, nil, pcrs)
	if err != nil || len(f.KernelCommandLines) != kernels+1 || f.KernelCommandLine != nil {
		t.Errorf("%d command lines, %v", len(f.KernelCommandLines), err)
	}
}

// An event outside the firmware's PCRs that no reader could know is named, too.
func TestNotUnderstoodOutsideFirmware(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	control := utf16Bytes("root=/dev/sda1 \x01init=/evil\x00")
	open := utf16Bytes("root=/dev/sda1 init=/evil")
	for name, e := range map[string]boot.Event{
		"PCR 9, an unknown type":             event(9, 0xdead, []byte("x"), nil),
		"PCR 11, an unknown type":            event(11, 0xdead, []byte("x"), nil),
		"PCR 12, a line with a control code": event(12, boot.IPL, control, control),
		"PCR 12, a line without its end":     event(12, boot.IPL, open, open),
		"PCR 14, an unknown type":            event(14, 0xdead, []byte("x"), nil),
	} {
		l := parse(t, log)
		l.Events = append(l.Events, e)
		f, err := Appraise(l.Encode(), nil, recompute(l, pcrs))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		i := slices.IndexFunc(f.PCRs, func(p PCR) bool { return p.Index == int(e.PCR) })
		if p := f.PCRs[i]; !p.Proven || p.Understood || p.Limit == nil {
			t.Errorf("%s: %+v", name, p)
		}
	}
}
