package offline_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/verify/offline"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/test/check"
)

const boots = "../../../../test/vectors/boots"

var now = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

func read(t *testing.T, parts ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(append([]string{boots}, parts...)...))
	if os.IsNotExist(err) {
		return nil
	}
	check.Nil(t, err)
	return b
}

func record(t *testing.T, name string) (offline.Record, offline.Options) {
	t.Helper()
	r := offline.Record{AK: read(t, name, "ak.tpm2b_public"), Attest: read(t, name, "quote.tpms_attest"), Signature: read(t, name, "quote.tpmt_signature"),
		EventLog: read(t, name, "binary_bios_measurements"), IMA: read(t, name, "ima_binary_runtime_measurements")}
	r.PCRs, r.Nonce = read(t, name, "pcrs.txt"), read(t, name, "nonce.hex")
	o := offline.Options{Now: now}
	if r.Attest != nil {
		for _, file := range []string{"ek_rsa_cert.der", "ek_ecc384_cert.der"} {
			r.EKCertificates = append(r.EKCertificates, offline.EKCertificate{Name: file, DER: read(t, name, file)})
		}
		block, _ := pem.Decode(read(t, name, "ek.pem"))
		r.EKCertificates[0].Key = block.Bytes
	}
	for _, file := range []string{"issuercert.pem", "swtpm-localca-rootca-cert.pem"} {
		block, _ := pem.Decode(read(t, "ca", file))
		o.EKRoots = append(o.EKRoots, check.Must(x509.ParseCertificate(block.Bytes))(t))
	}
	return r, o
}

func results(r offline.Report) map[string]string {
	out := map[string]string{}
	for _, c := range r.Checks {
		out[c.Name] = c.Result
	}
	return out
}

func detail(r offline.Report, name string) string {
	for _, c := range r.Checks {
		if c.Name == name {
			return c.Detail
		}
	}
	return ""
}

var names = []string{"quote-signature", "quote-nonce", "quote-pcr-digest", "ek-certificate", "event-log-structure", "event-log-replay", "ima-replay", "ima-boot-aggregate", "reference"}

func TestBoots(t *testing.T) {
	clean, o := record(t, "clean")
	honest := offline.Appraise(clean, o)
	set := reference.Learn(honest.Boot, honest.PCRs, nil, honest.Measured)
	for name, want := range map[string]struct {
		secureBoot  bool
		commandLine string
		entries     int
		images      int
		reference   string // what it says against clean's set; empty: it holds
	}{
		"clean":         {true, "ima_policy=tcb panic=-1 quiet init=/sbin/init", 43, 4, ""},
		"tampered":      {true, "ima_policy=tcb panic=-1 quiet init=/sbin/init", 44, 4, `"/usr/local/bin/app"`},
		"cmdline":       {true, "init_on_alloc=0 module.sig_enforce=0 nokaslr", 43, 4, "kernel command line gained init_on_alloc=0 module.sig_enforce=0 nokaslr"},
		"direct-kernel": {false, "", 43, 1, "Secure Boot is off"},
	} {
		t.Run(name, func(t *testing.T) {
			r, o := record(t, name)
			o.Reference = &set
			got := offline.Appraise(r, o)
			wanted := map[string]string{}
			for _, n := range names {
				wanted[n] = offline.Pass
			}
			if r.Attest == nil {
				for _, n := range names[:4] {
					wanted[n] = offline.NotChecked
				}
			}
			verdict := offline.Pass
			if want.reference != "" {
				wanted["reference"], verdict = offline.Fail, offline.Fail
			}
			if !reflect.DeepEqual(results(got), wanted) || got.Verdict != verdict {
				t.Errorf("%s: %+v", got.Verdict, got.Checks)
			}
			if !strings.Contains(detail(got, "reference"), want.reference) {
				t.Errorf("reference: %s, want %q", detail(got, "reference"), want.reference)
			}
			f := got.Facts
			if f.SecureBoot == nil || *f.SecureBoot != want.secureBoot {
				t.Errorf("secure boot %v", f.SecureBoot)
			}
			switch {
			case want.commandLine == "" && f.KernelCommandLine != nil:
				t.Errorf("kernel command line %q", *f.KernelCommandLine)
			case want.commandLine != "" && (f.KernelCommandLine == nil || !strings.HasSuffix(*f.KernelCommandLine, want.commandLine)):
				t.Errorf("kernel command line %v", f.KernelCommandLine)
			}
			if f.IMA == nil || f.IMA.Entries != want.entries || f.IMA.Proven != want.entries || f.IMA.Violations != 0 || f.IMA.AggregatePCRs != "0-9" || !strings.HasPrefix(f.IMA.BootAggregate, "sha256:") {
				t.Errorf("ima %+v", f.IMA)
			}
			images := 0
			for _, c := range f.Components {
				if c.PCR == 4 {
					images++
				}
			}
			if images != want.images || !slices.Contains(f.PCRsReplayed, 10) || !slices.Contains(f.PCRsReplayed, 7) {
				t.Errorf("%d images, replayed %v", images, f.PCRsReplayed)
			}
			var asJSON map[string]any
			check.Nil(t, json.Unmarshal(check.Must(json.Marshal(got))(t), &asJSON))
			for _, key := range []string{"secure_boot", "kernel_command_line", "boot_components", "pcrs_replayed", "ima"} {
				if _, there := asJSON["facts"].(map[string]any)[key]; !there {
					t.Errorf("facts has no %s", key)
				}
			}
		})
	}
}

