package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/test/check"
)

// A version is in force from its approval until its end, and not at it.
func TestWhenAReferenceIsInForce(t *testing.T) {
	for name, c := range map[string]struct {
		approved, ends time.Time
		want           string
	}{
		"never approved":           {time.Time{}, time.Time{}, Draft},
		"a draft with an end":      {time.Time{}, noon.Add(-time.Hour), Draft},
		"without an end":           {noon.Add(-time.Hour), time.Time{}, Approved},
		"before its end":           {noon.Add(-time.Hour), noon.Add(time.Millisecond), Approved},
		"at its end":               {noon.Add(-time.Hour), noon, Ended},
		"long after it":            {noon.Add(-time.Hour), noon.Add(-time.Minute), Ended},
		"that ended as it started": {noon, noon, Ended},
	} {
		if got := (Reference{Approved: c.approved, Ends: c.ends}).State(noon); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func addReferences(t *testing.T, s *store.Store, names ...string) {
	t.Helper()
	update(t, s, func(tx *store.Tx) error {
		for _, name := range names {
			r, err := AddReference(tx, Reference{Name: name, Content: json.RawMessage(`{}`), LearnedFrom: "h", Created: noon})
			if err != nil || !r.Approved.IsZero() {
				return errors.Join(err, fmt.Errorf("%+v", r))
			}
		}
		return nil
	})
}

// states are those of a set's versions, the newest first.
func states(t *testing.T, s *store.Store, name string, at time.Time) (list []string) {
	t.Helper()
	for _, r := range check.Must(read(t, s, func(tx *store.Tx) ([]Reference, error) { return Versions(tx, name) }))(t) {
		list = append(list, fmt.Sprint(r.Version, " ", r.State(at)))
	}
	return list
}

// An approval ends the versions that are in force, at the time that it says or before it
// where they would have ended sooner, and leaves drafts, ended versions and other sets.
func TestApproveReference(t *testing.T) {
	s := opened(t)
	addReferences(t, s, "web", "web", "web", "db")
	approve := func(name string, version int64, now, olderEnd time.Time) error {
		return s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			r, err := ApproveReference(tx, name, version, now, olderEnd)
			if err == nil && (r.Name != name || r.LearnedFrom != "h" || string(r.Content) != `{}` || !r.Approved.Equal(now) || !r.Ends.IsZero()) {
				t.Errorf("approved: %+v", r)
			}
			return err
		})
	}
	expect := func(when string, name string, at time.Time, want ...string) {
		t.Helper()
		if got := states(t, s, name, at); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
	}
	hour := func(n int) time.Time { return noon.Add(time.Duration(n) * time.Hour) }

	check.Nil(t, approve("db", 0, noon, noon))
	check.Nil(t, approve("web", 1, noon, noon))
	expect("one", "web", noon, "3 draft", "2 draft", "1 approved")
	check.Nil(t, approve("web", 2, hour(1), hour(3)))
	expect("both for a while", "web", hour(2), "3 draft", "2 approved", "1 approved")
	expect("until the older one's end", "web", hour(3), "3 draft", "2 approved", "1 ended")
	check.Nil(t, approve("web", 0, hour(2), hour(9)))
	expect("the first isn't prolonged", "web", hour(3), "3 approved", "2 approved", "1 ended")
	expect("the second ends", "web", hour(9), "3 approved", "2 ended", "1 ended")
	check.Nil(t, approve("web", 1, hour(4), hour(4)))
	expect("back to the first", "web", hour(5), "3 ended", "2 ended", "1 approved")
	expect("another set", "db", hour(99), "1 approved")

	for name, version := range map[string]int64{"web": 4, "none": 0} {
		if err := approve(name, version, hour(5), hour(5)); !errors.Is(err, ErrNoReference) {
			t.Errorf("%s %d: %v", name, version, err)
		}
	}
	expect("an approval of none", "web", hour(99), "3 ended", "2 ended", "1 approved")
}

