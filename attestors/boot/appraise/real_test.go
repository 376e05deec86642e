package appraise

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
	tpm "github.com/countersign/countersign/attestors/tpm/appraise"
)

// A machine is a log of real or made-up firmware, with its PCR values and, for a
// real one, what independent parsers say of it.
type machine struct {
	name string
	log  []byte
	pcrs map[int]evidence.Digest
	want struct {
		Events     int      `json:"events"`
		SecureBoot *string  `json:"secure_boot_variable"` // hex; nil where none was measured
		Images     []string `json:"pcr4_images"`
		Lines      []string `json:"kernel_command_lines"`
	}
}

// machines reads the logs of a folder beside the repository; without it, none.
func machines(t testing.TB, folder string) (list []machine) {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join("../../../../shared/fixtures", folder, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		m := machine{name: filepath.Base(dir)}
		if m.log, err = os.ReadFile(filepath.Join(dir, "binary_bios_measurements")); err != nil {
			continue // a README
		}
		text, err := os.ReadFile(filepath.Join(dir, "pcrs.txt"))
		if err != nil {
			t.Fatal(err)
		}
		if m.pcrs, err = tpm.ParsePCRRead(string(text)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "expected.json")); err == nil {
			if err := json.Unmarshal(b, &m.want); err != nil {
				t.Fatal(err)
			}
		}
		list = append(list, m)
	}
	return list
}

// images are PCR 4's, in hex.
func images(f Facts) (list []string) {
	for _, c := range componentsOf(f, pcrImages) {
		list = append(list, c.SHA256.String())
	}
	return list
}

// Logs that nobody here wrote: every PCR that was given is proven, and the facts
// are what other parsers say.
func TestRealMachines(t *testing.T) {
	list := machines(t, "logs")
	lines := 0
	for _, m := range list {
		t.Run(m.name, func(t *testing.T) {
			f := accepted(t, m.log, m.pcrs)
			for pcr := range m.pcrs {
				if pcr != pcrIMA && !f.proven(pcr) { // IMA's is proven by its own list
					t.Errorf("PCR %d isn't proven", pcr)
				}
			}
			if n := len(parse(t, m.log).Events); n != m.want.Events {
				t.Errorf("%d events, not %d", n, m.want.Events)
			}
			if w := m.want.SecureBoot; w == nil && f.SecureBoot != nil || w != nil && (f.SecureBoot == nil || *f.SecureBoot != (*w == "01")) {
				t.Errorf("secure boot %v, want %v: %+v", f.SecureBoot, w, f.PCRs)
			}
			if !slices.Equal(images(f), m.want.Images) {
				t.Errorf("images %q, want %q", images(f), m.want.Images)
			}
			if f.FirmwareVersion == nil {
				t.Error("no firmware version")
			}

			// What no event extended wasn't listed; the machine had PCR 12 unused.
			pcrs := maps.Clone(m.pcrs)
			if _, given := pcrs[pcrConfig]; !given {
				pcrs[pcrConfig] = evidence.Digest{}
			}
			if f := accepted(t, m.log, pcrs); f.KernelCommandLine != nil && len(m.want.Lines) > 0 {
				if lines++; unquoted(*f.KernelCommandLine) != unquoted(m.want.Lines[0]) {
					t.Errorf("command line %q, want %q", *f.KernelCommandLine, m.want.Lines)
				}
			} else if len(f.KernelCommandLines) > 1 && slices.Contains(f.KernelCommandLines, m.want.Lines[0]) {
				t.Logf("not known which of %q", f.KernelCommandLines) // GRUB tried a kernel that failed
			} else if len(m.want.Lines) == 1 {
				t.Errorf("no command line of %d: complete %v; %+v", len(f.KernelCommandLines), f.LinesComplete, f.PCRs)
			}
		})
	}
	t.Logf("%d logs, %d with the kernel's command line", len(list), lines)
}

