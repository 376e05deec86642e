package findings_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func finding(edits ...func(*findings.Finding)) findings.Finding {
	f := findings.Finding{Detector: "foreign-source", Cause: "lease L1", Severity: "high", Lease: "L1", Host: "h", Scope: "s", Account: "v-x", NHI: "NHI2", Why: "from elsewhere",
		First: t0, Last: t0, Count: 1, Evidence: []json.RawMessage{json.RawMessage(`{"line":1}`)}, Response: "revoke"}
	for _, edit := range edits {
		edit(&f)
	}
	return f
}

func open(t *testing.T) *store.Store {
	t.Helper()
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func report(t *testing.T, s *store.Store, now time.Time, edits ...func(*findings.Finding)) (f findings.Finding, o findings.Outcome) {
	t.Helper()
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) (err error) {
		f, o, err = findings.Report(tx, finding(edits...), now)
		return err
	}))
	return f, o
}

func list(t *testing.T, s *store.Store, f findings.Filter) (out []findings.Finding) {
	t.Helper()
	if f.Limit == 0 {
		f.Limit = 100
	}
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
		out, err = findings.List(tx, f)
		return err
	}))
	return out
}

func shut(t *testing.T, s *store.Store, id string, until, now time.Time) {
	t.Helper()
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		_, err := findings.Close(tx, id, "alice", "a test", until, now)
		return err
	}))
}

func last(at time.Time) func(*findings.Finding) {
	return func(f *findings.Finding) { f.Last = at; f.Count++ }
}

func TestOneForEachCause(t *testing.T) {
	s := open(t)
	first, o := report(t, s, t0)
	if o != findings.New || first.Status != findings.Open || first.ID == "" {
		t.Fatalf("reported: %v %+v", o, first)
	}
	again, o := report(t, s, t0.Add(time.Hour), last(t0.Add(time.Minute)))
	if o != findings.Known || again.ID != first.ID || again.Count != 2 || again.Opened != first.Opened {
		t.Errorf("again: %v %+v", o, again)
	}
	other, o := report(t, s, t0.Add(time.Hour), func(f *findings.Finding) { f.Detector = "human-use" })
	if o != findings.New || other.ID == first.ID || other.Opened <= first.Opened {
		t.Errorf("another detector: %v %+v", o, other)
	}
	if got := list(t, s, findings.Filter{}); len(got) != 2 || fmt.Sprint(got[0]) != fmt.Sprint(again) {
		t.Errorf("kept: %+v\nwant first %+v", got, again)
	}
}

func TestClosedAndOpenAgain(t *testing.T) {
	closedAt := t0.Add(time.Hour)
	until := t0.Add(24 * time.Hour)
	for _, c := range []struct {
		name  string
		until time.Time
		last  time.Time
		want  findings.Outcome
	}{
		{"seen before it was closed, told late", time.Time{}, closedAt.Add(-time.Minute), findings.Known},
		{"seen after it", time.Time{}, closedAt.Add(time.Second), findings.Reopened},
		{"said again", time.Time{}, t0, findings.Known},
		{"seen before its end", until, until.Add(-time.Second), findings.Known},
		{"seen after its end", until, until.Add(time.Second), findings.Reopened},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t)
			f, _ := report(t, s, t0)
			newer, _ := report(t, s, t0, func(f *findings.Finding) { f.Cause = "another" })
			shut(t, s, f.ID, c.until, closedAt)
			got, o := report(t, s, t0.Add(48*time.Hour), last(c.last))
			if o != c.want {
				t.Fatalf("%v, want %v", o, c.want)
			}
			if o == findings.Known {
				if got.Status != findings.Closed || got.Reason != "a test" || got.ClosedBy != "alice" || !got.Until.Equal(c.until) {
					t.Errorf("%+v", got)
				}
				return
			}
			if got.Status != findings.Open || got.Reason != "" || !got.Until.IsZero() || got.Opened <= newer.Opened || got.ID != f.ID {
				t.Errorf("opened again: %+v", got)
			}
			// Who follows sees it again.
			if after := list(t, s, findings.Filter{After: newer.Opened}); len(after) != 1 || after[0].ID != f.ID {
				t.Errorf("after the newest: %+v", after)
			}
		})
	}
}

