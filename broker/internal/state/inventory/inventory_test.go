package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func digest(text string) evidence.Digest { return evidence.Sum([]byte(text)) }

// opened is an empty store.
func opened(t *testing.T) *store.Store {
	t.Helper()
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { check.Nil(t, s.Close()) })
	return s
}

// update is a transaction that has to succeed.
func update(t *testing.T, s *store.Store, change func(tx *store.Tx) error) {
	t.Helper()
	check.Nil(t, s.Update(t.Context(), store.Everything(), change))
}

func save(t *testing.T, s *store.Store, hosts ...Host) {
	t.Helper()
	update(t, s, func(tx *store.Tx) error {
		for _, h := range hosts {
			if err := Save(tx, h); err != nil {
				return err
			}
		}
		return nil
	})
}

// read is what a view reads.
func read[T any](t *testing.T, s *store.Store, f func(tx *store.Tx) (T, error)) (v T, err error) {
	t.Helper()
	_ = s.View(t.Context(), func(tx *store.Tx) error {
		v, err = f(tx)
		return nil
	})
	return v, err
}

// full is a host with something in every field that is kept.
func full() Host {
	return Host{
		ID: "host", Name: "web-1", State: Failed, Reason: "a reason", Admitted: true, Reenrolling: true, Tier: "certified",
		Labels: map[string]string{"env": "prod"}, Reference: "web", Address: "10.0.0.1",
		EKs: []evidence.Digest{digest("ek1"), digest("ek2")}, AKPublic: []byte("ak"), TLSKey: digest("tls"),
		Counters: &appraise.Counters{ResetCount: 7, RestartCount: 3, Clock: 12345, Safe: true},
		PCRs:     map[int]evidence.Digest{0: digest("pcr0"), 7: digest("pcr7")}, Facts: json.RawMessage(`{"a":1}`), FactsDigest: "facts",
		Created: noon, LastProved: noon.Add(time.Minute), StepUps: 4, SilentAt: noon.Add(time.Hour), Continuity: Continuity{5, 6, 7},
	}
}

// What is saved of a host is read again, whole by id and by either EK, and a second save
// changes it but for when it was made.
func TestAHostIsReadAsItWasSaved(t *testing.T) {
	s, want := opened(t), full()
	slices.SortFunc(want.EKs, func(a, b evidence.Digest) int { return strings.Compare(a.String(), b.String()) })
	v := reflect.ValueOf(want)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; name != "Unreadable" && name != "part" && v.Field(i).IsZero() {
			t.Errorf("the test's host has nothing in %s", name)
		}
	}
	save(t, s, want)
	for by, get := range map[string]func(*store.Tx) (Host, error){
		"id":         func(tx *store.Tx) (Host, error) { return Get(tx, "host") },
		"first EK":   func(tx *store.Tx) (Host, error) { return ByEK(tx, digest("ek1")) },
		"second EK":  func(tx *store.Tx) (Host, error) { return ByEK(tx, digest("ek2")) },
		"found id":   func(tx *store.Tx) (Host, error) { return Find(tx, "host") },
		"found name": func(tx *store.Tx) (Host, error) { return Find(tx, "web-1") },
	} {
		if got, err := read(t, s, get); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("by %s: %v\n%+v, want\n%+v", by, err, got, want)
		}
	}

	next := Host{ID: "host", Name: "web-2", State: Trusted, Created: noon.Add(time.Hour), EKs: want.EKs[:1]}
	save(t, s, next)
	got := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, "host") }))(t)
	if !got.Created.Equal(noon) || got.Name != "web-2" || got.State != Trusted || got.Admitted || got.Counters != nil || !got.TLSKey.IsZero() || len(got.Labels) != 0 {
		t.Errorf("saved again: %+v", got)
	}
	if !reflect.DeepEqual(got.EKs, want.EKs) {
		t.Errorf("an EK that was its own is not any more: %v", got.EKs)
	}
}

// A host that is read for a session has no EKs, PCRs and facts, and can't be saved: it
// would lose them.
func TestPartOfAHostIsNotSaved(t *testing.T) {
	s, want := opened(t), full()
	save(t, s, want)
	part := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return ByTLSKey(tx, digest("tls")) }))(t)
	if part.ID != want.ID || part.State != want.State || !reflect.DeepEqual(part.Counters, want.Counters) || part.EKs != nil || part.PCRs != nil {
		t.Errorf("by its key: %+v", part)
	}
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { return Save(tx, part) }); err == nil {
		t.Error("part of a host was saved")
	}
	if got := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, "host") }))(t); len(got.PCRs) != 2 || string(got.Facts) != `{"a":1}` {
		t.Errorf("left of it: %+v", got)
	}
}

