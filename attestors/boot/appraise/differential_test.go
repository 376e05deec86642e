package appraise

import (
	"bytes"
	"crypto"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// library reads a recorded log of go-attestation's own tests, from its module.
func library(t *testing.T, name string) []byte {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-attestation").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "attest", "testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// agile makes a crypto-agile log of one that has SHA-1 only: where an event's
// SHA-1 is of its data, or of the variable in it, so is the SHA-256.
func agile(t *testing.T, log []byte) *boot.Log {
	t.Helper()
	l := parse(t, log)
	if l.SpecID != nil {
		t.Fatal("the log has more than SHA-1 already")
	}
	l.SpecID = &boot.SpecID{Major: 2, UintnSize: 2, Banks: []boot.Bank{{Algorithm: boot.SHA1, Size: 20}, {Algorithm: boot.SHA256, Size: 32}}}
	for i := range l.Events {
		e := &l.Events[i]
		old := e.Digest(boot.SHA1)
		is := func(b []byte) bool { sum := sha1.Sum(b); return bytes.Equal(sum[:], old) }
		digest := evidence.Sum(old)
		v, variable := parseVariable(e.Data)
		switch {
		case is(e.Data):
			digest = evidence.Sum(e.Data)
		case variable && is(v.data):
			digest = evidence.Sum(v.data)
		case e.Type == boot.NoAction && len(bytes.Trim(old, "\x00")) == 0:
			digest = evidence.Digest{}
		}
		e.Digests = append(e.Digests, boot.Digest{Algorithm: boot.SHA256, Value: digest[:]})
	}
	return l
}

// sameEvents compares with go-attestation's reading of a log's SHA-256 bank.
func sameEvents(ours []boot.Event, theirs []attest.Event) bool {
	extended := slices.DeleteFunc(slices.Clone(ours), func(e boot.Event) bool { return e.Type == boot.NoAction })
	theirs = slices.DeleteFunc(slices.Clone(theirs), func(e attest.Event) bool { return e.Type == attest.EventType(boot.NoAction) })
	return slices.EqualFunc(extended, theirs, func(a boot.Event, b attest.Event) bool {
		return int(a.PCR) == b.Index && uint32(a.Type) == uint32(b.Type) &&
			bytes.Equal(a.Data, b.Data) && bytes.Equal(a.Digest(boot.SHA256), b.Digest)
	})
}

func attestPCRs(pcrs map[int]evidence.Digest) []attest.PCR {
	var out []attest.PCR
	for i := range 16 {
		if v, ok := pcrs[i]; ok {
			out = append(out, attest.PCR{Index: i, Digest: v[:], DigestAlg: crypto.SHA256})
		}
	}
	return out
}

// Where go-attestation accepts a log too, both see the same events; and what we
// accept it does, with the same PCRs.
func TestAgainstGoAttestation(t *testing.T) {
	for _, fixture := range []string{"clean", "cmdline", "tampered", "direct-kernel"} {
		log, pcrs := recorded(t, fixture)
		honest := accepted(t, log, pcrs)
		theirs, err := attest.ParseEventLog(log)
		if err != nil {
			t.Fatal(err)
		}
		if !sameEvents(parse(t, log).Events, theirs.Events(attest.HashSHA256)) {
			t.Errorf("%s: other events", fixture)
		}
		events, err := theirs.Verify(attestPCRs(pcrs))
		if err != nil {
			t.Errorf("%s: go-attestation: %v", fixture, err)
		}
		state, err := attest.ParseSecurebootState(events)
		if err != nil {
			t.Fatalf("%s: go-attestation: %v", fixture, err)
		}
		if state.Enabled != *honest.SecureBoot || len(state.PermittedKeys) != len(honest.Databases["db"].Certificates) ||
			len(state.ForbiddenHashes) != honest.Databases["dbx"].HashCount {
			t.Errorf("%s: go-attestation has other facts: %+v", fixture, state)
		}
	}

	random := rand.New(rand.NewPCG(1, 2))
	log, pcrs := recorded(t, "direct-kernel")
	both, read := 0, 0
	for range 20000 {
		changed := bytes.Clone(log)
		for range 1 + random.IntN(3) {
			changed[random.IntN(len(changed))] ^= 1 << random.IntN(8)
		}
		ours, err := boot.Parse(changed)
		theirs, theirErr := attest.ParseEventLog(changed)
		if err != nil || theirErr != nil {
			continue
		}
		read++
		complete := !slices.ContainsFunc(ours.Events, func(e boot.Event) bool { return e.Digest(boot.SHA256) == nil })
		if complete && !sameEvents(ours.Events, theirs.Events(attest.HashSHA256)) {
			t.Fatalf("another reading of %x", changed)
		}
		if _, err := Appraise(changed, nil, pcrs); err == nil {
			both++
			if _, err := theirs.Verify(attestPCRs(pcrs)); err != nil {
				t.Fatalf("accepted here, and by go-attestation: %v\n%x", err, changed)
			}
		}
	}
	if read == 0 || both == 0 {
		t.Errorf("of the changed logs both read %d, and we accepted %d", read, both)
	}
}

var (
	bankLine   = regexp.MustCompile(`^  (\w+) *:$`)
	eventLine  = regexp.MustCompile(`^  PCRIndex: (\d+)$`)
	digestLine = regexp.MustCompile(`^    Digest: "([0-9a-f]{64})"$`)
	pcrLine    = regexp.MustCompile(`^    (\d+) *: 0x([0-9a-f]{64})$`)
)

// tpm2EventLog has tpm2_eventlog read a log: its events, as eventDigests has them,
// and the PCRs that it computes.
func tpm2EventLog(t *testing.T, log []byte) (events []string, pcrs map[int]evidence.Digest, err error) {
	t.Helper()
	tool, err := exec.LookPath("tpm2_eventlog")
	if err != nil {
		t.Fatal("tpm2_eventlog isn't installed: apt-get install tpm2-tools")
	}
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, log, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, file).Output()
	if err != nil {
		return nil, nil, err
	}

	pcrs, pcr, bank := map[int]evidence.Digest{}, "", ""
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if m := bankLine.FindStringSubmatch(line); m != nil {
			bank = m[1]
		} else if m := eventLine.FindStringSubmatch(line); m != nil {
			pcr = m[1]
		} else if m := digestLine.FindStringSubmatch(line); m != nil {
			events = append(events, pcr+" "+m[1])
		} else if m := pcrLine.FindStringSubmatch(line); m != nil && bank == "sha256" {
			i, _ := strconv.Atoi(m[1])
			pcrs[i], _ = evidence.ParseDigest(m[2])
		}
	}
	return events, pcrs, nil
}