// Each part may be missing, and is then reported so.
func TestMissingParts(t *testing.T) {
	for name, tt := range map[string]struct {
		drop func(*offline.Record, *offline.Options)
		not  []string // checked
	}{
		"the quote":       {func(r *offline.Record, _ *offline.Options) { r.Attest, r.Signature = nil, nil }, names[:3]},
		"the signature":   {func(r *offline.Record, _ *offline.Options) { r.Signature = nil }, names[:3]},
		"the AK":          {func(r *offline.Record, _ *offline.Options) { r.AK = nil }, names[:3]},
		"the nonce":       {func(r *offline.Record, _ *offline.Options) { r.Nonce = nil }, names[1:2]},
		"the roots":       {func(_ *offline.Record, o *offline.Options) { o.EKRoots = nil }, names[3:4]},
		"the event log":   {func(r *offline.Record, _ *offline.Options) { r.EventLog = nil }, names[4:6]},
		"the IMA list":    {func(r *offline.Record, _ *offline.Options) { r.IMA = nil }, names[6:8]},
		"the PCR values":  {func(r *offline.Record, _ *offline.Options) { r.PCRs = nil }, []string{"quote-pcr-digest", "event-log-replay", "ima-replay", "ima-boot-aggregate"}},
		"nothing but PEM": {func(r *offline.Record, _ *offline.Options) { r.AK = read(t, "clean", "ak.pem") }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, o := record(t, "clean")
			tt.drop(&r, &o)
			got := offline.Appraise(r, o)
			verdict := offline.Pass
			if r.PCRs == nil || r.Attest != nil && (r.Signature == nil || r.AK == nil) { // nothing proves the logs, or the quote
				verdict = offline.NotProven
			}
			if got.Verdict != verdict || len(got.Checks) != len(names) {
				t.Errorf("%s: %+v", got.Verdict, got.Checks)
			}
			for n, result := range results(got) {
				if want := slices.Contains(slices.Concat(tt.not, names[8:]), n); (result == offline.NotChecked) != want {
					t.Errorf("%s: %s", n, result)
				}
			}
		})
	}
}

// tried reports whether a run tries this one of many places: a short one tries one in so
// many, a prime, so that each bit of bytes is met.
func tried(place int) bool { return !testing.Short() || place%23 == 0 }

// Every flipped bit of a quote, a signature or a value fails, under its name.
func TestEveryBitOfTheQuote(t *testing.T) {
	r, o := record(t, "clean")
	r.EventLog, r.IMA, r.EKCertificates = nil, nil, nil
	fails := func(what string, bit int) {
		if got := offline.Appraise(r, o); got.Verdict != offline.Fail {
			t.Errorf("%s, bit %d flipped: %+v", what, bit, got.Checks)
		}
	}
	o.Nonce = check.Must(offline.ParseNonce(string(r.Nonce)))(t)
	for what, b := range map[string][]byte{"quote": r.Attest, "signature": r.Signature, "nonce": o.Nonce} {
		for bit := range 8 * len(b) {
			if !tried(bit) {
				continue
			}
			b[bit/8] ^= 1 << (bit % 8)
			fails(what, bit)
			b[bit/8] ^= 1 << (bit % 8)
		}
	}
}