// A sighting that a wrong clock, or somebody who writes the log, puts far ahead does
// not keep what comes later from being seen.
func TestTheFutureHasNotHappened(t *testing.T) {
	s := open(t)
	f, _ := report(t, s, t0.Add(time.Minute), last(t0.Add(1000*time.Hour)))
	if !f.Last.Equal(t0.Add(time.Minute)) {
		t.Errorf("last seen at %v", f.Last)
	}
	shut(t, s, f.ID, time.Time{}, t0.Add(time.Hour))
	if _, o := report(t, s, t0.Add(3*time.Hour), last(t0.Add(1000*time.Hour))); o != findings.Reopened {
		t.Errorf("%v, want it opened again", o)
	}
}

func TestFilters(t *testing.T) {
	s := open(t)
	report(t, s, t0)
	report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Severity, f.Host = "2", "low", "i" })
	closed, _ := report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Detector = "3", "dormant" })
	shut(t, s, closed.ID, time.Time{}, t0)
	for want, f := range map[string]findings.Filter{
		"lease L1 2 3": {}, "lease L1 2": {Status: findings.Open}, "3": {Status: findings.Closed}, "2": {Host: "i"},
		"lease L1 3": {Severity: "high"}, "lease L1": {Host: "h", Status: findings.Open, Limit: 1}, "": {Detector: "none"},
	} {
		var got []string
		for _, one := range list(t, s, f) {
			got = append(got, one.Cause)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
	for _, f := range []func(*store.Tx) error{
		func(tx *store.Tx) error { _, err := findings.Load(tx, "nobody"); return err },
		func(tx *store.Tx) error { _, err := findings.Close(tx, "nobody", "a", "b", t0, t0); return err },
	} {
		if err := s.Update(t.Context(), store.Everything(), f); !errors.Is(err, findings.ErrUnknown) {
			t.Errorf("an unknown finding: %v", err)
		}
	}
}

func TestRisk(t *testing.T) {
	s := open(t)
	risk := func(scope string) int64 {
		var r findings.Risk
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
			r, err = findings.OfHost(tx, "h")
			return err
		}))
		if v := r.Of(scope); v != nil {
			return *v
		}
		return -1
	}
	expect := func(own, other int64) {
		t.Helper()
		if risk("s") != own || risk("o") != other || risk("") != other {
			t.Errorf("risk %d, of another scope %d and of the host %d; want %d and twice %d", risk("s"), risk("o"), risk(""), own, other)
		}
	}
	expect(-1, -1)
	report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Host, f.Severity = "0", "i", "critical" })
	expect(-1, -1)
	report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Severity = "1", "medium" })
	expect(30, -1)
	high, _ := report(t, s, t0)
	expect(60, -1)
	report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Lease, f.Scope, f.Severity = "2", "", "", "low" })
	expect(60, 10)
	all, _ := report(t, s, t0, func(f *findings.Finding) { f.Cause, f.Lease, f.Scope, f.Severity = "3", "", "", "critical" })
	expect(90, 90)
	shut(t, s, all.ID, time.Time{}, t0)
	expect(60, 10)
	shut(t, s, high.ID, time.Time{}, t0)
	expect(30, 10)
}

// The risk of a host is found without reading its findings.
func TestRiskReadsItsIndexAlone(t *testing.T) {
	s := open(t)
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		var a, b, c int
		var plan string
		err := tx.QueryRow(`EXPLAIN QUERY PLAN `+findings.RiskQuery, "h", "open").Scan(&a, &b, &c, &plan)
		if !strings.Contains(plan, "COVERING INDEX findings_risk (host_id=? AND status=?)") {
			t.Errorf("plan: %s", plan)
		}
		return err
	}))
}

