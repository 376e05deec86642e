package hostapi

import (
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// witnesses is a desk with two hosts of one lease each, issued an hour ago.
func witnesses(t *testing.T) (d *Desk, now time.Time, ours *challenge.Conn) {
	t.Helper()
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, name := range []string{"ours", "theirs"} {
			conn := &challenge.Conn{KeySPKI: []byte(name)}
			h := inventory.Host{ID: name, State: inventory.Trusted, Admitted: true, TLSKey: conn.Key()}
			g := journal.Lease{ID: "lease-" + name, Host: name, Scope: "billing-db", State: journal.Live, Issued: now.Add(-time.Hour)}
			if err := errors.Join(inventory.Save(tx, h), journal.Save(tx, g)); err != nil {
				return err
			}
		}
		return nil
	}))
	return &Desk{Store: s, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}, now, &challenge.Conn{KeySPKI: []byte("ours")}
}

// entered are the audit's records of opens.
func entered(t *testing.T, d *Desk) (records []event.Record, opens []event.Opened) {
	t.Helper()
	check.Nil(t, d.Store.View(t.Context(), func(tx *store.Tx) error {
		return audit.Read(tx, 0, 100, func(_ int64, body []byte) error {
			r, err := event.Parse(body)
			if err != nil || r.Kind != event.CredentialOpened {
				return err
			}
			e, err := r.Event()
			if err != nil {
				return err
			}
			records, opens = append(records, r), append(opens, *e.(*event.Opened))
			return nil
		})
	}))
	return records, opens
}

// A host speaks of its own leases alone, and where one of several is another's,
// nothing is entered.
func TestWitnessOfItsOwn(t *testing.T) {
	d, now, conn := witnesses(t)
	at := now.Add(-time.Minute)
	mine := Open{"lease-ours", event.Opened{Time: at, Path: "/etc/billing/db", PID: 7, Exe: "/bin/cat", User: "root", Unit: "thief.service"}}
	check.Nil(t, d.Witness(t.Context(), conn, []Open{mine}, "req"))
	records, opens := entered(t, d)
	if len(records) != 1 || opens[0] != mine.Opened || records[0].Actor != "host:ours" || records[0].Host != "ours" || records[0].Lease != "lease-ours" ||
		records[0].Scope != "billing-db" || records[0].Request != "req" || !records[0].Time.Equal(now) {
		t.Fatalf("%+v %+v", records, opens)
	}
	for _, lease := range []string{"lease-theirs", "lease-unknown", ""} {
		other := mine
		other.Lease = lease
		err := d.Witness(t.Context(), conn, []Open{mine, other}, "req")
		var e *api.Error
		if !errors.As(err, &e) || e.Check != api.CheckGone {
			t.Errorf("%q: %v", lease, err)
		}
		if records, _ := entered(t, d); len(records) != 1 {
			t.Errorf("%q: %d records", lease, len(records))
		}
	}
	var e *api.Error
	if err := d.Witness(t.Context(), &challenge.Conn{KeySPKI: []byte("nobody's")}, []Open{mine}, "req"); !errors.As(err, &e) || e.Check != api.CheckUnknownHost {
		t.Errorf("a host that isn't known: %v", err)
	}
}

// A host's clock moves nothing out of the lease's time, and its texts are short
// and can be printed.
func TestWitnessIsBounded(t *testing.T) {
	d, now, conn := witnesses(t)
	for _, tt := range []struct{ said, want time.Time }{
		{now, now},
		{now.Add(-time.Hour), now.Add(-time.Hour)},
		{now.Add(-time.Hour - time.Nanosecond), now},
		{now.Add(time.Nanosecond), now},
		{time.Time{}, now},
	} {
		long := strings.Repeat("ü\n", 5000)
		check.Nil(t, d.Witness(t.Context(), conn, []Open{{"lease-ours", event.Opened{Time: tt.said, Path: long, Exe: long, User: long, Unit: long}}}, "req"))
		_, opens := entered(t, d)
		o := opens[len(opens)-1]
		if !o.Time.Equal(tt.want) {
			t.Errorf("%v is entered as %v, want %v", tt.said, o.Time, tt.want)
		}
		for _, s := range []string{o.Path, o.Exe, o.User, o.Unit} {
			if n := utf8.RuneCountInString(s); n > maxSeen || !strings.HasPrefix(s, "ü\uFFFDü") || strings.Contains(s, "\n") {
				t.Errorf("%d letters: %.20q", n, s)
			}
		}
	}
}