// eventDigests are a log's events: PCR and SHA-256 digest of each.
func eventDigests(log *boot.Log) (list []string) {
	for _, e := range log.Events {
		list = append(list, strconv.Itoa(int(e.PCR))+" "+hex.EncodeToString(e.Digest(boot.SHA256)))
	}
	return list
}

// tpm2_eventlog reads the same events and computes the same PCRs.
func TestAgainstTPM2Tools(t *testing.T) {
	logs := map[string][]byte{}
	for _, fixture := range []string{"clean", "cmdline", "tampered", "direct-kernel"} {
		logs[fixture], _ = recorded(t, fixture)
	}
	for _, name := range []string{"coreos_36_shielded_vm_no_secure_boot_eventlog", "ubuntu_2104_shielded_vm_no_secure_boot_eventlog"} {
		logs[name] = library(t, name)
	}
	for name, log := range logs {
		theirs, pcrs, err := tpm2EventLog(t, log)
		if err != nil {
			t.Fatalf("%s: tpm2_eventlog: %v", name, err)
		}
		if ours := eventDigests(parse(t, log)); !slices.Equal(ours, theirs) {
			t.Errorf("%s: tpm2_eventlog reads other events:\n%q\n%q", name, ours, theirs)
		}
		f, err := Appraise(log, nil, pcrs)
		if err != nil || len(f.PCRsReplayed) != len(pcrs) {
			t.Errorf("%s: PCRs of tpm2_eventlog: %v, replayed %v of %d", name, err, f.PCRsReplayed, len(pcrs))
		}
	}
}