func TestWhatIsRefused(t *testing.T) {
	check.Nil(t, finding().Check())
	long := strings.Repeat("x", 513)
	for want, edit := range map[string]func(*findings.Finding){
		"without its detector":   func(f *findings.Finding) { f.Detector = "" },
		"without its cause":      func(f *findings.Finding) { f.Cause = "" },
		"detector has 513 bytes": func(f *findings.Finding) { f.Detector = long },
		"cause has 513":          func(f *findings.Finding) { f.Cause = long },
		"nhi has 513":            func(f *findings.Finding) { f.NHI = long },
		"lease has 513":          func(f *findings.Finding) { f.Lease = long },
		"host has 513":           func(f *findings.Finding) { f.Host = long },
		"account has 513":        func(f *findings.Finding) { f.Account = long },
		"why has 513":            func(f *findings.Finding) { f.Why = long },
		`severity "grave"`:       func(f *findings.Finding) { f.Severity = "grave" },
		`severity ""`:            func(f *findings.Finding) { f.Severity = "" },
		`response "shoot"`:       func(f *findings.Finding) { f.Response = "shoot" },
		"has a first sighting":   func(f *findings.Finding) { f.First = time.Time{} },
		"not before it":          func(f *findings.Finding) { f.Last = f.First.Add(-1) },
		"counts its sightings":   func(f *findings.Finding) { f.Count = 0 },
		"21 sightings":           func(f *findings.Finding) { f.Evidence = make([]json.RawMessage, 21) },
		"evidence 1 has 4097":    func(f *findings.Finding) { f.Evidence[0] = json.RawMessage(`"` + strings.Repeat("x", 4095) + `"`) },
		"evidence 1 is no JSON":  func(f *findings.Finding) { f.Evidence[0] = json.RawMessage(`{"a":1}{`) },
		"1 is no JSON object":    func(f *findings.Finding) { f.Evidence[0] = json.RawMessage(` ["a"]`) },
		"is no JSON object":      func(f *findings.Finding) { f.Evidence[0] = nil },
	} {
		if err := finding(edit).Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// What is open is bounded; what is known is still kept up to date.
func TestTooManyAreOpen(t *testing.T) {
	s := open(t)
	known, _ := report(t, s, t0)
	closed, _ := report(t, s, t0, func(f *findings.Finding) { f.Cause = "closed" })
	shut(t, s, closed.ID, time.Time{}, t0)
	findings.LowerMaxOpen(t, 3)
	for i := range 2 {
		report(t, s, t0, func(f *findings.Finding) { f.Cause = fmt.Sprint(i) })
	}
	try := func(edits ...func(*findings.Finding)) (o findings.Outcome, err error) {
		err = s.Update(t.Context(), store.Everything(), func(tx *store.Tx) (err error) {
			_, o, err = findings.Report(tx, finding(edits...), t0.Add(time.Hour))
			return err
		})
		return o, err
	}
	if o, err := try(last(t0.Add(time.Minute))); err != nil || o != findings.Known {
		t.Errorf("one that is open: %v %v", o, err)
	}
	if _, err := try(func(f *findings.Finding) { f.Cause = "another" }); !errors.Is(err, findings.ErrFull) {
		t.Errorf("one more: %v", err)
	}
	again := func(f *findings.Finding) { f.Cause, f.Last = "closed", t0.Add(time.Minute) }
	if _, err := try(again); !errors.Is(err, findings.ErrFull) {
		t.Errorf("one that happened again: %v", err)
	}
	shut(t, s, known.ID, time.Time{}, t0.Add(time.Hour))
	if o, err := try(again); err != nil || o != findings.Reopened {
		t.Errorf("with room for it: %v %v", o, err)
	}
}

// Who reports a finding again makes nothing less of it: closing is an operator's.
func TestNothingIsMadeLess(t *testing.T) {
	s := open(t)
	first, _ := report(t, s, t0, func(f *findings.Finding) {
		f.Severity, f.Response, f.Count, f.Evidence = "high", "revoke", 7, []json.RawMessage{[]byte(`{"a":1}`)}
	})
	again, o := report(t, s, t0.Add(time.Hour), func(f *findings.Finding) {
		f.Severity, f.Response, f.Count, f.Evidence, f.Host, f.Lease, f.Account = "low", "alert", 1, nil, "other", "", "x"
	})
	if o != findings.Known || again.Severity != first.Severity || again.Response != "revoke" || again.Count != 7 || len(again.Evidence) != 1 ||
		again.Host != first.Host || again.Lease != first.Lease || again.Account != first.Account || !again.Last.Equal(first.Last) {
		t.Errorf("%+v, want what was there: %+v", again, first)
	}
	if worse, _ := report(t, s, t0.Add(time.Hour), func(f *findings.Finding) { f.Severity = "critical" }); worse.Severity != "critical" {
		t.Errorf("%+v, want it worse", worse)
	}
}

// Evidence closes what it shows to be over, and nothing that somebody has to look into.
func TestOverByEvidence(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*findings.Finding)
		want bool
	}{
		{"an alert", func(f *findings.Finding) { f.Detector, f.Response = "unmatched-login", "alert" }, true},
		{"critical", func(f *findings.Finding) { f.Detector, f.Response, f.Severity = "unmatched-login", "alert", "critical" }, false},
		{"acted on", func(f *findings.Finding) { f.Detector, f.Response = "unmatched-login", "quarantine" }, false},
		{"what somebody did", func(f *findings.Finding) { f.Response = "alert" }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t)
			f, _ := report(t, s, t0, c.edit)
			if f.Settles() != c.want {
				t.Fatalf("%+v settles: %v", f, f.Settles())
			}
			if !c.want {
				return
			}
			check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) (err error) {
				f, err = findings.Settle(tx, f, "watch", "it speaks again", t0.Add(time.Hour))
				return err
			}))
			if got := list(t, s, findings.Filter{})[0]; got.Status != findings.Closed || got.ClosedBy != "watch" || got.Reason != "it speaks again" || got.Settles() {
				t.Errorf("%+v", got)
			}
			if _, o := report(t, s, t0.Add(2*time.Hour), c.edit); o != findings.Known {
				t.Errorf("said again: %v", o)
			}
			if _, o := report(t, s, t0.Add(2*time.Hour), c.edit, func(f *findings.Finding) { f.Count = 2 }); o != findings.Reopened {
				t.Errorf("more of it, seen no later: %v", o)
			}
			check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) (err error) {
				f, err = findings.Load(tx, f.ID)
				if err == nil {
					f, err = findings.Settle(tx, f, "watch", "it speaks again", t0.Add(time.Hour))
				}
				return err
			}))
			// It was over up to what was seen then: what came before the closing counts, too.
			again, o := report(t, s, t0.Add(2*time.Hour), c.edit, last(t0.Add(time.Minute)), func(f *findings.Finding) { f.Count = 2 })
			if o != findings.Reopened || again.Reason != "" || again.ClosedBy != "" || !again.Settles() {
				t.Errorf("seen later: %v %+v", o, again)
			}
			// An operator's closing is of the moment.
			shut(t, s, again.ID, time.Time{}, t0.Add(3*time.Hour))
			if _, o := report(t, s, t0.Add(4*time.Hour), c.edit, last(t0.Add(2*time.Hour))); o != findings.Known {
				t.Errorf("after an operator closed it: %v", o)
			}
		})
	}
}

// Closed findings don't fill the store: the oldest are forgotten, but for those that an
// operator closed until later.
func TestOldOnesAreForgotten(t *testing.T) {
	s := open(t)
	findings.LowerMaxOpen(t, 3)
	for i, until := range []time.Time{{}, t0.Add(48 * time.Hour), {}} {
		f, _ := report(t, s, t0, func(f *findings.Finding) { f.Cause = fmt.Sprint(i) })
		shut(t, s, f.ID, until, t0)
	}
	report(t, s, t0.Add(time.Hour), func(f *findings.Finding) { f.Cause = "new" })
	var left []string
	for _, f := range list(t, s, findings.Filter{}) {
		left = append(left, f.Cause)
	}
	if got := strings.Join(left, " "); got != "1 new" {
		t.Errorf("kept %q", got)
	}
}
