// Package findings keeps what the watch found: one finding for each cause, open
// until an operator closes it or evidence shows that its cause is over, and open again
// when it happens again.
//
// The watch is trusted for what a finding says, as far as its role reaches, and
// not for being well made: what it sends is checked and bounded here. The broker
// itself decides what is open, and from that how much risk a host bears.
//
// Promise: a cause has one finding, and reporting it again changes no more than
// what it says. What happened before a finding was closed, or before the end that
// its closing has, never reopens it. The watch closes only what can be over by itself
// and was not acted on, and nothing that it closed stays so over more that it sees.
package findings

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/broker/api/detector"
)

// A Severity is how much a finding matters.
type Severity string

// risks are the severities, and the risk that each means for its subject.
var risks = map[Severity]int64{"low": 10, "medium": 30, "high": 60, "critical": 90}

// A Status is where a finding stands.
type Status string

const (
	Open   Status = "open"
	Closed Status = "closed"
)

// A Finding is one cause for concern.
type Finding struct {
	ID       string   `json:"-"`
	Detector string   `json:"-"`
	Cause    string   `json:"-"` // tells a detector's causes apart
	Severity Severity `json:"-"`
	Lease    string   `json:"-"`
	Host     string   `json:"-"` // id; of the lease, where the journal has it
	Scope    string   `json:"-"` // of the lease; empty: it concerns all that the host has
	Account  string   `json:"-"`
	Status   Status   `json:"-"`
	// Opened is its place in the order in which findings were opened or reopened.
	Opened int64     `json:"-"`
	First  time.Time `json:"-"` // sighting
	Last   time.Time `json:"-"`
	Count  int64     `json:"-"` // of sightings

	NHI      string            `json:"nhi,omitempty"`
	Why      string            `json:"why,omitempty"`
	Evidence []json.RawMessage `json:"evidence,omitempty"` // sightings
	Response string            `json:"response,omitempty"` // what the watch did
	Closed   time.Time         `json:"closed,omitzero"`
	ClosedBy string            `json:"closed_by,omitempty"`
	Reason   string            `json:"reason,omitempty"` // for closing it
	Until    time.Time         `json:"until,omitzero"`   // closed until then
	Over     bool              `json:"over,omitempty"`   // closed by evidence: of what was seen up to Last

	// Unreadable is why the row can't be read; only what its columns hold is known then.
	// List returns such a finding with the others, Load fails on it.
	Unreadable error `json:"-"`
}

// Bounds of what is kept.
const (
	maxText          = 512
	maxEvidence      = 20
	maxEvidenceBytes = 4 << 10
)

var maxOpen = 100_000 // a test lowers it

// ErrFull says that there are as many open findings as may be.
var ErrFull = fmt.Errorf("%d findings are open, which is all that are kept: close what was looked into", maxOpen)

// responses are what a watch can have done.
var responses = map[string]bool{"": true, "alert": true, "step-up": true, "revoke": true, "quarantine": true}

// Check says what is wrong with a report.
func (f Finding) Check() error {
	for _, t := range []struct {
		name, text string
		needed     bool
	}{
		{"detector", f.Detector, true}, {"cause", f.Cause, true}, {"nhi", f.NHI, false}, {"lease", f.Lease, false},
		{"host", f.Host, false}, {"account", f.Account, false}, {"why", f.Why, false},
	} {
		if t.needed && t.text == "" {
			return fmt.Errorf("a finding without its %s", t.name)
		}
		if len(t.text) > maxText {
			return fmt.Errorf("%s has %d bytes; at most %d are kept", t.name, len(t.text), maxText)
		}
	}
	switch {
	case risks[f.Severity] == 0:
		return fmt.Errorf("severity %.32q is none of low, medium, high, critical", f.Severity)
	case !responses[f.Response]:
		return fmt.Errorf("response %.32q is none of alert, step-up, revoke, quarantine", f.Response)
	case f.First.UnixMilli() <= 0 || f.Last.Before(f.First):
		return errors.New("a finding has a first sighting, and a last that is not before it")
	case f.Count < 1:
		return errors.New("a finding counts its sightings")
	case len(f.Evidence) > maxEvidence:
		return fmt.Errorf("%d sightings as evidence; at most %d are kept", len(f.Evidence), maxEvidence)
	}
	for i, e := range f.Evidence {
		if len(e) > maxEvidenceBytes {
			return fmt.Errorf("evidence %d has %d bytes; at most %d are kept", i+1, len(e), maxEvidenceBytes)
		}
		if !json.Valid(e) || bytes.TrimLeft(e, " \t\r\n")[0] != '{' {
			return fmt.Errorf("evidence %d is no JSON object", i+1)
		}
	}
	return nil
}

// reported is f as a report r leaves it, and whether that reopens it. Nothing has
// happened later than now: a clock that is ahead must not keep a finding closed.
func reported(f, r Finding, now time.Time) (Finding, bool) {
	if r.Last.After(now) {
		r.Last = now
	}
	r.First, r.Last = r.First.Truncate(time.Millisecond), r.Last.Truncate(time.Millisecond) // as they are kept
	if r.First.After(r.Last) {
		r.First = r.Last
	}
	end := f.Closed
	switch {
	case f.Over:
		end = f.Last
	case !f.Until.IsZero():
		end = f.Until
	}
	again := f.Status == Closed && r.Last.After(f.Last) && r.Last.After(end) || f.Over && r.Count > f.Count
	if f.Detector != "" {
		r = r.onTopOf(f)
	}
	r.ID, r.Status, r.Opened = f.ID, f.Status, f.Opened
	r.Closed, r.ClosedBy, r.Reason, r.Until, r.Over = f.Closed, f.ClosedBy, f.Reason, f.Until, f.Over
	if again {
		r.Status, r.Closed, r.ClosedBy, r.Reason, r.Until, r.Over = Open, time.Time{}, "", "", time.Time{}, false
	}
	return r, again
}

// onTopOf is a report with what was known before. Whoever reports makes nothing less of
// a finding: evidence closes what passes (Settles), and all else is an operator's.
func (f Finding) onTopOf(before Finding) Finding {
	f.NHI, f.Lease, f.Host, f.Scope, f.Account = before.NHI, before.Lease, before.Host, before.Scope, before.Account
	if risks[f.Severity] < risks[before.Severity] {
		f.Severity = before.Severity
	}
	if before.First.Before(f.First) {
		f.First = before.First
	}
	if f.Last.Before(before.Last) {
		f.Last = before.Last
	}
	f.Count = max(f.Count, before.Count)
	if len(f.Evidence) < len(before.Evidence) {
		f.Evidence = before.Evidence
	}
	if f.Response == "" || f.Response == "alert" {
		f.Response = cmp.Or(before.Response, f.Response)
	}
	return f
}

// passing are the detectors of what can be over: a state, or something that the ledger
// had late. What somebody did is for somebody to look into.
var passing = map[detector.Name]bool{detector.SilentSensor: true, detector.Dormant: true, detector.UnmatchedLogin: true, detector.OutOfBandRead: true}

// Settles says whether evidence may close f: nothing that was acted on.
func (f Finding) Settles() bool {
	return f.Status == Open && passing[detector.Name(f.Detector)] && f.Severity != "critical" && (f.Response == "" || f.Response == "alert")
}

// A Risk is what a host's open findings mean for it, by scope; under "" for all.
type Risk map[string]int64

// Of is the risk of the host's programs in one scope; nil without a finding.
func (r Risk) Of(scope string) *int64 {
	most, ok := r[""]
	if own, has := r[scope]; has {
		most, ok = max(most, own), true
	}
	if !ok {
		return nil
	}
	return &most
}
