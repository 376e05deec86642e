// Package offline appraises recorded evidence of a host: the same checks, by
// the same code, as a broker's of a live one, each told by its name.
//
// It trusts nothing of what it reads; what wasn't given is reported as not
// checked. Values that no quote was given for are taken as they are, and the
// report says so. That AK and EK are in one TPM can't be told from a record: a
// broker learns it by a challenge.
package offline

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/boot"
	bootappraise "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/broker/internal/verify/vendors"
)

// A Record is what was kept of a host's evidence; nil parts weren't.
type Record struct {
	AK, Attest, Signature []byte // the key, as tpmappraise.ParseRecordedAK reads it; TPMS_ATTEST; TPMT_SIGNATURE
	PCRs                  []byte // what tpm2_pcrread prints
	Nonce                 []byte // hex of what the quote was asked for with
	EKCertificates        []EKCertificate
	EventLog              []byte
	UserspaceLog          []byte // systemd's
	IMA                   []byte // binary or ASCII
}

// An EKCertificate is one of a TPM's, DER, and where it is from.
type EKCertificate struct {
	Name string
	DER  []byte
	Key  []byte // PKIX DER of the EK it has to be for; nil: not known
}

// Options are what a record is held against.
type Options struct {
	Nonce     []byte // what the quote has to be bound to; nil: the record's
	EKRoots   []*x509.Certificate
	Between   []*x509.Certificate // may lead from an EK certificate to a root; not trusted
	Reference *reference.Content
	Now       time.Time
}

// Results of a check.
const (
	Pass       = "pass"
	Fail       = "fail"
	NotChecked = "not-checked"
	NotProven  = "not proven" // a verdict: nothing failed, and something that was given isn't proven
)

// A Check is one question and its answer.
type Check struct {
	Name   string `json:"name"`
	Result string `json:"result"`
	Detail string `json:"detail"`
}

// A Report is the answer to all of them.
type Report struct {
	Verdict string  `json:"verdict"` // Pass, Fail or NotProven
	Checks  []Check `json:"checks"`
	Facts   Facts   `json:"facts"`

	// What a reference set can be learned from; empty where it didn't hold.
	Measured []imaappraise.Measurement `json:"-"`
	Boot     *bootappraise.Facts       `json:"-"`
	PCRs     map[int]evidence.Digest   `json:"-"`
}

// Facts are those that hold. What is null or empty isn't known.
type Facts struct {
	bootappraise.Facts
	SecureBoot        *bool                    `json:"secure_boot"`
	KernelCommandLine *string                  `json:"kernel_command_line"`
	Components        []bootappraise.Component `json:"boot_components"`
	PCRsReplayed      []int                    `json:"pcrs_replayed"`
	IMA               *IMA                     `json:"ima"`
}

// IMA is what holds of an IMA list.
type IMA struct {
	Entries       int              `json:"entries"`                       // in the list
	Proven        int              `json:"proven"`                        // of them, under the PCR's value
	Violations    int              `json:"violations"`                    // among the proven
	BootAggregate string           `json:"boot_aggregate"`                // as its entry has it
	AggregatePCRs string           `json:"boot_aggregate_pcrs,omitempty"` // which it was found to stand for
	Bank          imaappraise.Bank `json:"bank,omitempty"`
}

// Appraise answers every question that r has something for.
func Appraise(r Record, o Options) Report {
	w := &work{record: r, options: o, facts: Facts{Components: []bootappraise.Component{}, PCRsReplayed: []int{}}}
	w.quote()
	w.ek()
	w.boot()
	w.ima()
	w.reference()
	report := Report{Verdict: w.verdict(), Checks: w.checks, Facts: w.facts, Measured: w.measured, Boot: w.bootFacts, PCRs: w.pcrs}
	slices.Sort(report.Facts.PCRsReplayed)
	return report
}

// verdict is Fail where a check failed, and Pass where something was proven, and
// each log and quote that was given was, and what the options demand was checked.
// Nothing checked is never Pass.
func (w *work) verdict() string {
	is := func(result string, names ...string) bool {
		return slices.ContainsFunc(w.checks, func(c Check) bool {
			return c.Result == result && (names == nil || slices.Contains(names, c.Name))
		})
	}
	switch {
	case is(Fail):
		return Fail
	case !is(Pass),
		w.record.EventLog != nil && is(NotChecked, "event-log-replay"),
		w.record.EventLog == nil && len(w.record.UserspaceLog) > 0,
		w.record.IMA != nil && is(NotChecked, "ima-replay"),
		w.record.Attest != nil && is(NotChecked, quoteChecks[0], quoteChecks[2]),
		w.record.Signature != nil && is(NotChecked, quoteChecks[0], quoteChecks[2]),
		w.options.Nonce != nil && is(NotChecked, quoteChecks[1]),
		w.options.EKRoots != nil && is(NotChecked, "ek-certificate"):
		return NotProven
	}
	return Pass
}

