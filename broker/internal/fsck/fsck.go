// Package fsck checks what of the invariants can be seen in store and audit
// log, without writing to either and while a broker may be running on them.
package fsck

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/internal/audit"
	"github.com/countersign/countersign/broker/internal/inventory"
	"github.com/countersign/countersign/broker/internal/journal"
	"github.com/countersign/countersign/broker/internal/store"
)

// A Violation is an invariant that does not hold.
type Violation struct {
	Invariant string `json:"invariant"`
	Detail    string `json:"detail"`
}

// A Report is what was looked at and what was wrong.
type Report struct {
	Records    int64       `json:"records"`
	Grants     int         `json:"grants"`
	Hosts      int         `json:"hosts"`
	Violations []Violation `json:"violations"`
}

// The invariants, in the words that scripts can look for.
const (
	AuditIntact    = "audit-intact"     // the log is what it was when it was written
	AllowFirst     = "allow-first"      // no grant without an allow recorded before it
	NothingLost    = "nothing-lost"     // every grant is ended, or will be looked at in time
	EndsRecorded   = "ends-recorded"    // what was issued and what ended stands in the log
	SilentSecrets  = "silent-secrets"   // no record looks like it holds a secret
	HostsAdmitted  = "hosts-admitted"   // no trusted host that nobody admitted
	OnlyTrustedNow = "revoked-on-no"    // no working lease of a host that was refused
	overdueBy      = 5 * time.Minute    // of a grant's due time, before it counts as forgotten
	secretPattern  = "hvs."             // of Vault's service tokens
	privatePattern = "PRIVATE KEY-----" // of PEM
)

// Check looks at everything once.
func Check(ctx context.Context, s *store.Store, now time.Time) (Report, error) {
	r := Report{Violations: []Violation{}}
	bad := func(invariant, format string, args ...any) {
		r.Violations = append(r.Violations, Violation{invariant, fmt.Sprintf(format, args...)})
	}
	err := s.View(ctx, func(tx *store.Tx) error {
		n, _, err := audit.Verify(tx)
		r.Records = n
		if err != nil {
			bad(AuditIntact, "%v", err)
		}
		told, err := readLog(tx, bad)
		if err != nil {
			return err
		}
		hosts, err := inventory.All(tx)
		if err != nil {
			return err
		}
		r.Hosts = len(hosts)
		byID := map[string]inventory.Host{}
		for _, h := range hosts {
			byID[h.ID] = h
			if (h.State == inventory.Trusted || h.State == inventory.Stale) && !h.Admitted {
				bad(HostsAdmitted, "host %s is %s, but nobody admitted it", h.ID, h.State)
			}
		}
		grants, err := journal.List(tx, journal.Filter{})
		if err != nil {
			return err
		}
		r.Grants = len(grants)
		for _, g := range grants {
			checkGrant(g, told, byID[g.Host], now, bad)
		}
		return nil
	})
	return r, err
}

// told is what the log says of each grant.
type told struct{ allowed, issued, ended map[string]int64 }

func readLog(tx *store.Tx, bad func(string, string, ...any)) (told, error) {
	t := told{map[string]int64{}, map[string]int64{}, map[string]int64{}}
	const page = 1000
	for from := int64(0); ; from += page {
		n := 0
		err := audit.Read(tx, from, page, func(index int64, body []byte) error {
			n++
			for _, pattern := range []string{secretPattern, privatePattern} {
				if bytes.Contains(body, []byte(pattern)) {
					bad(SilentSecrets, "record %d holds %q", index, pattern)
				}
			}
			var rec audit.Record
			if err := json.Unmarshal(body, &rec); err != nil {
				return nil // AuditIntact says so
			}
			switch rec.Kind {
			case "credential.allowed", "credential.adopted":
				t.allowed[rec.Lease] = index
			case "credential.issued":
				t.issued[rec.Lease] = index
			case "credential.ended":
				t.ended[rec.Lease] = index
			}
			return nil
		})
		if err != nil || n < page {
			return t, err
		}
	}
}

func checkGrant(g journal.Grant, t told, h inventory.Host, now time.Time, bad func(string, string, ...any)) {
	allowed, ok := t.allowed[g.ID]
	if !ok {
		bad(AllowFirst, "lease %s of scope %s has no allow in the audit log", g.ID, g.Scope)
	}
	if issued, was := t.issued[g.ID]; was && ok && issued < allowed {
		bad(AllowFirst, "lease %s was issued in record %d, before its allow in %d", g.ID, issued, allowed)
	}
	if _, ended := t.ended[g.ID]; (g.State == journal.Gone) != ended {
		bad(EndsRecorded, "lease %s is %s, and the audit log says otherwise", g.ID, g.State)
	}
	if _, err := process.Parse(g.Subject); err != nil {
		bad(AllowFirst, "lease %s: its subject: %v", g.ID, err)
	}
	if g.State == journal.Gone {
		return
	}
	if g.Due.IsZero() {
		bad(NothingLost, "lease %s is %s and nobody will look at it again", g.ID, g.State)
	} else if now.Sub(g.Due) > overdueBy {
		bad(NothingLost, "lease %s is %s and was due at %s", g.ID, g.State, g.Due.Format(time.RFC3339))
	}
	refused := h.State == inventory.Failed || h.State == inventory.Quarantined || h.State == inventory.Removed
	if refused && (g.State == journal.Live || g.State == journal.Retiring) {
		bad(OnlyTrustedNow, "lease %s is %s, but its host %s is %s", g.ID, g.State, g.Host, h.State)
	}
	if strings.Contains(g.LastError, secretPattern) {
		bad(SilentSecrets, "lease %s: its last error holds a token", g.ID)
	}
}
