// Package appraise replays a host's IMA list against a quote: what of it the
// TPM's word covers, and what it says of the files that were measured.
//
// It trusts PCR values that an accepted quote proved, and nothing of the list
// itself. It promises that a measurement which it hands on was extended by that
// host in this boot, in this place of the list; what stands behind the quoted
// state, the tail, is not handed on. A violation proves that something could
// not be measured, and not what.
//
// A list only grows, so a State remembers how far it is proven, and the next
// request carries what is new. A State belongs to one boot; its owner throws
// it away with the boot.
package appraise

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
)

const (
	CheckList      evidence.Check = "ima-list"           // the list is malformed, or larger than is looked at
	CheckReplay    evidence.Check = "ima-replay"         // no prefix of it leads to the quoted value
	CheckAggregate evidence.Check = "ima-boot-aggregate" // its first entry doesn't stand for the quoted boot
)

// A Bank is how a kernel extends the SHA-256 bank.
type Bank string

const (
	Native Bank = "sha256"      // by the SHA-256 of an entry's data
	Padded Bank = "sha1-padded" // by the SHA-1, and zeros: Linux before 5.8; only as strong as SHA-1
)

// A State is how far a list is proven. The zero value is the start of a boot.
type State struct {
	Offset     int    // bytes of the list
	Entries    int    // in them
	Violations int    // among them
	Bank       Bank   // empty while there are no entries
	Aggregate  string // which PCRs the boot aggregate stands for: "0-7", "0-9", or "" where it isn't of SHA-256 or PCR 0-7 aren't quoted
	digestSize int
	values     map[int]evidence.Digest // of the PCRs that entries name
}

// PCRs are those that the proven entries were extended into.
func (s State) PCRs() (pcrs []int) {
	for _, pcr := range slices.Sorted(maps.Keys(s.values)) {
		if !s.values[pcr].IsZero() {
			pcrs = append(pcrs, pcr)
		}
	}
	return pcrs
}

// A Result is what an appraisal found.
type Result struct {
	State State // for the next delivery
	Tail  int   // entries behind the proven ones: measured after the quote

	proven []byte
	prior  State
}

// Appraise replays list, which continues at prior's offset, against the quoted
// values. An error is a *evidence.Rejected.
func Appraise(prior State, list []byte, quoted map[int]evidence.Digest) (Result, error) {
	if prior.Offset+len(list) > ima.MaxList {
		return Result{}, reject(CheckList, "more than %d bytes in one boot", ima.MaxList)
	}
	var hypotheses []*replay
	switch prior.Bank {
	case "":
		hypotheses = []*replay{start(Native, prior, quoted), start(Padded, prior, quoted)}
	default:
		hypotheses = []*replay{start(prior.Bank, prior, quoted)}
	}
	aggregate := prior.Aggregate
	var proven *replay
	at, entries, violations, end := prior, prior.Entries, prior.Violations, 0
	note := func() {
		for _, h := range hypotheses {
			if h.matches() {
				proven = h
				at = State{Offset: prior.Offset + end, Entries: entries, Violations: violations, values: maps.Clone(h.values)}
			}
		}
	}
	note()
	r := ima.NewReader(list, prior.digestSize)
	for r.More() {
		e, f, err := r.Next()
		if err != nil {
			return Result{}, reject(CheckList, "after %d proven: %v", prior.Entries, err)
		}
		if entries++; entries > ima.MaxEntries {
			return Result{}, reject(CheckList, "more than %d entries in one boot", ima.MaxEntries)
		}
		if entries == 1 {
			if aggregate, err = bootAggregate(e, f, quoted); err != nil {
				return Result{}, err
			}
		}
		end = r.Offset()
		native, padded, err := extended(e)
		if err != nil {
			return Result{}, reject(CheckReplay, "entry %d, %s: %v", entries-1, quote(f.Name), err)
		}
		if e.Violation() {
			violations++
		}
		for _, h := range hypotheses {
			if h.bank == Native {
				h.extend(e.PCR, native, quoted)
			} else {
				h.extend(e.PCR, padded, quoted)
			}
		}
		note()
	}
	if proven == nil {
		return Result{}, unproven(hypotheses, entries, quoted)
	}
	at.Aggregate, at.digestSize = aggregate, r.DigestSize()
	if at.Entries > 0 {
		at.Bank = proven.bank
	}
	return Result{State: at, Tail: entries - at.Entries, proven: list[:at.Offset-prior.Offset], prior: prior}, nil
}

// A replay is one hypothesis of how the kernel extends.
type replay struct {
	bank    Bank
	values  map[int]evidence.Digest
	differs int // of the values, how many aren't the quoted ones
}

func start(bank Bank, prior State, quoted map[int]evidence.Digest) *replay {
	r := &replay{bank: bank, values: maps.Clone(prior.values)}
	if r.values == nil {
		// Whatever PCRs a list names, IMA's own has to be explained: root can make up
		// a list for a PCR that it extends itself.
		r.values = map[int]evidence.Digest{ima.DefaultPCR: {}}
	}
	for pcr, value := range r.values {
		if differs(value, pcr, quoted) {
			r.differs++
		}
	}
	return r
}

func (r *replay) extend(pcr int, with evidence.Digest, quoted map[int]evidence.Digest) {
	was, named := r.values[pcr]
	if named && differs(was, pcr, quoted) {
		r.differs--
	}
	var b [2 * sha256.Size]byte
	copy(b[:], was[:])
	copy(b[sha256.Size:], with[:])
	now := evidence.Digest(sha256.Sum256(b[:]))
	r.values[pcr] = now
	if differs(now, pcr, quoted) {
		r.differs++
	}
}