// Every bit of the values' text: where the quote covers it, it fails; elsewhere
// nothing changes.
func TestEveryBitOfTheValues(t *testing.T) {
	r, o := record(t, "clean")
	r.EKCertificates, r.EventLog, r.IMA = nil, nil, nil // what is said of those follows from the quoted values alone
	honest := check.Must(json.Marshal(offline.Appraise(r, o)))(t)
	values := check.Must(tpmappraise.ParsePCRRead(string(r.PCRs)))(t)
	start := bytes.Index(r.PCRs, []byte("sha256:"))
	end := bytes.Index(r.PCRs[start:], []byte("\n    15:")) + start
	tries, refused := 0, 0
	for i := range r.PCRs {
		for bit := range 8 {
			if !tried(8*i + bit) {
				continue
			}
			tries++
			r.PCRs[i] ^= 1 << bit
			got := offline.Appraise(r, o)
			if got.Verdict == offline.Fail {
				// Elsewhere only a line that becomes a quoted PCR's second contradicts.
				if refused++; (i < start-3 || i > end) && !strings.Contains(detail(got, "quote-pcr-digest"), "a second time") {
					t.Errorf("bit %d of byte %d, which no quote covers, flipped: %+v", bit, i, got.Checks[:3])
				}
			} else if !bytes.Equal(check.Must(json.Marshal(got))(t), honest) {
				t.Errorf("bit %d of byte %d flipped changes the report", bit, i)
			} else if now, _ := tpmappraise.ParsePCRRead(string(r.PCRs)); i >= start && i <= end {
				for pcr := range 15 {
					if now[pcr] != values[pcr] {
						t.Errorf("bit %d of byte %d flipped changes PCR %d and nothing else", bit, i, pcr)
					}
				}
			}
			r.PCRs[i] ^= 1 << bit
		}
	}
	if all := 8 * len(r.PCRs); refused*all < 15*64*4*tries { // half of each quoted digit's flips
		t.Errorf("%d of %d flips refused", refused, tries)
	}
	// Without a quote each line counts.
	bare, o := record(t, "direct-kernel")
	for _, line := range []string{"\n    4 : 0x", "\n    20: 0x"} {
		at := bytes.LastIndex(bare.PCRs, []byte(line)) + len(line)
		was := bare.PCRs[at]
		bare.PCRs[at] = 'x'
		if got := offline.Appraise(bare, o); got.Verdict != offline.Fail || results(got)["quote-pcr-digest"] != offline.Fail {
			t.Errorf("%q broken, without a quote: %+v", line, got.Checks)
		}
		bare.PCRs[at] = was
	}
}

// A list of nothing but what couldn't be measured is no list of files, as for a
// broker.
func TestNoFileMeasured(t *testing.T) {
	r, o := record(t, "clean")
	first, _, err := ima.NewReader(r.IMA, 0).Next()
	check.Nil(t, err)
	ten, ones := evidence.Digest{}, bytes.Repeat([]byte{0xff}, 32)
	sum := evidence.Sum(first.Data)
	ten = evidence.Sum(append(ten[:], sum[:]...))
	violation := first
	violation.TemplateDigest = make([]byte, len(first.TemplateDigest))
	ten = evidence.Sum(append(ten[:], ones...))
	values := check.Must(tpmappraise.ParsePCRRead(string(r.PCRs)))(t)
	values[10] = ten
	text := []byte("sha256:\n")
	for pcr, value := range values {
		text = fmt.Appendf(text, "  %d : 0x%s\n", pcr, value)
	}
	set := check.Must(reference.Parse([]byte(`{"ima":{"violations":"ignore","allow":[]}}`)))(t)
	o.Reference = &set
	got := offline.Appraise(offline.Record{PCRs: text, IMA: violation.Append(first.Append(nil))}, o)
	if results(got)["ima-replay"] != offline.Pass || got.Facts.IMA.Violations != 1 || !strings.Contains(detail(got, "reference"), "no file was measured") {
		t.Errorf("%+v", got.Checks)
	}
}