// Nobody is found by what nobody has.
func TestUnknownHosts(t *testing.T) {
	s := opened(t)
	save(t, s, full())
	for by, get := range map[string]func(*store.Tx) (Host, error){
		"id":      func(tx *store.Tx) (Host, error) { return Get(tx, "web-1") },
		"name":    func(tx *store.Tx) (Host, error) { return Find(tx, "web") },
		"EK":      func(tx *store.Tx) (Host, error) { return ByEK(tx, digest("tls")) },
		"TLS key": func(tx *store.Tx) (Host, error) { return ByTLSKey(tx, digest("ek1")) },
		"no key":  func(tx *store.Tx) (Host, error) { return ByTLSKey(tx, evidence.Digest{}) },
		"state":   func(tx *store.Tx) (Host, error) { _, err := StateOf(tx, "web-1"); return Host{}, err },
		"standing": func(tx *store.Tx) (Host, error) {
			_, err := StandingOf(tx, "web-1")
			return Host{}, err
		},
	} {
		if got, err := read(t, s, get); !errors.Is(err, ErrUnknown) {
			t.Errorf("by %s: %+v, %v", by, got, err)
		}
	}
}

// An EK belongs to one host, also to one that was removed, and the save that would take it
// writes nothing.
func TestAnEKOfAnotherHost(t *testing.T) {
	s := opened(t)
	save(t, s, Host{ID: "a", State: Removed, EKs: []evidence.Digest{digest("ek")}})
	err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		return Save(tx, Host{ID: "b", State: Registered, EKs: []evidence.Digest{digest("own"), digest("ek")}})
	})
	if !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "host a's") {
		t.Errorf("another's EK: %v", err)
	}
	if _, err := read(t, s, func(tx *store.Tx) (Host, error) { return ByEK(tx, digest("own")) }); !errors.Is(err, ErrUnknown) {
		t.Errorf("half of it was saved: %v", err)
	}
}

// A name finds the one host that has it: an admitted one before those that only call
// themselves so, and none that was removed. An id goes before any name.
func TestNamesakes(t *testing.T) {
	host := func(id string, state State, admitted bool) Host {
		return Host{ID: id, Name: "web", State: state, Admitted: admitted}
	}
	for name, c := range map[string]struct {
		hosts []Host
		want  string // the id; or what the error says
	}{
		"none":                       {nil, "no such host"},
		"one":                        {[]Host{host("a", Trusted, true)}, "a"},
		"two admitted":               {[]Host{host("a", Trusted, true), host("b", Stale, true)}, "2 hosts are named web: use the id"},
		"one that waits":             {[]Host{host("a", Pending, false)}, "a"},
		"two that wait":              {[]Host{host("a", Pending, false), host("b", Pending, false)}, "2 hosts are named web"},
		"one beside many that wait":  {[]Host{host("a", Pending, false), host("b", Trusted, true), host("c", Pending, false)}, "b"},
		"one beside its predecessor": {[]Host{host("a", Removed, false), host("b", Trusted, true)}, "b"},
		"removed":                    {[]Host{host("a", Removed, false)}, "no such host"},
		"another's id":               {[]Host{host("a", Trusted, true), {ID: "web", Name: "other", State: Pending}}, "web"},
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t)
			save(t, s, c.hosts...)
			got, err := read(t, s, func(tx *store.Tx) (Host, error) { return Find(tx, "web") })
			if err != nil && (got.ID != "" || !strings.Contains(err.Error(), c.want)) || err == nil && got.ID != c.want {
				t.Errorf("found %q, %v; want %s", got.ID, err, c.want)
			}
		})
	}
}