// The small logs of one odd class each.
func TestSyntheticMachines(t *testing.T) {
	for _, m := range machines(t, "logs-synthetic") {
		t.Run(m.name, func(t *testing.T) {
			f := accepted(t, m.log, m.pcrs)
			for pcr := range m.pcrs {
				if !f.proven(pcr) {
					t.Errorf("PCR %d isn't proven", pcr)
				}
			}
			if f.SecureBoot == nil || !*f.SecureBoot || len(images(f)) != 1 {
				t.Errorf("secure boot %v, images %v", f.SecureBoot, images(f))
			}
			if (f.FirmwareVersion == nil) != (m.name == "crtm-version-digest-not-of-data") {
				t.Errorf("firmware version %v", f.FirmwareVersion)
			}
			policies := map[string]DEPPolicy{"windows-dep-0-optin": DEPOptIn, "windows-dep-1-optout": DEPOptOut, "windows-dep-2-alwaysoff": DEPAlwaysOff}
			if want := policies[m.name]; want != "" && (f.Windows == nil || f.Windows.DEPPolicy != want || *f.Windows.DEP != (want == DEPOptOut)) {
				t.Errorf("%+v", f.Windows)
			}
			for _, class := range []string{"control", "cos-gptpriority", "grub-cmd-without-colon-rhel-8", "same-line-twice-in-pcr12"} {
				if m.name == class && f.KernelCommandLine == nil {
					t.Errorf("no command line of %q", f.KernelCommandLines)
				}
			}
		})
	}
}

// plain is a boot as the specifications have it, made here: firmware, one image
// that db verified, GRUB with one kernel.
func plain() *boot.Log {
	text := func(pcr uint32, kind boot.EventType, s string) boot.Event {
		return event(pcr, kind, []byte(s), []byte(s))
	}
	certificate := append([]byte{0x30, 0x82, 0, 60}, make([]byte, 60)...)
	list := slices.Concat(guidX509[:], []byte{28 + 16 + 64, 0, 0, 0, 0, 0, 0, 0, 16 + 64, 0, 0, 0}, make([]byte, 16), certificate)

	version := utf16Bytes("v1\x00")
	l := &boot.Log{SpecID: &boot.SpecID{Major: 2, UintnSize: 2, Banks: []boot.Bank{{Algorithm: boot.SHA1, Size: 20}, {Algorithm: boot.SHA256, Size: 32}}}}
	l.Events = append(l.Events, event(0, boot.CRTMVersion, version, version), event(0, 0x80000008, []byte("blob"), make([]byte, 16)))
	for _, v := range []struct {
		guid [16]byte
		name string
		data []byte
	}{{guidGlobal, "SecureBoot", []byte{1}}, {guidGlobal, "PK", list}, {guidGlobal, "KEK", list}, {guidSecurity, "db", list}, {guidSecurity, "dbx", nil}} {
		data := variableData(v.guid, v.name, v.data)
		l.Events = append(l.Events, event(7, boot.VariableDriverConfig, data, data))
	}
	l.Events = append(l.Events, text(4, boot.EFIAction, "Calling EFI Application from Boot Option"))
	for pcr := range uint32(firmwarePCRs) {
		l.Events = append(l.Events, text(pcr, boot.Separator, "\x00\x00\x00\x00"))
	}
	authority := variableData(guidSecurity, "db", append(make([]byte, 16), certificate...))
	return number(append(l.Events,
		event(7, boot.VariableAuthority, authority, authority),
		event(4, boot.BootServicesApplication, []byte("image"), make([]byte, 32)),
		grubCommand("set timeout=0", "grub_cmd: "),
		grubCommand("linux /vmlinuz root=/dev/sda1 ro", "grub_cmd: "),
		event(9, boot.IPL, []byte("kernel"), []byte("/vmlinuz\x00")),
		grubCommand("/vmlinuz root=/dev/sda1 ro", "kernel_cmdline: "),
		text(5, boot.EFIAction, "Exit Boot Services Invocation"),
		text(5, boot.EFIAction, "Exit Boot Services Returned with Success"),
	), l)
}

// number gives events their places, as the parser does.
func number(events []boot.Event, l *boot.Log) *boot.Log {
	for i := range events {
		events[i].Number = i + 1
	}
	l.Events = events
	return l
}

// variableData is a UEFI_VARIABLE_DATA.
func variableData(guid [16]byte, name string, content []byte) []byte {
	wide := utf16Bytes(name)
	header := append(guid[:], byte(len(name)), 0, 0, 0, 0, 0, 0, 0, byte(len(content)), byte(len(content)>>8), 0, 0, 0, 0, 0, 0)
	return slices.Concat(header, wide, content)
}

// appraised is what a machine that really measured so would be told.
func appraised(t testing.TB, l *boot.Log) Facts {
	t.Helper()
	all := map[int]evidence.Digest{}
	for pcr := range 16 {
		all[pcr] = evidence.Digest{}
	}
	return accepted(t, l.Encode(), recompute(l, all))
}