// Logs of other machines: two clouds' virtual machines, without Secure Boot and
// with GRUB's long configuration.
func TestLogsOfOtherMachines(t *testing.T) {
	for name, line := range map[string]string{
		"coreos_36_shielded_vm_no_secure_boot_eventlog":   "ostree=",
		"ubuntu_2104_shielded_vm_no_secure_boot_eventlog": "root=",
	} {
		log := library(t, name)
		f := accepted(t, log, recompute(parse(t, log), map[int]evidence.Digest{12: {}}))
		if f.SecureBoot == nil || *f.SecureBoot || f.SecureBootMode != "user" {
			t.Errorf("%s: secure boot %v, mode %q", name, f.SecureBoot, f.SecureBootMode)
		}
		if f.KernelCommandLine == nil || !strings.Contains(*f.KernelCommandLine, line) {
			t.Errorf("%s: command lines %q", name, f.KernelCommandLines)
		}
		if f.FirmwareVersion == nil || !strings.HasPrefix(*f.FirmwareVersion, "GCE Virtual Firmware") {
			t.Errorf("%s: firmware %v", name, f.FirmwareVersion)
		}
		if f.Databases["dbx"].HashCount < 70 || f.Databases["dbx"].Malformed {
			t.Errorf("%s: dbx %v", name, f.Databases["dbx"].HashCount)
		}
	}
	// Two that don't show ExitBootServices, as the logs of older kernels do.
	log := library(t, "crypto_agile_eventlog")
	missing := agile(t, library(t, "ebs_event_missing_eventlog"))
	for name, log := range map[string]*boot.Log{"crypto_agile": parse(t, log), "ebs_event_missing": missing} {
		if f := accepted(t, log.Encode(), recompute(log, nil)); f.SecureBoot == nil {
			t.Errorf("%s: no Secure Boot state: %+v", name, f.PCRs)
		}
	}
}

// Windows on a physical machine, whose log has SHA-1 only: as it stands it is
// refused, and with SHA-256 put beside it has the facts.
func TestWindows(t *testing.T) {
	log := library(t, "option_rom_eventlog")
	_, err := Appraise(log, nil, map[int]evidence.Digest{})
	rejected(t, err, CheckStructure, "the log has no SHA-256 digests, only SHA-1")

	l := agile(t, log)
	pcrs := recompute(l, nil)
	f := accepted(t, l.Encode(), pcrs)
	w := f.Windows
	if w == nil {
		t.Fatal("no facts of Windows")
	}
	if f.SecureBoot == nil || !*f.SecureBoot {
		t.Errorf("secure boot %v", f.SecureBoot)
	}
	if f.KernelConfig != nil || f.KernelCommandLines != nil {
		t.Errorf("Windows' events became text: %q", f.KernelConfig)
	}
	if f.FirmwareVersion == nil {
		t.Error("no firmware version")
	}
	if !slices.ContainsFunc(f.Components, func(c Component) bool { return c.PCR == 2 && c.Kind == KindDriver }) {
		t.Error("the option ROM is no component")
	}
	if w.CodeIntegrity == nil || !*w.CodeIntegrity || w.TestSigning || w.KernelDebugging || w.BootDebugging || len(w.BitLocker) == 0 ||
		len(w.ELAM) == 0 || w.BootCount == nil {
		t.Errorf("%+v", w)
	}
	if !slices.ContainsFunc(w.Modules, func(m WindowsImage) bool { return strings.HasSuffix(strings.ToLower(m.Path), `\winload.efi`) }) {
		t.Errorf("no loader among %d modules", len(w.Modules))
	}

	end := at(t, l, 12, boot.Separator, 0)
	first := at(t, l, 12, boot.EventTag, 0)
	for _, a := range []struct {
		name   string
		known  bool
		change func(l *boot.Log)
	}{
		{"debugging hidden under another digest", false, func(l *boot.Log) {
			l.Events[first].Data = bytes.Clone(l.Events[first].Data)
			l.Events[first].Data[20] ^= 1
		}},
		{"a separator under another type", true, func(l *boot.Log) { l.Events[end].Type = boot.EventTag }},
		{"a separator twice", true, func(l *boot.Log) {
			l.Events = slices.Insert(l.Events, end, l.Events[end])
		}},
	} {
		changed := parse(t, l.Encode())
		a.change(changed)
		f := accepted(t, changed.Encode(), recompute(changed, nil))
		if a.known != (f.Windows != nil) || a.known && !reflect.DeepEqual(f.Windows, w) {
			t.Errorf("%s: %+v", a.name, f.Windows)
		}
	}
	// What was extended after Windows closed the PCR changes nothing.
	changed := parse(t, l.Encode())
	debug := []byte{1, 0, 1, 0x40, 9, 0, 0, 0, 1, 0, 5, 0, 1, 0, 0, 0, 1}
	changed.Events = append(changed.Events, event(12, boot.EventTag, debug, debug))
	if f := accepted(t, changed.Encode(), recompute(changed, nil)); f.Windows == nil || f.Windows.KernelDebugging {
		t.Error("an event behind the separator became a fact")
	}
	// Before, it does.
	changed = parse(t, l.Encode())
	changed.Events = slices.Insert(changed.Events, first, event(12, boot.EventTag, debug, debug))
	if f := accepted(t, changed.Encode(), recompute(changed, nil)); !f.Windows.KernelDebugging {
		t.Error("kernel debugging isn't seen")
	}
}