// Pages of any length have each host once, in their order, where hosts share a name or the
// time of their proof, too.
func TestPagesHaveEachHostOnce(t *testing.T) {
	s := opened(t)
	const n = 12
	for i := range n {
		save(t, s, Host{ID: fmt.Sprintf("id%02d", (i*5)%n), Name: fmt.Sprint("name", i%3), State: States[i%len(States)], LastProved: noon.Add(time.Duration(i%4) * time.Second)})
	}
	for order, list := range map[string]struct {
		read func(*store.Tx, Cursor, int) ([]Host, error)
		key  func(Host) string
	}{
		"names":  {ByName, func(h Host) string { return h.Name + h.ID }},
		"proofs": {ByProof, func(h Host) string { return fmt.Sprint(h.LastProved.Unix(), h.ID) }},
	} {
		for limit := 1; limit <= n+1; limit++ {
			var keys []string
			var after Cursor
			for {
				page := check.Must(read(t, s, func(tx *store.Tx) ([]Host, error) { return list.read(tx, after, limit) }))(t)
				for _, h := range page {
					keys, after = append(keys, list.key(h)), h.Cursor()
				}
				if len(page) < limit {
					break
				}
			}
			if len(keys) != n || !slices.IsSorted(keys) || len(slices.Compact(slices.Clone(keys))) != n {
				t.Errorf("by %s, %d at a time: %v", order, limit, keys)
			}
		}
	}
}

// The list has a host whose row can't be read, with what of it can; nothing else reads or
// writes it.
func TestUnreadableHosts(t *testing.T) {
	for column, name := range map[string]string{"labels": "labels", "counters": "counters", "pcrs": "PCRs", "tls_key_hash": "TLS key"} {
		s := opened(t)
		save(t, s, full())
		update(t, s, func(tx *store.Tx) error { _, err := tx.Exec(`UPDATE hosts SET ` + column + ` = 'x'`); return err })
		got, err := read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, "host") })
		if !errors.Is(err, ErrUnreadable) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", column, err)
		}
		if got.Name != "web-1" {
			t.Errorf("%s: nothing is read: %+v", column, got)
		}
		if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { return Save(tx, got) }); !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: saved: %v", column, err)
		}
		list := check.Must(read(t, s, func(tx *store.Tx) ([]Host, error) { return ByName(tx, Cursor{}, 10) }))(t)
		if len(list) != 1 || list[0].State != Failed {
			t.Errorf("%s: listed as %+v", column, list)
		}
	}
}

// Names leaves out ids that no host has.
func TestNames(t *testing.T) {
	s := opened(t)
	save(t, s, Host{ID: "a", Name: "one", State: Trusted}, Host{ID: "b", Name: "two", State: Removed}, Host{ID: "c", Name: "three", State: Trusted})
	got := check.Must(read(t, s, func(tx *store.Tx) (map[string]string, error) { return Names(tx, []string{"b", "x", "a", "a"}) }))(t)
	if want := map[string]string{"a": "one", "b": "two"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// The number of those that wait follows each change of a state.
func TestCountPending(t *testing.T) {
	s := opened(t)
	for i, c := range []struct {
		host Host
		want int
	}{
		{Host{ID: "a", State: Pending}, 1}, {Host{ID: "b", State: Pending}, 2}, {Host{ID: "c", State: Trusted}, 2},
		{Host{ID: "a", State: Registered}, 1}, {Host{ID: "b", State: Removed}, 0}, {Host{ID: "c", State: Pending}, 1},
	} {
		save(t, s, c.host)
		if n := check.Must(read(t, s, CountPending))(t); n != c.want {
			t.Errorf("after step %d %d wait, want %d", i, n, c.want)
		}
	}
}

// Silent has the hosts whose time has come, in its order, and none that has no time.
func TestSilentAndHeard(t *testing.T) {
	s := opened(t)
	at := func(minutes int) time.Time { return noon.Add(time.Duration(minutes) * time.Minute) }
	save(t, s, Host{ID: "never", State: Trusted}, Host{ID: "b", State: Trusted, SilentAt: at(0), LastProved: at(-9)}, Host{ID: "a", State: Trusted, SilentAt: at(0), LastProved: at(-8)},
		Host{ID: "first", State: Stale, SilentAt: at(-1), LastProved: at(-30)}, Host{ID: "later", State: Trusted, SilentAt: at(1), LastProved: at(1)})
	var ids []string
	var after Silence
	for range 5 {
		for _, one := range check.Must(read(t, s, func(tx *store.Tx) ([]Silence, error) { return Silent(tx, noon, after, 1) }))(t) {
			ids, after = append(ids, one.ID), one
		}
	}
	if want := []string{"first", "a", "b"}; !slices.Equal(ids, want) {
		t.Errorf("silent are %v, want %v", ids, want)
	}

	// One that proved itself later than now shows nobody to be heard.
	heard := check.Must(read(t, s, func(tx *store.Tx) (Heard, error) { return LastHeard(tx, noon) }))(t)
	for _, c := range []struct {
		since  int
		except string
		want   bool
	}{{-10, "", true}, {-10, "a", true}, {-10, "b", true}, {-9, "a", false}, {-9, "b", true}, {-8, "", false}} {
		if got := heard.Since(at(c.since), c.except); got != c.want {
			t.Errorf("another than %q since %d minutes: %v", c.except, c.since, got)
		}
	}

	update(t, s, func(tx *store.Tx) error { return Shift(tx, 90*time.Second) })
	for id, want := range map[string]time.Time{"never": {}, "a": at(0).Add(90 * time.Second), "first": at(-1).Add(90 * time.Second)} {
		h := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, id) }))(t)
		if !h.SilentAt.Equal(want) && !(want.IsZero() && h.SilentAt.Equal(store.Time(0))) {
			t.Errorf("%s is silent at %s, want %s", id, h.SilentAt, want)
		}
	}
}