// What real firmware was seen to do, each on top of the plain boot. facts are
// those of the plain boot but for what the class names.
func TestOddFirmware(t *testing.T) {
	first := func(l *boot.Log, pcr uint32, kind boot.EventType) int { return at(t, l, pcr, kind, 0) }
	late := func(e ...boot.Event) func(l *boot.Log) { // behind the separators
		return func(l *boot.Log) { l.Events = slices.Insert(l.Events, first(l, 7, boot.VariableAuthority), e...) }
	}
	both := func(pcr uint32, kind boot.EventType, data []byte) boot.Event { return event(pcr, kind, data, data) }
	opaque := func(pcr uint32, kind boot.EventType) boot.Event {
		return event(pcr, kind, []byte("blob"), make([]byte, 32))
	}
	same := func(*Facts) {}

	for name, c := range map[string]struct {
		change func(l *boot.Log)
		want   func(f *Facts) // what it does to the plain boot's facts
	}{
		"handoff tables behind PCR 1's separator": {late(opaque(1, 0x80000009)), same},
		"handoff tables 2 behind it":              {late(opaque(1, 0x8000000B)), same},
		"DeployedMode behind it":                  {late(both(1, boot.VariableDriverConfig, variableData(guidGlobal, "DeployedMode", []byte{1}))), same},
		"platform config flags behind it":         {late(both(1, 0x0A, []byte("FeatureTME=0"))), same},
		"no ExitBootServices":                     {func(l *boot.Log) { l.Events = l.Events[:len(l.Events)-2] }, same},
		"the first invocation missing":            {func(l *boot.Log) { l.Events = slices.Delete(l.Events, len(l.Events)-2, len(l.Events)-1) }, same},
		"BootOrder 0001,0000 by its content":      {late(event(1, boot.VariableBoot, []byte{1, 0, 0, 0}, variableData(guidGlobal, "BootOrder", []byte{1, 0, 0, 0}))), same},
		"a FIT entry with a separator's digest": {func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, 1, event(0, 0x07, make([]byte, 4), []byte("FIT")))
		}, same},
		"an event of no specification":                {late(both(0, 0x40e, []byte("x"))), same},
		"a PCR 7 that ends in firmware's own failure": {func(l *boot.Log) { l.Events[first(l, 7, boot.Separator)] = both(7, boot.Separator, []byte{1, 0, 0, 0}) }, noSecureBoot},
		"a PCR 7 without a separator":                 {func(l *boot.Log) { i := first(l, 7, boot.Separator); l.Events = slices.Delete(l.Events, i, i+1) }, noSecureBoot},
		"a variable that can't be read before it":     {func(l *boot.Log) { l.Events = slices.Insert(l.Events, 3, opaque(7, boot.VariableDriverConfig)) }, noSecureBoot},
		"an authority that can't be read behind it":   {late(opaque(7, boot.VariableAuthority)), func(f *Facts) { f.Authorities = nil }},
		"DMA protection disabled, behind it":          {late(both(7, boot.EFIAction, []byte("DMA Protection Disabled"))), func(f *Facts) { f.SecureBootNotes = []string{"DMA Protection Disabled"} }},
		"bytes that are no variable behind it": {late(both(7, boot.VariableAuthority, []byte{1, 2, 3})), func(f *Facts) {
			f.Authorities = slices.Insert(f.Authorities, 0, Authority{SHA256: evidence.Sum([]byte{1, 2, 3})})
		}},
		"bytes that are no variable before it": {func(l *boot.Log) { l.Events = slices.Insert(l.Events, 3, both(7, 0x0A, []byte{1, 2, 3})) }, func(f *Facts) {
			f.SecureBootNotes = []string{"sha256:" + evidence.Sum([]byte{1, 2, 3}).String()}
		}},
		"a vendor's own text behind it":        {late(both(7, boot.EFIAction, []byte("Security Level 0"))), func(f *Facts) { f.SecureBootNotes = []string{"Security Level 0"} }},
		"S_CRTM_VERSION of other data":         {func(l *boot.Log) { l.Events[0] = opaque(0, boot.CRTMVersion) }, func(f *Facts) { f.FirmwareVersion = nil }},
		"S_CRTM_CONTENTS first":                {func(l *boot.Log) { l.Events = slices.Insert(l.Events, 0, opaque(0, 0x07)) }, same},
		"S_CRTM_CONTENTS first, by a locality": {func(l *boot.Log) { l.Events = slices.Insert(l.Events, 0, locality(0, 3), opaque(0, 0x07)) }, same},
		"GRUB's commands without a colon, with a NUL": {func(l *boot.Log) {
			i := first(l, 8, boot.IPL)
			l.Events[i] = event(8, boot.IPL, []byte("set timeout=0\x00"), []byte("grub_cmd set timeout=0\x00"))
		}, same},
		"a message of PCR 4 with its NUL left out": {late(event(4, boot.EFIAction, []byte("Booting from disk"), []byte("Booting from disk\x00"))), same},
		"an action of PCR 4 that can't be read": {late(opaque(4, boot.EFIAction)), func(f *Facts) {
			f.Components = slices.DeleteFunc(f.Components, func(c Component) bool { return c.PCR == 4 })
		}},
		"a driver behind PCR 2's separator": {late(opaque(2, boot.BootServicesDriver)), func(f *Facts) {
			f.Components = append([]Component{{2, KindDriver, evidence.Sum([]byte("blob"))}}, f.Components...)
		}},
		"all separators twice": {func(l *boot.Log) {
			i := first(l, 0, boot.Separator)
			l.Events = slices.Insert(l.Events, i+firmwarePCRs, slices.Clone(l.Events[i:i+firmwarePCRs])...)
		}, same},
		"shim's authority, with its trail": {func(l *boot.Log) {
			i := first(l, 7, boot.VariableAuthority)
			data := append(slices.Clone(l.Events[i].Data), 0, 0, 0, 0, 0, 0xaf)
			l.Events[i] = event(7, boot.VariableAuthority, data[:len(data)-1], data)
		}, func(f *Facts) {
			data := append(variableData(guidSecurity, "db", append(make([]byte, 16), append([]byte{0x30, 0x82, 0, 60}, make([]byte, 60)...)...)), 0, 0, 0, 0, 0)
			f.Authorities[0].SHA256 = evidence.Sum(data)
		}},
		"MokList as driver configuration": {late(both(7, boot.VariableDriverConfig, variableData(guidShim, "MokList", []byte{1}))), func(f *Facts) {
			f.Authorities = slices.Insert(f.Authorities, 0, Authority{Variable: "MokList", SHA256: evidence.Sum(variableData(guidShim, "MokList", []byte{1}))})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want := appraised(t, plain())
			if want.SecureBoot == nil || !*want.SecureBoot || want.SecureBootMode != "user" || len(want.Authorities) != 1 || want.KernelCommandLine == nil || len(images(want)) != 1 {
				t.Fatalf("the plain boot: %+v", want)
			}
			c.want(&want)
			l := plain()
			c.change(l)
			f := appraised(t, l)
			if got, want := shownFacts(f), shownFacts(want); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func noSecureBoot(f *Facts) {
	f.SecureBoot, f.SecureBootMode, f.Databases, f.Authorities = nil, "", nil, nil
}

// shownFacts is what policy can know of facts.
func shownFacts(f Facts) string {
	f.Asserted, f.PCRs = Asserted{}, nil
	b, err := json.Marshal(f)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Windows' numbers are what Windows means by them: not every one that isn't 0 is on.
func TestWindowsNumbers(t *testing.T) {
	for _, c := range []struct {
		kind   uint32
		values []uint64
		want   string
	}{
		{sipaDEP, []uint64{0}, `"dep":false,"dep_policy":"opt-in"`},
		{sipaDEP, []uint64{1, 1}, `"dep":true,"dep_policy":"opt-out"`},
		{sipaDEP, []uint64{2}, `"dep":false,"dep_policy":"always-off"`},
		{sipaDEP, []uint64{3}, `"dep":true,"dep_policy":"always-on"`},
		{sipaDEP, []uint64{4}, ""}, {sipaDEP, []uint64{1, 2}, ""}, {sipaDEP, []uint64{1 << 32}, ""},
		{sipaCodeIntegrity, []uint64{1}, `"code_integrity":true`}, {sipaCodeIntegrity, []uint64{1, 0}, `"code_integrity":false`},
		{sipaVSMLaunch, []uint64{1}, `"vbs":true`}, {sipaVSMLaunch, []uint64{0}, `"vbs":false`}, {sipaVSMLaunch, []uint64{2}, ""},
		{sipaHVCI, []uint64{1}, `"hvci":true`}, {sipaHVCI, []uint64{1, 3}, ""},
	} {
		l := plain()
		var late []boot.Event
		for _, n := range c.values {
			data := binary.LittleEndian.AppendUint64(append(binary.LittleEndian.AppendUint32(nil, c.kind), 8, 0, 0, 0), n)
			late = append(late, event(12, boot.EventTag, data, data))
		}
		for _, pcr := range []uint32{12, 13} {
			late = append(late, event(pcr, boot.Separator, []byte("WBCL"), []byte("WBCL")))
		}
		l.Events = append(l.Events, late...)
		f := appraised(t, l)
		b, err := json.Marshal(f.Windows)
		if err != nil || f.Windows == nil {
			t.Fatalf("%x: %+v, %v", c.kind, f.PCRs, err)
		}
		known := strings.Contains(string(b), `"dep`) || strings.Contains(string(b), `"code_`) || strings.Contains(string(b), `"vbs"`) || strings.Contains(string(b), `"hvci"`)
		if !strings.Contains(string(b), c.want) || known != (c.want != "") {
			t.Errorf("%x %v: %s", c.kind, c.values, b)
		}
	}
}

// Where go-attestation reads a real log too, it sees the same events and the same
// state of Secure Boot. Every difference is in docs/MACHINE_STATE.md.
func TestRealMachinesAgainstGoAttestation(t *testing.T) {
	differs := map[string]string{ // how its error begins
		"intel-secl-uefi-event-log":                        "unknown algorithm ID ffff",
		"guard-oss-test-HP-EliteBook-830-G6-add-mokx":      "event 12: unexpected EFI action event",
		"guard-oss-test-before":                            "event 12: unexpected EFI action event",
		"guard-oss-test-update":                            "event 12: unexpected EFI action event",
		"ibmtss-ideapad1":                                  "event 3: failed parsing platform keys",
		"tpm2-tools-event-arch-linux":                      "event 3: SecureBoot data len is 0",
		"tpm2-tools-event-sd-boot-fedora37":                "event 4: SecureBoot data len is 0",
		"guard-oss-IMN-SUPERMICRO-EPP-MSDefender.evidence": "off", // no variable was measured: nothing is known
	}
	for _, m := range machines(t, "logs") {
		f := accepted(t, m.log, m.pcrs)
		state, err := func() (*attest.SecurebootState, error) {
			theirs, err := attest.ParseEventLog(m.log)
			if err != nil {
				return nil, err
			}
			if !sameEvents(parse(t, m.log).Events, theirs.Events(attest.HashSHA256)) {
				t.Errorf("%s: other events", m.name)
			}
			events, err := theirs.Verify(attestPCRs(m.pcrs))
			if err != nil {
				return nil, err
			}
			return attest.ParseSecurebootState(events)
		}()
		why, expected := differs[m.name]
		switch {
		case err != nil && (!expected || !strings.HasPrefix(err.Error(), why)):
			t.Errorf("%s: go-attestation: %v", m.name, err)
		case err == nil && f.SecureBoot == nil && !expected, err == nil && f.SecureBoot != nil && *f.SecureBoot != state.Enabled:
			t.Errorf("%s: go-attestation says %v, we %v", m.name, state.Enabled, f.SecureBoot)
		case err == nil && expected && f.SecureBoot != nil:
			t.Errorf("%s: no difference any more", m.name)
		}
	}
}

// Where tpm2_eventlog reads a real log too, it sees the same events, and computes
// PCRs that the appraisal takes. Every difference is in docs/MACHINE_STATE.md.
func TestRealMachinesAgainstTPM2Tools(t *testing.T) {
	unread := []string{ // by Debian 12's version 5.4
		"guard-oss-IMN-SUPERMICRO-EPP-MSDefender.evidence", "guard-oss-tpm2-windows-lenovo-yogax1v2", "ibmtss-ideapad1", "intel-secl-uefi-event-log",
	}
	for _, m := range machines(t, "logs") {
		theirs, pcrs, err := tpm2EventLog(t, m.log)
		if expected := slices.Contains(unread, m.name); (err != nil) != expected {
			t.Errorf("%s: tpm2_eventlog: %v; expected to fail: %v", m.name, err, expected)
		}
		if err != nil {
			continue
		}
		if ours := eventDigests(parse(t, m.log)); !slices.Equal(ours, theirs) {
			t.Errorf("%s: tpm2_eventlog reads %d other events of %d", m.name, len(theirs), len(ours))
		}

		// It extends events that no TPM was given, and it doesn't know the one that says
		// at which locality the TPM started, which is PCR 0's first value.
		if slices.ContainsFunc(parse(t, m.log).Events, func(e boot.Event) bool { return e.Type == boot.NoAction && e.PCR == 0 }) {
			delete(pcrs, 0)
		}
		if f, err := Appraise(m.log, nil, pcrs); err != nil || len(f.PCRsReplayed) != len(pcrs) {
			t.Errorf("%s: PCRs of tpm2_eventlog: %v, replayed %v of %d", m.name, err, f.PCRsReplayed, len(pcrs))
		}
	}
}