// Pages have each version once, by name and the newest first, whatever they select.
func TestReferencePages(t *testing.T) {
	s := opened(t)
	addReferences(t, s, "b", "a", "c", "b", "a", "b")
	for _, c := range []struct {
		filter ReferenceFilter
		want   string
	}{
		{ReferenceFilter{}, "a2 a1 b3 b2 b1 c1"},
		{ReferenceFilter{Name: "b"}, "b3 b2 b1"},
		{ReferenceFilter{Name: "b", Version: 2}, "b2"},
	} {
		for limit := 1; limit < 8; limit++ {
			var all []string
			f := c.filter
			f.Limit = limit
			for more := true; more; {
				var list []Reference
				check.Nil(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
					list, more, err = ReferencePage(tx, f)
					return err
				}))
				if len(list) > limit || more && len(list) != limit {
					t.Fatalf("%d of a page of %d, more %v", len(list), limit, more)
				}
				for _, r := range list {
					all = append(all, fmt.Sprint(r.Name, r.Version))
					f.After = ReferencePlace{r.Name, r.Version}
				}
			}
			if got := strings.Join(all, " "); got != c.want {
				t.Errorf("%+v, %d at a time: %s, want %s", c.filter, limit, got, c.want)
			}
		}
	}
	for _, f := range []ReferenceFilter{{Name: "x", Limit: 9}, {Name: "b", Version: 9, Limit: 9}} {
		if _, err := read(t, s, func(tx *store.Tx) (bool, error) { _, more, err := ReferencePage(tx, f); return more, err }); !errors.Is(err, ErrNoReference) {
			t.Errorf("%+v: %v", f, err)
		}
	}
}

// Large contents make short pages, and none without a version.
func TestReferencePagesOfLargeContents(t *testing.T) {
	s := opened(t)
	update(t, s, func(tx *store.Tx) error {
		for range 3 {
			if _, err := AddReference(tx, Reference{Name: "large", Content: json.RawMessage(`"` + strings.Repeat("x", maxPage) + `"`), Created: noon}); err != nil {
				return err
			}
		}
		return nil
	})
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		list, more, err := ReferencePage(tx, ReferenceFilter{Limit: 10})
		if len(list) != 1 || !more {
			t.Errorf("%d versions, more %v", len(list), more)
		}
		return err
	}))
}

// A release ends the older ones of its name, and a set's maintenance ends when it was said
// last.
func TestReleasesAndMaintenance(t *testing.T) {
	s := opened(t)
	files := []ReleaseFile{{"/a", "sha256:x"}, {"/b", "sha256:y"}}
	add := func(name string, at, olderEnd time.Time, files []ReleaseFile) {
		update(t, s, func(tx *store.Tx) error {
			_, err := AddRelease(tx, Release{Name: name, Source: "ci", Files: files, Added: at}, olderEnd)
			return err
		})
	}
	add("app", noon, noon, files)
	add("other", noon, noon, files)
	add("app", noon.Add(time.Hour), noon.Add(2*time.Hour), files[:1])
	add("app", noon.Add(90*time.Minute), noon.Add(9*time.Hour), files[:1])
	var got []string
	for _, r := range check.Must(read(t, s, Releases))(t) {
		got = append(got, fmt.Sprint(r.Name, r.Version, " ", len(r.Files), " ", r.Ends.Sub(noon).Hours() > 0, " ", r.Ends.Equal(noon.Add(2*time.Hour))))
	}
	if want := []string{"app3 1 false false", "app2 1 true false", "app1 2 true true", "other1 2 false false"}; !slices.Equal(got, want) {
		t.Errorf("releases: %q, want %q", got, want)
	}
	if list := check.Must(read(t, s, func(tx *store.Tx) ([]ReleaseSize, error) { return ReleaseSizes(tx, "app") }))(t); len(list) != 3 || list[2].Files != 2 || list[0].Version != 3 {
		t.Errorf("sizes: %+v", list)
	}
	if list := check.Must(read(t, s, func(tx *store.Tx) ([]ReleaseSize, error) { return ReleaseSizes(tx, "") }))(t); len(list) != 4 {
		t.Errorf("sizes of all: %+v", list)
	}

	for _, until := range []time.Time{noon.Add(time.Hour), noon} {
		update(t, s, func(tx *store.Tx) error { return Maintain(tx, "web", until) })
		if got := check.Must(read(t, s, func(tx *store.Tx) (time.Time, error) { return Maintenance(tx, "web") }))(t); !got.Equal(until) {
			t.Errorf("maintenance until %s, want %s", got, until)
		}
	}
	if got := check.Must(read(t, s, func(tx *store.Tx) (time.Time, error) { return Maintenance(tx, "db") }))(t); !got.IsZero() {
		t.Errorf("another set is maintained until %s", got)
	}
}