// Counters that another version wrote in another form keep no host from proving itself.
func TestBecomeOverCountersOfAnotherForm(t *testing.T) {
	s := opened(t)
	save(t, s, full())
	update(t, s, func(tx *store.Tx) error {
		_, err := tx.Exec(`UPDATE hosts SET counters = '{ "Clock": 12345, "ResetCount": 7, "New": true }' WHERE id = 'host'`)
		return err
	})
	before := check.Must(read(t, s, func(tx *store.Tx) (Standing, error) { return StandingOf(tx, "host") }))(t)
	next := before
	next.State = Trusted
	update(t, s, func(tx *store.Tx) error { return before.Become(tx, next, Showing{At: noon}) })
	if h := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, "host") }))(t); h.State != Trusted || h.Counters.Clock != 12345 {
		t.Errorf("it is %s with %+v", h.State, h.Counters)
	}
}

// A proof is written where the host stands as it did when it was judged, and else nothing.
func TestBecome(t *testing.T) {
	shown := Showing{Address: "10.0.0.2", PCRs: map[int]evidence.Digest{1: digest("new")}, Facts: map[string]int{"b": 2}, At: noon.Add(5 * time.Minute)}
	for what, change := range map[string]func(*Host){
		"nothing":     func(*Host) {},
		"state":       func(h *Host) { h.State = Quarantined },
		"reenrolling": func(h *Host) { h.Reenrolling = false },
		"AK":          func(h *Host) { h.AKPublic = []byte("other") },
		"counters":    func(h *Host) { h.Counters.Clock++ },
		"facts":       func(h *Host) { h.FactsDigest = "other" },
		"silence":     func(h *Host) { h.SilentAt = h.SilentAt.Add(time.Millisecond) },
		"silent back": func(h *Host) { h.SilentAt = h.SilentAt.Add(-time.Millisecond) },
	} {
		t.Run(what, func(t *testing.T) {
			s := opened(t)
			save(t, s, full())
			before := check.Must(read(t, s, func(tx *store.Tx) (Standing, error) { return StandingOf(tx, "host") }))(t)
			same := full().Standing()
			same.stored = before.stored
			if !reflect.DeepEqual(before, same) {
				t.Errorf("it stands as %+v, not as %+v", before, same)
			}
			meanwhile := full()
			change(&meanwhile)
			save(t, s, meanwhile)

			next := before
			next.State, next.Counters, next.FactsDigest, next.SilentAt = Trusted, &appraise.Counters{ResetCount: 8}, "new", noon.Add(2*time.Hour)
			err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { return before.Become(tx, next, shown) })
			got := check.Must(read(t, s, func(tx *store.Tx) (Host, error) { return Get(tx, "host") }))(t)
			if what != "nothing" {
				slices.SortFunc(meanwhile.EKs, func(a, b evidence.Digest) int { return strings.Compare(a.String(), b.String()) })
				if !errors.Is(err, ErrChanged) || !reflect.DeepEqual(got, meanwhile) {
					t.Errorf("%v, and it is %+v", err, got)
				}
				return
			}
			next.stored = ""
			if err != nil || !reflect.DeepEqual(got.Standing(), next) || got.Reason != "" || got.Address != shown.Address ||
				!reflect.DeepEqual(got.PCRs, shown.PCRs) || string(got.Facts) != `{"b":2}` || !got.LastProved.Equal(shown.At) {
				t.Errorf("%v, and it is %+v", err, got)
			}
		})
	}
}