// differs says that a PCR's value isn't the quoted one; one that wasn't quoted
// has none, which isn't the same as zeros.
func differs(value evidence.Digest, pcr int, quoted map[int]evidence.Digest) bool {
	want, ok := quoted[pcr]
	return !ok || value != want
}

func (r *replay) matches() bool { return r.differs == 0 }

// extended is what an entry extends a SHA-256 bank by, in both ways, after its
// template digest was held against its data.
func extended(e ima.Entry) (native, padded evidence.Digest, err error) {
	if e.Violation() {
		for i := range native {
			native[i] = 0xff
		}
		copy(padded[:], native[:sha1.Size])
		return native, padded, nil
	}
	hashed := e.Hashed()
	native = sha256.Sum256(hashed)
	short := sha1.Sum(hashed)
	copy(padded[:], short[:])
	var want []byte
	switch len(e.TemplateDigest) {
	case sha1.Size:
		want = short[:]
	case sha256.Size:
		want = native[:]
	default:
		return native, padded, nil // of no bank that is quoted
	}
	if !slices.Equal(want, e.TemplateDigest) {
		return native, padded, fmt.Errorf("its template digest %x is not that of its data, %x", e.TemplateDigest, want)
	}
	return native, padded, nil
}

// bootAggregate holds a list's first entry against the quoted boot: the digest
// of PCR 0–7, from Linux 5.8 on of 0–9. Of another bank than SHA-256, and where not
// all of PCR 0–7 are quoted, nothing is known.
func bootAggregate(e ima.Entry, f ima.File, quoted map[int]evidence.Digest) (string, error) {
	if f.Name != "boot_aggregate" || e.Violation() {
		what := quote(f.Name)
		if e.Violation() {
			what = "a violation, which proves no digest"
		}
		return "", reject(CheckAggregate, "the list begins with %s, not with boot_aggregate", what)
	}
	if f.Algorithm != "sha256" {
		return "", nil
	}
	h := sha256.New()
	for pcr := range 10 {
		value, ok := quoted[pcr]
		if !ok && pcr < 8 {
			return "", nil
		}
		if !ok {
			break
		}
		h.Write(value[:])
		if sum := h.Sum(nil); (pcr == 7 || pcr == 9) && slices.Equal(sum, f.Digest) {
			return fmt.Sprintf("0-%d", pcr), nil
		}
	}
	return "", reject(CheckAggregate, "boot_aggregate %x is the digest neither of the quoted PCR 0-7 nor of 0-9: the list is of another boot", f.Digest)
}

// CheckDigests holds each entry's template digest against its data, which needs no
// PCR, and counts the entries. It proves that nobody changed an entry and left its
// digest, and nothing more: an error is a *evidence.Rejected.
func CheckDigests(list []byte) (entries int, err error) {
	r := ima.NewReader(list, 0)
	for ; r.More(); entries++ {
		e, f, err := r.Next()
		if err != nil {
			return entries, reject(CheckList, "%v", err)
		}
		if _, _, err := extended(e); err != nil {
			return entries, reject(CheckReplay, "entry %d, %s: %v", entries, quote(f.Name), err)
		}
	}
	return entries, nil
}

func unproven(hypotheses []*replay, entries int, quoted map[int]evidence.Digest) error {
	var pcrs []string
	for _, pcr := range slices.Sorted(maps.Keys(hypotheses[0].values)) {
		if value, ok := quoted[pcr]; ok {
			pcrs = append(pcrs, fmt.Sprintf("PCR %d, quoted %s, is %s at its end", pcr, value, hypotheses[0].values[pcr]))
		} else {
			pcrs = append(pcrs, fmt.Sprintf("PCR %d isn't quoted", pcr))
		}
	}
	if _, ok := quoted[ima.DefaultPCR]; ok && entries == 0 {
		return reject(CheckReplay, "PCR %d is quoted as %s and the list is empty", ima.DefaultPCR, quoted[ima.DefaultPCR])
	}
	return reject(CheckReplay, "no prefix of the %d entries leads to the quoted values: %s", entries, strings.Join(pcrs, "; "))
}

// A Measurement is one proven entry.
type Measurement struct {
	Index     int // in the list, from 0
	PCR       int
	Violation bool   // then what follows is only what the list claims
	Name      string // with '_' where the path has a space
	Digest    string // "sha256:…", as policies write it; "verity:sha256:…" for fs-verity's
	Signature []byte // the security.ima attribute; nil: none
}

// IsAggregate says whether m is the list's own first entry, which measures no file.
func (m Measurement) IsAggregate() bool { return m.Index == 0 }

// Measurements are those of this delivery that are proven.
func (r Result) Measurements() iter.Seq[Measurement] {
	return func(yield func(Measurement) bool) {
		reader := ima.NewReader(r.proven, r.State.digestSize)
		for n := r.prior.Entries; reader.More(); n++ {
			e, f, err := reader.Next()
			if err != nil {
				return // Appraise has read it
			}
			text := f.Algorithm + ":" + hex.EncodeToString(f.Digest)
			if f.Verity {
				text = "verity:" + text
			}
			if !yield(Measurement{Index: n, PCR: e.PCR, Violation: e.Violation(), Name: f.Name, Digest: text, Signature: f.Signature}) {
				return
			}
		}
	}
}

func reject(check evidence.Check, format string, args ...any) error {
	return &evidence.Rejected{Check: check, Detail: fmt.Sprintf(format, args...)}
}

// quote makes a host's text safe to print, and short.
func quote(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return fmt.Sprintf("%q", s)
}
