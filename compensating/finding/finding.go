// Package finding is what the watch says: one finding for each cause, with the
// sightings that show it, however many there are.
//
// Detections of one detector about one lease, or about one account where there is
// no lease, have one cause, unless the detector says what tells its causes apart.
package finding

import (
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
)

// maxEvidence is how many sightings a finding keeps: the first ones, and the last.
const maxEvidence = 20

// A Finding is one cause for concern.
type Finding struct {
	Detector detect.Name     `json:"detector"`
	Severity detect.Severity `json:"severity"`
	NHI      string          `json:"nhi"` // of OWASP's Non-Human Identities Top 10, 2025
	Lease    string          `json:"lease,omitempty"`
	Host     string          `json:"host,omitempty"`
	Account  string          `json:"account,omitempty"`
	Why      string          `json:"why"`
	First    time.Time       `json:"first"`
	Last     time.Time       `json:"last"`
	Count    int             `json:"count"` // of what was seen of it
	// Evidence is what was seen, the first of it and the last.
	Evidence []sightings.Sighting `json:"evidence"`
}

// A Key tells a cause.
type Key struct {
	Detector detect.Name
	Cause    string
}

// Of is the cause of a detection.
func Of(d detect.Detection) Key {
	cause := d.Cause
	switch {
	case cause != "":
	case d.Lease != "":
		cause = "lease " + d.Lease
	default:
		cause = "account " + d.Account
	}
	return Key{d.Detector, cause}
}

// A Book has the findings by their causes.
type Book map[Key]*Finding

// Add enters a detection, and says whether its cause is new.
func (b Book) Add(d detect.Detection) (*Finding, bool) {
	key := Of(d)
	f := b[key]
	fresh := f == nil
	if fresh {
		e := detect.Of(d.Detector)
		f = &Finding{Detector: d.Detector, Severity: e.Severity, NHI: e.NHI, Lease: d.Lease, Host: d.Host, Account: d.Account, Why: d.Why,
			First: d.Time, Last: d.Time, Evidence: []sightings.Sighting{}}
		b[key] = f
	}
	if d.Sighting == nil {
		if !fresh && !d.Time.After(f.Last) {
			return f, false // the ledger shows the same as before
		}
		d.Sighting = &sightings.Sighting{Time: d.Time, Kind: sightings.Issue, Source: "ledger", Account: d.Account}
	}
	f.Count++
	if d.Time.Before(f.First) {
		f.First = d.Time
	}
	if d.Time.After(f.Last) {
		f.Last = d.Time
	}
	f.evidence(*d.Sighting)
	return f, fresh
}

// evidence keeps the earliest sightings, and the latest one.
func (f *Finding) evidence(s sightings.Sighting) {
	at, _ := slices.BinarySearchFunc(f.Evidence, s, func(a, b sightings.Sighting) int {
		if c := a.Time.Compare(b.Time); c != 0 {
			return c
		}
		if c := strings.Compare(a.Source, b.Source); c != 0 {
			return c
		}
		return int(a.Line - b.Line)
	})
	f.Evidence = slices.Insert(f.Evidence, at, s)
	if len(f.Evidence) > maxEvidence {
		f.Evidence = slices.Delete(f.Evidence, maxEvidence-1, maxEvidence)
	}
}

// Sorted are the findings by time, then by what they are.
func (b Book) Sorted() []*Finding {
	out := make([]*Finding, 0, len(b))
	for _, f := range b {
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, c *Finding) int {
		if n := a.First.Compare(c.First); n != 0 {
			return n
		}
		return strings.Compare(string(a.Detector)+" "+a.Lease+" "+a.Account, string(c.Detector)+" "+c.Lease+" "+c.Account)
	})
	return out
}