func TestForgedRecords(t *testing.T) {
	for name, tt := range map[string]struct {
		forge func(*offline.Record, *offline.Options)
		fails string
	}{
		"another nonce":         {func(_ *offline.Record, o *offline.Options) { o.Nonce = make([]byte, 32) }, "quote-nonce"},
		"a short nonce":         {func(r *offline.Record, _ *offline.Options) { r.Nonce = r.Nonce[:40] }, "quote-nonce"},
		"a nonce that is none":  {func(r *offline.Record, _ *offline.Options) { r.Nonce[3] = 'x' }, "quote-nonce"},
		"another boot's AK":     {func(r *offline.Record, _ *offline.Options) { r.AK = read(t, "tampered", "ak.tpm2b_public") }, "quote-signature"},
		"another boot's values": {func(r *offline.Record, _ *offline.Options) { o, _ := record(t, "tampered"); r.PCRs = o.PCRs }, "quote-pcr-digest"},
		"a value left out": {func(r *offline.Record, _ *offline.Options) {
			r.PCRs = bytes.Replace(r.PCRs, []byte("    3 :"), nil, -1)
		}, "quote-pcr-digest"},
		"another boot's log": {func(r *offline.Record, _ *offline.Options) {
			r.EventLog = read(t, "cmdline", "binary_bios_measurements")
		}, "event-log-replay"},
		"a cut log": {func(r *offline.Record, _ *offline.Options) { r.EventLog = r.EventLog[:1000] }, "event-log-structure"},
		"another boot's files": {func(r *offline.Record, _ *offline.Options) {
			r.IMA = read(t, "tampered", "ima_binary_runtime_measurements")
		}, "ima-replay"},
		"another boot's list": {func(r *offline.Record, _ *offline.Options) {
			r.IMA = read(t, "direct-kernel", "ima_binary_runtime_measurements")
		}, "ima-boot-aggregate"},
		"an EK of another key": {func(r *offline.Record, _ *offline.Options) { r.EKCertificates[0].DER = r.EKCertificates[1].DER }, "ek-certificate"},
		"an EK that is no EK":  {func(r *offline.Record, o *offline.Options) { r.EKCertificates[1].DER = o.EKRoots[1].Raw }, "ek-certificate"},
		"PCRs that are none":   {func(r *offline.Record, _ *offline.Options) { r.PCRs = []byte("hello") }, "quote-pcr-digest"},
		"roots of somebody else": {func(r *offline.Record, o *offline.Options) {
			o.EKRoots = o.EKRoots[:0:0]
			o.EKRoots = append(o.EKRoots, stranger(t))
		}, "ek-certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			r, o := record(t, "clean")
			tt.forge(&r, &o)
			got := offline.Appraise(r, o)
			if got.Verdict != offline.Fail || results(got)[tt.fails] != offline.Fail || detail(got, tt.fails) == "" {
				t.Errorf("want %s to fail: %+v", tt.fails, got.Checks)
			}
		})
	}
}

// stranger is a root that certified nothing here.
func stranger(t *testing.T) *x509.Certificate {
	t.Helper()
	r, _ := record(t, "clean")
	return check.Must(x509.ParseCertificate(r.EKCertificates[0].DER))(t)
}

// Nothing that is checked by half, or not at all, passes.
func TestNotProven(t *testing.T) {
	whole, _ := record(t, "clean")
	list := whole.IMA
	ascii := read(t, "clean", "ima_ascii_runtime_measurements")
	tampered := bytes.Replace(list, []byte("/usr/local/bin/app"), []byte("/usr/local/bin/apq"), 1)
	for name, tt := range map[string]struct {
		record  offline.Record
		verdict string
		check   string // whose detail says it
		says    string
	}{
		"nothing":                            {offline.Record{}, offline.NotProven, "event-log-replay", "no event log"},
		"values alone":                       {offline.Record{PCRs: whole.PCRs}, offline.NotProven, "event-log-replay", "no event log"},
		"an event log alone":                 {offline.Record{EventLog: whole.EventLog}, offline.NotProven, "event-log-replay", "no PCR values"},
		"a list alone":                       {offline.Record{IMA: list}, offline.NotProven, "ima-replay", "the template digests of 43 entries"},
		"a tampered list":                    {offline.Record{IMA: tampered}, offline.Fail, "ima-replay", "its template digest"},
		"a list of zeros":                    {offline.Record{IMA: make([]byte, 100)}, offline.Fail, "ima-replay", "100 zeros"},
		"garbage of systemd":                 {offline.Record{UserspaceLog: []byte("garbage")}, offline.Fail, "event-log-structure", "systemd's log"},
		"garbage beside a log":               {offline.Record{EventLog: whole.EventLog, UserspaceLog: []byte("garbage")}, offline.Fail, "event-log-structure", "systemd's log"},
		"a list with PCR 10":                 {offline.Record{IMA: list, PCRs: only(t, whole.PCRs, 10)}, offline.Pass, "ima-boot-aggregate", "PCR 0 to 7 were not given"},
		"an unknown template":                {offline.Record{IMA: bytes.Replace(ascii, []byte("ima-sig"), []byte("ima-xyz"), 1)}, offline.Fail, "ima-replay", `template "ima-xyz"`},
		"the same, binary":                   {offline.Record{IMA: bytes.Replace(list, []byte("ima-sig"), []byte("ima-xyz"), 1)}, offline.Fail, "ima-replay", `template "ima-xyz"`},
		"a list whose editor trimmed spaces": {offline.Record{IMA: bytes.ReplaceAll(ascii, []byte(" \n"), []byte("\n"))}, offline.NotProven, "ima-replay", "the template digests of 43 entries"},
		"a violation first":                  {offline.Record{IMA: violated(t, list), PCRs: whole.PCRs}, offline.Fail, "ima-boot-aggregate", "a violation, which proves no digest"},
		"values of PCR 16 alone":             {offline.Record{EventLog: whole.EventLog, PCRs: only(t, whole.PCRs, 16)}, offline.NotProven, "event-log-replay", "of PCR [0 1 2 3 4 5 6 7] no value was given"},
		"some of the firmware's values":      {offline.Record{EventLog: whole.EventLog, PCRs: only(t, whole.PCRs, 0, 1, 2, 3, 4, 5, 6)}, offline.NotProven, "event-log-replay", "of PCR [7] no value was given"},
		"all of the firmware's values":       {offline.Record{EventLog: whole.EventLog, PCRs: only(t, whole.PCRs, 0, 1, 2, 3, 4, 5, 6, 7)}, offline.Pass, "event-log-replay", "lead to the given values"},
		"a list with another PCR 10":         {offline.Record{IMA: list, PCRs: []byte("sha256:\n  10: 0x" + strings.Repeat("0", 64) + "\n")}, offline.NotProven, "ima-replay", "none of 43 entries leads"},
		"a binary line in text":              {offline.Record{IMA: append(bytes.Clone(ascii), "10 \x00\x01\x02\n"...)}, offline.Fail, "ima-replay", "a binary entry in an ASCII list"},
	} {
		t.Run(name, func(t *testing.T) {
			got := offline.Appraise(tt.record, offline.Options{Now: now})
			if got.Verdict != tt.verdict || !strings.Contains(detail(got, tt.check), tt.says) {
				t.Errorf("%s: %+v", got.Verdict, got.Checks)
			}
		})
	}
}

