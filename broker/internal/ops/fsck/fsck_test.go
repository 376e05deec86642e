package fsck_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/ops/fsck"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func open(t *testing.T) *store.Store {
	t.Helper()
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		if _, err := audit.Append(tx, event.Record{Time: now, Actor: "host:h", Host: "h"}, event.Enrolment{As: event.HostAdmitted, Name: "h", State: "trusted", AK: evidence.Sum([]byte("ak"))}); err != nil {
			return err
		}
		return inventory.Save(tx, inventory.Host{ID: "h", Name: "h", State: inventory.Trusted, Admitted: true, AKPublic: []byte("ak"), LastProved: now})
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

// issue writes leases with their allows, the first one's at a time, a second after each other.
func issue(t *testing.T, s *store.Store, at time.Time, ids ...string) {
	t.Helper()
	// Inside of a lease & is written otherwise than in the first version of subjects.
	subject, err := process.Program{Boot: "00000000-0000-4000-8000-000000000000", PID: 1, Start: 1, User: "a", Executables: process.OneFile("/bin/a & b", evidence.Sum([]byte("a"))), Linux: &process.Linux{}}.EncodeAs(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for i, id := range ids {
			at := at.Add(time.Duration(i) * time.Second)
			if _, err := audit.Append(tx, event.Record{Time: at, Actor: "host:h", Host: "h", Scope: "s", Lease: id}, event.Allowed{}); err != nil {
				return err
			}
			if err := journal.Save(tx, journal.Lease{ID: id, Host: "h", Scope: "s", Kind: vault.Kind.Name, State: journal.Live, Subject: subject, Issued: at, Due: now.Add(time.Hour)}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func end(t *testing.T, s *store.Store, id string) {
	t.Helper()
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		g, err := journal.Load(tx, id)
		if err != nil {
			return err
		}
		g.State, g.Ended, g.Due = journal.Gone, now, time.Time{}
		if _, err := audit.Append(tx, event.Record{Time: now, Actor: "broker", Host: "h", Lease: id}, event.Outcome{As: event.CredentialEnded}); err != nil {
			return err
		}
		return journal.Save(tx, g)
	}); err != nil {
		t.Fatal(err)
	}
}

// A broker that goes on between two pages makes no violation, and one that is there is
// found all the same.
func TestWhileTheBrokerGoesOn(t *testing.T) {
	s := open(t)
	const n = 1200
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("l%05d", i))
	}
	issue(t, s, now.Add(-n*time.Second), ids...)
	went := 0
	report, err := fsck.Check(t.Context(), s, now, func(what string, done, _ int64) {
		if what != "leases" {
			return
		}
		// Behind the log's end, as it was read: an old lease ends, a new one comes.
		end(t, s, fmt.Sprintf("l%05d", n-1-went))
		issue(t, s, now.Add(time.Duration(went)*time.Second), fmt.Sprintf("new%d", went))
		went++
	})
	if err != nil || report.Total != 0 || went < 3 {
		t.Fatalf("%+v after %d changes, %v", report.Violations, went, err)
	}
	for _, c := range []struct{ name, damage, invariant string }{
		{"an end that was forgotten", `UPDATE grants SET state = 'gone', due = 0 WHERE id = 'l00001'`, fsck.EndsRecorded},
		{"a lease that nobody ends", `UPDATE grants SET due = 0 WHERE id = 'l00002'`, fsck.NothingLost},
		{"a lease without an allow", `UPDATE grants SET id = 'other' WHERE id = 'l00003'`, fsck.AllowFirst},
		{"a number that isn't true", `UPDATE counts SET n = n + 1 WHERE topic = 'hosts'`, fsck.CountsTrue},
		{"a record that was changed", `UPDATE audit_records SET body = replace(body, 'host:h', 'host:x') WHERE idx = 700`, fsck.AuditIntact},
		{"a record that was cut out", `DELETE FROM audit_records WHERE idx = 1100`, fsck.AuditIntact},
		{"records that were cut off", `DELETE FROM audit_records WHERE idx > 1190`, fsck.AuditIntact},
		{"a host that nobody let in", `UPDATE hosts SET admitted = 0`, fsck.HostsAdmitted},
		{"a body that can't be read", `UPDATE grants SET body = 'x' WHERE id = 'l00004'`, fsck.NothingLost},
		{"a host that can't be read", `UPDATE hosts SET labels = 'x'`, fsck.HostsReadable},
		{"a secret among the records", `UPDATE audit_records SET body = replace(body, '"actor"', '"x":"hvs.CAES","actor"') WHERE idx = 3`, fsck.SilentSecrets},
		{"a lease of a refused host", `UPDATE hosts SET state = 'failed'`, fsck.OnlyTrustedNow},
		{"a changed hash, beside more than are listed", `UPDATE audit_hashes SET hash = zeroblob(32) WHERE idx = 1500`, fsck.AuditIntact},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(c.damage); return err }); err != nil {
				t.Fatal(err)
			}
			report, err := fsck.Check(t.Context(), s, now, func(string, int64, int64) {})
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range report.Violations {
				if v.Invariant == c.invariant {
					return
				}
			}
			t.Errorf("%s isn't among %d violations", c.invariant, report.Total)
		})
	}
}

// A lease is overdue by the broker's own time: not because the wall clock was set
// forward, or because the broker is stopped.
func TestOverdueByTheBrokersTime(t *testing.T) {
	s := open(t)
	issue(t, s, now, "l")
	wall := now.Add(5 * time.Hour)
	for at, want := range map[time.Time]int{now.Add(30 * time.Minute): 0, now.Add(2 * time.Hour): 1} {
		if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES ('silence.alive', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, fmt.Sprint(store.Millis(at)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		report, err := fsck.Check(t.Context(), s, wall, func(string, int64, int64) {})
		if err != nil || report.Total != want {
			t.Errorf("served until %s: %+v, %v; want %d violations", at, report.Violations, err, want)
		}
	}
}