type work struct {
	record  Record
	options Options
	checks  []Check
	facts   Facts

	pcrs      map[int]evidence.Digest // quoted, or given without a quote
	quoted    bool
	bootFacts *bootappraise.Facts
	measured  []imaappraise.Measurement
}

func (w *work) say(name, result, format string, args ...any) {
	w.checks = append(w.checks, Check{name, result, fmt.Sprintf(format, args...)})
}

// failed tells a rejection under the name of the check it belongs to.
func (w *work) failed(name string, err error) { w.say(name, Fail, "%s", detail(err)) }

func detail(err error) string {
	var r *evidence.Rejected
	if errors.As(err, &r) {
		return r.Detail
	}
	return err.Error()
}

// The quote's questions, in the order in which the answers depend on another.
var quoteChecks = []string{"quote-signature", "quote-nonce", "quote-pcr-digest"}

func (w *work) quote() {
	r := w.record
	var given map[int]evidence.Digest
	if r.PCRs != nil {
		var err error
		given, err = tpmappraise.ParsePCRRead(string(r.PCRs))
		w.pcrs = given
		defer func() {
			// A quote vouches for what it covers; of values without one each line counts.
			if err != nil && !w.quoted {
				w.pcrs = nil
				w.checks = slices.DeleteFunc(w.checks, func(c Check) bool { return c.Name == quoteChecks[2] })
				w.say(quoteChecks[2], Fail, "PCR values: %v", err)
			}
		}()
	}
	switch {
	case r.Attest == nil && r.Signature == nil:
		w.skipQuote(0, "no quote was given")
		return
	case r.Attest == nil || r.Signature == nil:
		w.skipQuote(0, "a quote is a TPMS_ATTEST and a signature, and one of them was not given")
		return
	case r.AK == nil:
		w.skipQuote(0, "the AK was not given")
		return
	}
	selected, extra, err := tpmappraise.QuoteClaims(r.Attest)
	if err != nil {
		w.failQuote(0, err)
		return
	}
	ak, attributes, err := tpmappraise.ParseRecordedAK(r.AK)
	if err != nil {
		w.failQuote(0, err)
		return
	}
	bound, nonce := w.options.Nonce, true
	switch {
	case bound != nil:
	case r.Nonce == nil:
		bound, nonce = extra, false
	default:
		if bound, err = ParseNonce(string(r.Nonce)); err != nil {
			w.say(quoteChecks[0], NotChecked, "it is bound to nothing that a request has")
			w.failQuote(1, err)
			return
		}
	}
	if len(bound) == 0 || len(bound) > tpmappraise.MaxNonce {
		w.say(quoteChecks[0], NotChecked, "it is bound to nothing that a request has")
		w.failQuote(1, fmt.Errorf("a nonce of %d bytes; a TPM takes 1 to %d", len(bound), tpmappraise.MaxNonce))
		return
	}
	q := tpm.Quote{Attest: r.Attest, Signature: r.Signature}
	for _, pcr := range selected {
		if value, ok := given[pcr]; ok {
			q.PCRs = append(q.PCRs, tpm.PCR{Index: pcr, SHA256: value})
		}
	}
	verified, err := ak.VerifyRecordedQuote(q, bound, selected)
	at := 0
	if err != nil {
		switch evidence.CheckOf(err) {
		case tpmappraise.CheckExtraData:
			at = 1
		case tpmappraise.CheckBank, tpmappraise.CheckSelection, tpmappraise.CheckDuplicatePCR, tpmappraise.CheckRequiredPCR, tpmappraise.CheckPCRDigest:
			at = 2
		}
		w.passQuote(at, attributes, nonce)
		if at == 2 && r.PCRs == nil {
			w.skipQuote(at, "no PCR values were given")
		} else {
			w.failQuote(at, err)
		}
		return
	}
	w.passQuote(3, attributes, nonce)
	w.pcrs, w.quoted = verified.PCRs, true
}