// A driver's configuration may be wrapped as often as it likes, and stands alone.
func TestWindowsDrivers(t *testing.T) {
	sipa := func(kind uint32, data ...byte) []byte {
		b := binary.LittleEndian.AppendUint32(nil, kind)
		return append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	name := sipa(sipaELAMKeyName, utf16Bytes("Defender")...)
	for _, c := range []struct {
		data []byte
		want string // refused with; empty: the driver is known
	}{
		{name, ""},
		{sipa(sipaELAM, sipa(sipaELAM, name...)...), ""},
		{slices.Concat(sipa(sipaELAM, name...), name), "among another's"},
		{slices.Concat(name, sipa(sipaELAM, name...)), "among another's"},
		{sipa(sipaELAM, name[:9]...), "reaches past its end"},
		{append(slices.Clone(name), 1), "1 bytes follow"},
	} {
		var w Windows
		err := w.elam(c.data)
		if c.want == "" && (err != nil || !slices.Equal(w.ELAM, []WindowsELAM{{Name: "Defender"}})) {
			t.Errorf("%x: %v, %+v", c.data, err, w.ELAM)
		}
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%x: %v, want %q", c.data, err, c.want)
		}
	}
}

// go-attestation's reading of Windows' events is ours.
func TestWindowsAgainstGoAttestation(t *testing.T) {
	var dump struct{ Log struct{ Raw []byte } }
	if err := json.Unmarshal(library(t, "windows_gcp_shielded_vm.json"), &dump); err != nil {
		t.Fatal(err)
	}
	for name, log := range map[string][]byte{"gcp": dump.Log.Raw, "option_rom": library(t, "option_rom_eventlog")} {
		l := agile(t, log)
		var events []attest.Event
		for _, e := range l.Events {
			if e.Type != boot.NoAction {
				events = append(events, attest.Event{Index: int(e.PCR), Type: attest.EventType(e.Type), Data: e.Data, Digest: e.Digest(boot.SHA256)})
			}
		}
		theirs, err := attest.ParseWinEvents(events)
		if err != nil {
			t.Fatalf("%s: go-attestation: %v", name, err)
		}
		b := &bootLog{}
		if err := b.sort(l); err != nil {
			t.Fatal(err)
		}
		var f Facts
		if b.windows(&f); f.Windows == nil {
			t.Fatalf("%s: no facts of Windows", name)
		}
		w := f.Windows
		same := func(ours *bool, theirs attest.Ternary) bool {
			if ours == nil {
				return theirs == attest.TernaryUnknown
			}
			return *ours == (theirs == attest.TernaryTrue) && theirs != attest.TernaryUnknown
		}
		if !same(w.CodeIntegrity, theirs.CodeIntegrityEnabled) || !same(w.DEP, theirs.DEPEnabled) ||
			w.TestSigning != theirs.TestSigningEnabled || w.BootDebugging != theirs.BootDebuggingEnabled ||
			w.KernelDebugging != theirs.KernelDebugEnabled || *w.BootCount != theirs.BootCount {
			t.Errorf("%s: %+v\n%+v", name, w, theirs)
		}
		if len(w.BitLocker) != len(theirs.BitlockerUnlocks) || len(w.ELAM) != len(theirs.ELAM) {
			t.Errorf("%s: BitLocker %v, ELAM %v", name, w.BitLocker, w.ELAM)
		}
		for i, n := range theirs.BitlockerUnlocks {
			if w.BitLocker[i] != uint64(n) {
				t.Errorf("%s: BitLocker %v, not %v", name, w.BitLocker, theirs.BitlockerUnlocks)
			}
		}
		for _, d := range w.ELAM {
			if hex.EncodeToString(theirs.ELAM[d.Name].Measured) != d.Measured {
				t.Errorf("%s: ELAM %+v", name, d)
			}
		}
		digests := map[string]bool{}
		for _, m := range w.Modules {
			digests[m.Authenticode] = true
			if _, ok := theirs.LoadedModules[m.Authenticode]; !ok {
				t.Errorf("%s: a module of our own: %+v", name, m)
			}
		}
		if len(digests) != len(theirs.LoadedModules) {
			t.Errorf("%s: %d modules, not %d", name, len(digests), len(theirs.LoadedModules))
		}
	}
}
