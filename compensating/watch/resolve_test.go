package watch

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// TestOver: evidence closes what it shows to be over, and what happens again opens it.
func TestOver(t *testing.T) {
	open := func(t *testing.T) (*Watch, *time.Time, func()) {
		now, dir := noon, t.TempDir()
		log := filepath.Join(dir, "log")
		speak := func() {
			write(t, log, fmt.Appendf(nil, "%s [7] LOG:  checkpoint complete\n", now.Format("2006-01-02 15:04:05.000 UTC")), os.O_APPEND)
		}
		w, err := Open(&Config{StateDir: filepath.Join(dir, "state"), Governed: []string{"svc-*"}, Sensors: []Sensor{{Kind: "postgres-stderr", Name: "db", Path: log}}},
			away, slog.New(slog.DiscardHandler), func() time.Time { return now })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Close)
		return w, &now, speak
	}
	// settle says of which detectors there are findings, and which of them are over.
	settle := func(t *testing.T, w *Watch) string {
		t.Helper()
		if err := w.settleFindings(t.Context()); err != nil {
			t.Fatal(err)
		}
		out := ""
		for _, r := range w.kept.Findings {
			out += fmt.Sprintf("%s %v ", r.Finding.Detector, r.over())
		}
		return out
	}
	want := func(t *testing.T, w *Watch, want string) {
		t.Helper()
		if got := settle(t, w); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	issue := func(t *testing.T, w *Watch, e ledger.Entry) {
		t.Helper()
		if err := w.apply(update{entries: []ledger.Entry{e}, synced: w.now()}); err != nil {
			t.Fatal(err)
		}
	}
	login := func(t *testing.T, w *Watch, account string, at time.Time) {
		t.Helper()
		found, err := w.judge.See(sightings.Sighting{Time: at, Kind: sightings.Login, Account: account, Source: "db"})
		if err != nil {
			t.Fatal(err)
		}
		w.add(found)
	}

	t.Run("a log that speaks again", func(t *testing.T) {
		w, now, speak := open(t)
		for range 25 {
			*now = now.Add(time.Second)
			speak()
		}
		read := func() {
			if err := w.pollNow(); err != nil {
				t.Fatal(err)
			}
			w.blind()
		}
		read()
		*now = now.Add(2 * time.Hour)
		read()
		want(t, w, "silent-sensor false ")
		speak()
		read()
		want(t, w, "silent-sensor true ")
		*now = now.Add(40 * time.Hour)
		read()
		want(t, w, "silent-sensor false ")
	})
	t.Run("a login that the ledger has late", func(t *testing.T) {
		w, now, _ := open(t)
		login(t, w, "svc-x", *now)
		want(t, w, "unmatched-login false ")
		// Somebody got it afterwards: that explains nothing of before.
		issue(t, w, ledger.Entry{ID: "L1", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "svc-x", VaultPath: "database/static-creds/x"}, Issued: now.Add(time.Hour)})
		want(t, w, "unmatched-login false ")
		issue(t, w, ledger.Entry{ID: "L2", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "svc-x", VaultPath: "database/static-creds/x"}, Issued: now.Add(-time.Minute)})
		want(t, w, "unmatched-login true ")
	})
	t.Run("a login that is another finding by what the ledger has late", func(t *testing.T) {
		w, now, _ := open(t)
		found, err := w.judge.See(sightings.Sighting{Time: *now, Kind: sightings.Login, Account: "svc-x", Source: "db", From: netip.MustParseAddr("10.0.0.9")})
		if err != nil {
			t.Fatal(err)
		}
		w.add(found)
		issue(t, w, ledger.Entry{ID: "L", Scope: "s", Host: "h", Sources: []string{"10.0.0.1"}, Names: ledger.Names{DBUsername: "svc-x", VaultPath: "database/static-creds/x"}, Issued: now.Add(-time.Minute)})
		want(t, w, "unmatched-login true shared-static-account false ")
		want(t, w, "unmatched-login true shared-static-account false ")
		if n := w.kept.Findings[1].Finding.Count; n != 1 {
			t.Errorf("one login counts as %d", n)
		}
	})
	t.Run("an account of another database", func(t *testing.T) {
		w, now, _ := open(t)
		found, err := w.judge.See(sightings.Sighting{Time: *now, Kind: sightings.Login, Account: "svc-x", Source: "db", Target: "payroll"})
		if err != nil {
			t.Fatal(err)
		}
		w.add(found)
		issue(t, w, ledger.Entry{ID: "L", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "svc-x", VaultPath: "kv/x"}, Audience: []string{"postgres://db1/billing"}, Issued: now.Add(-time.Minute)})
		want(t, w, "unmatched-login false ")
	})
	t.Run("a program that uses it at last", func(t *testing.T) {
		w, now, _ := open(t)
		issue(t, w, ledger.Entry{ID: "L", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "v-token-co-billing--abcdefghij0000000001-1772366400", VaultLease: "database/creds/b/1"}, Issued: *now})
		w.add([]detect.Detection{{Detector: detect.Dormant, Lease: "L", Host: "h", Time: *now, Why: "never used"}})
		want(t, w, "dormant false ")
		login(t, w, "v-token-co-billing--abcdefghij0000000001-1772366400", *now)
		want(t, w, "dormant true ")
	})
	t.Run("what somebody did", func(t *testing.T) {
		w, now, _ := open(t)
		issue(t, w, ledger.Entry{ID: "L", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "svc-x", VaultPath: "database/static-creds/x"}, Issued: *now, Expires: now.Add(time.Minute)})
		s := sightings.Sighting{Time: *now, Kind: sightings.Login}
		for _, e := range detect.Catalogue {
			switch e.Name {
			case detect.SilentSensor, detect.Dormant, detect.UnmatchedLogin, detect.OutOfBandRead:
				continue
			}
			d := detect.Detection{Detector: e.Name, Lease: "L", Host: "h", Account: "svc-x", Time: *now, Sighting: &s}
			w.add([]detect.Detection{d})
			*now = now.Add(100 * time.Hour)
			if err := w.settleFindings(t.Context()); err != nil {
				t.Fatal(err)
			}
			if r := w.kept.Findings[len(w.kept.Findings)-1]; r.over() || r.Key != finding.Of(d) {
				t.Errorf("%s is over by itself: %s", e.Name, r.Over)
			}
		}
	})
}