// passQuote tells that the first n questions were answered well.
func (w *work) passQuote(n int, attributes, nonce bool) {
	whose := ""
	if w.options.Nonce == nil {
		whose = " that came with the record, which may be of any time"
	}
	if n > 0 {
		text := "the AK signed it"
		if !attributes {
			text += "; a PEM key doesn't say whether it is restricted to what a TPM states"
		}
		w.say(quoteChecks[0], Pass, "%s", text)
	}
	if n > 1 && nonce {
		w.say(quoteChecks[1], Pass, "it is bound to the nonce%s", whose)
	} else if n > 1 {
		w.say(quoteChecks[1], NotChecked, "no nonce was given: the quote may be of any time")
	}
	if n > 2 {
		w.say(quoteChecks[2], Pass, "the values are those quoted")
	}
}

func (w *work) failQuote(at int, err error) {
	w.failed(quoteChecks[at], err)
	w.skipQuote(at+1, "the quote doesn't hold")
}

func (w *work) skipQuote(from int, why string) {
	for _, name := range quoteChecks[from:] {
		w.say(name, NotChecked, "%s", why)
	}
}

func (w *work) ek() {
	const name = "ek-certificate"
	switch {
	case len(w.record.EKCertificates) == 0:
		w.say(name, NotChecked, "no EK certificate was given")
		return
	case len(w.options.EKRoots) == 0:
		w.say(name, NotChecked, "no roots were given")
		return
	}
	set := vendors.NewSet(w.options.EKRoots).With(w.options.Between)
	var good []string
	for _, c := range w.record.EKCertificates {
		cert, err := x509.ParseCertificate(c.DER)
		if err != nil {
			w.say(name, Fail, "%s: %v", c.Name, err)
			return
		}
		key := c.Key
		if key == nil {
			key, err = tpm.CertifiedPublic(cert)
		}
		if err == nil {
			_, err = tpmappraise.VerifyEK(tpm.EK{Public: key, Certificate: c.DER}, set.Roots, set.Intermediates, w.options.Now)
		}
		if err != nil {
			w.say(name, Fail, "%s: %s", c.Name, detail(err))
			return
		}
		good = append(good, c.Name)
	}
	w.say(name, Pass, "%s: by the given roots; that the AK is in the same TPM only a challenge tells", strings.Join(good, ", "))
}

// against says what values a replay was held against.
func (w *work) against() string {
	if w.quoted {
		return "the quoted values"
	}
	return "the given values, which no quote vouches for"
}

func (w *work) boot() {
	const structure, replay = "event-log-structure", "event-log-replay"
	if _, err := boot.ParseUserspace(w.record.UserspaceLog); err != nil {
		w.failed(structure, fmt.Errorf("systemd's log can't be read: %w", err))
		w.say(replay, NotChecked, "the log isn't sound")
		return
	}
	if w.record.EventLog == nil {
		w.say(structure, NotChecked, "no event log was given")
		w.say(replay, NotChecked, "no event log was given")
		return
	}
	if w.pcrs == nil {
		if log, err := boot.Parse(w.record.EventLog); err != nil {
			w.failed(structure, err)
		} else if err := log.Unsuited(); err != nil {
			w.failed(structure, err)
		} else {
			w.say(structure, Pass, "%d events can be read; their order and content are looked at with PCR values", len(log.Events))
		}
		w.say(replay, NotChecked, "no PCR values were given")
		return
	}
	facts, err := bootappraise.Appraise(w.record.EventLog, w.record.UserspaceLog, w.pcrs)
	switch {
	case evidence.CheckOf(err) == bootappraise.CheckReplay:
		w.say(structure, Pass, "")
		w.failed(replay, err)
		return
	case err != nil:
		w.failed(structure, err)
		w.say(replay, NotChecked, "the log isn't sound")
		return
	}
	w.say(structure, Pass, "")
	if missing := w.notGiven(); len(missing) > 0 {
		w.say(replay, NotChecked, "PCR %v lead to %s; of PCR %v no value was given", facts.PCRsReplayed, w.against(), missing)
	} else {
		w.say(replay, Pass, "PCR %v lead to %s", facts.PCRsReplayed, w.against())
	}
	w.bootFacts = &facts
	w.facts.Facts, w.facts.SecureBoot, w.facts.KernelCommandLine = facts, facts.SecureBoot, facts.KernelCommandLine
	w.facts.PCRsReplayed = append(w.facts.PCRsReplayed, facts.PCRsReplayed...)
	w.facts.Components = append(w.facts.Components, facts.Components...)
}