// What an option demands is checked, or nothing passes.
func TestDemandsAreMet(t *testing.T) {
	whole, o := record(t, "clean")
	bare := whole
	bare.Attest, bare.Signature, bare.AK, bare.Nonce, bare.EKCertificates = nil, nil, nil, nil, nil
	for name, options := range map[string]offline.Options{
		"a nonce":  {Now: now, Nonce: make([]byte, 8)},
		"EK roots": {Now: now, EKRoots: o.EKRoots},
	} {
		if got := offline.Appraise(bare, options); got.Verdict != offline.NotProven {
			t.Errorf("%s: %s: %+v", name, got.Verdict, got.Checks)
		}
	}
	if got := offline.Appraise(bare, offline.Options{Now: now}); got.Verdict != offline.Pass {
		t.Errorf("nothing demanded: %s: %+v", got.Verdict, got.Checks)
	}
}

// only is the values of some PCRs, as tpm2_pcrread prints them.
func only(t *testing.T, text []byte, pcrs ...int) []byte {
	t.Helper()
	values := check.Must(tpmappraise.ParsePCRRead(string(text)))(t)
	out := []byte("sha256:\n")
	for _, pcr := range pcrs {
		out = fmt.Appendf(out, "  %d : 0x%s\n", pcr, values[pcr])
	}
	return out
}

// violated is a list whose first entry is a violation.
func violated(t *testing.T, list []byte) []byte {
	t.Helper()
	first, _, err := ima.NewReader(list, 0).Next()
	check.Nil(t, err)
	first.TemplateDigest = make([]byte, len(first.TemplateDigest))
	return first.Append(nil)
}

// A quote that other tools asked for may have another nonce than a broker's.
func TestNonceOfAnyLength(t *testing.T) {
	r, o := record(t, "clean")
	for _, n := range []int{1, 20, 31, 33, 64, 65} {
		o.Nonce = bytes.Repeat([]byte{7}, n)
		got := offline.Appraise(r, o)
		want := "bound to something else"
		if n > 64 {
			want = "a TPM takes 1 to 64"
		}
		if results(got)["quote-nonce"] != offline.Fail || !strings.Contains(detail(got, "quote-nonce"), want) {
			t.Errorf("%d bytes: %+v", n, got.Checks[:2])
		}
	}
}

// Without PCR values a log that no quote can prove fails all the same.
func TestLogWithoutSHA256(t *testing.T) {
	log := check.Must(boot.Parse(read(t, "clean", "binary_bios_measurements")))(t)
	log.SpecID = nil
	for i := range log.Events {
		log.Events[i].Digests = log.Events[i].Digests[:1]
	}
	got := offline.Appraise(offline.Record{EventLog: log.Encode()}, offline.Options{Now: now})
	if results(got)["event-log-structure"] != offline.Fail || !strings.Contains(detail(got, "event-log-structure"), "only SHA-1") {
		t.Errorf("%+v", got.Checks)
	}
}