// notGiven are the firmware's PCRs, 0 to 7, of which the log has events and nobody
// gave a value: a log that is held against few of them may be another boot's.
func (w *work) notGiven() (missing []int) {
	log, err := boot.Parse(w.record.EventLog)
	if err != nil {
		return nil // which the appraisal has said
	}
	for pcr := range 8 {
		_, given := w.pcrs[pcr]
		extends := func(e boot.Event) bool { return e.PCR == uint32(pcr) && e.Type != boot.NoAction }
		if !given && slices.ContainsFunc(log.Events, extends) {
			missing = append(missing, pcr)
		}
	}
	return missing
}

func (w *work) ima() {
	const replay, aggregate = "ima-replay", "ima-boot-aggregate"
	skip := func(why string) {
		w.say(replay, NotChecked, "%s", why)
		w.say(aggregate, NotChecked, "%s", why)
	}
	list := w.record.IMA
	if list == nil {
		skip("no IMA list was given")
		return
	}
	if ima.IsASCII(list) {
		var err error
		if list, err = ima.FromASCII(list); err != nil {
			w.failed(replay, err)
			w.say(aggregate, NotChecked, "the list can't be read")
			return
		}
	}
	if len(list) > 0 && len(bytes.Trim(list, "\x00")) == 0 {
		w.failed(replay, fmt.Errorf("the file is %d zeros, and no list: it was lost, perhaps when the machine crashed", len(list)))
		w.say(aggregate, NotChecked, "the list can't be read")
		return
	}
	if w.pcrs == nil {
		entries, err := imaappraise.CheckDigests(list)
		if err != nil {
			w.failed(replay, err)
			w.say(aggregate, NotChecked, "the list doesn't hold")
			return
		}
		w.say(replay, NotChecked, "no PCR values were given; the template digests of %d entries are those of their data", entries)
		w.say(aggregate, NotChecked, "no PCR values were given")
		return
	}
	r, err := imaappraise.Appraise(imaappraise.State{}, list, w.pcrs)
	switch {
	case evidence.CheckOf(err) == imaappraise.CheckAggregate:
		w.say(replay, NotChecked, "the boot aggregate doesn't hold")
		w.failed(aggregate, err)
		return
	case err != nil:
		w.failed(replay, err)
		w.say(aggregate, NotChecked, "the list doesn't hold")
		return
	}
	s := r.State
	w.facts.IMA = &IMA{Entries: s.Entries + r.Tail, Proven: s.Entries, Violations: s.Violations, AggregatePCRs: s.Aggregate, Bank: s.Bank}
	for m := range r.Measurements() {
		if m.IsAggregate() {
			w.facts.IMA.BootAggregate = m.Digest
		}
		w.measured = append(w.measured, m)
	}
	w.facts.PCRsReplayed = append(w.facts.PCRsReplayed, s.PCRs()...)
	if s.Entries == 0 && r.Tail > 0 {
		w.say(replay, NotChecked, "none of %d entries leads to %s", r.Tail, w.against())
	} else {
		w.say(replay, Pass, "%d of %d entries lead to %s", s.Entries, s.Entries+r.Tail, w.against())
	}
	if s.Aggregate == "" {
		w.say(aggregate, NotChecked, "it isn't of SHA-256, or PCR 0 to 7 were not given")
	} else {
		w.say(aggregate, Pass, "it stands for PCR %s", s.Aggregate)
	}
}

func (w *work) reference() {
	const name = "reference"
	want := w.options.Reference
	if want == nil {
		w.say(name, NotChecked, "no reference set was given")
		return
	}
	diffs := want.Mismatch(w.bootFacts, w.pcrs)
	if want.IMA != nil {
		rules, err := want.IMA.Compile()
		switch {
		case err != nil:
			diffs = append(diffs, err.Error())
		case w.facts.IMA == nil:
			diffs = append(diffs, "no IMA list was proven")
		case !slices.ContainsFunc(w.measured, func(m imaappraise.Measurement) bool { return !m.IsAggregate() && !m.Violation }):
			diffs = append(diffs, "no file was measured: its IMA policy is not in force")
		default:
			for _, m := range w.measured {
				if why := rules.Judge(m); why != "" {
					if rules.Observes() || !rules.Holds(m) {
						continue
					}
					diffs = append(diffs, why)
				}
			}
		}
	}
	if len(diffs) > 0 {
		w.say(name, Fail, "%s", reference.Words(diffs))
		return
	}
	w.say(name, Pass, "everything that was shown is in the set")
}

// ParseNonce reads a nonce's hex, with what surrounds it in files.
func ParseNonce(text string) ([]byte, error) {
	b, err := hex.DecodeString(strings.TrimSpace(text))
	if err != nil || len(b) == 0 {
		return nil, errors.New("a nonce is written in hex")
	}
	return b, nil
}
