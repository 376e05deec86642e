package canary_test

import (
	"errors"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/canary"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

var now = time.Unix(1_790_000_000, 0)

func TestLike(t *testing.T) {
	for example, want := range map[string]string{
		"v-token-co-billing--WnvJWvm4qs9iQgwmFXqm-1780000000": `^v-token-co-billing--[A-Za-z0-9]{20}-1790000000$`,
		"v-token-coun-billing-ro-8a7Bq2Xc":                    `^v-token-coun-billing-ro-[A-Za-z0-9]{8}$`,
		"v-root-Abcdefghij":                                   `^v-root-[A-Za-z0-9]{10}$`,
	} {
		seen := map[string]bool{example: true}
		for range 20 {
			got, ok := canary.Like(example, now)
			if !ok || !regexp.MustCompile(want).MatchString(got) || len(got) != len(example) || seen[got] {
				t.Fatalf("like %s: %q, %v", example, got, ok)
			}
			seen[got] = true
		}
	}
	for _, example := range []string{"", "billing", "1780000000", "a-1780000000", "app-rw", "v-token-co-é-1780000000", "v--1780000000"} {
		if got, ok := canary.Like(example, now); ok {
			t.Errorf("like %q: %q", example, got)
		}
	}
	if got := canary.ForRole("billing-ro", now); !regexp.MustCompile(`^v-token-co-billing--[A-Za-z0-9]{20}-1790000000$`).MatchString(got) {
		t.Error(got)
	}
}

func TestTable(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	c := canary.Canary{ID: "1", Scope: "s", Username: "v-x", Audience: []string{"postgres://db"}, Issued: now.UTC(), By: "alice"}
	add := func(c canary.Canary) error {
		return s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { return canary.Add(tx, c) })
	}
	check.Nil(t, add(c))
	if err := add(canary.Canary{ID: "2", Scope: "s", Username: "v-x"}); !errors.Is(err, canary.ErrTaken) {
		t.Errorf("a name twice: %v", err)
	}
	check.Nil(t, add(canary.Canary{ID: "2", Scope: "o", Username: "v-y", Issued: now.Add(time.Hour)}))
	list := func(scope string) (ids string) {
		var all []canary.Canary
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
			all, err = canary.List(tx, scope)
			return err
		}))
		for _, one := range all {
			ids += one.ID
			if one.ID == "1" && (one.Username != c.Username || !slices.Equal(one.Audience, c.Audience) || !one.Issued.Equal(c.Issued) || one.By != c.By) {
				t.Errorf("%+v, want %+v", one, c)
			}
		}
		return ids
	}
	if list("") != "12" || list("o") != "2" || list("none") != "" {
		t.Errorf("lists %q %q %q", list(""), list("o"), list("none"))
	}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		scope, err := canary.Remove(tx, "1")
		if scope != "s" {
			t.Errorf("of scope %q", scope)
		}
		return err
	}))
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := canary.Remove(tx, "1"); return err }); !errors.Is(err, canary.ErrUnknown) || list("") != "2" {
		t.Errorf("removed: %v, left %s", err, list(""))
	}
}

func TestNames(t *testing.T) {
	check.Nil(t, canary.CheckName("svc account-1"))
	for _, name := range []string{"", "a\nb", "a\x1b[1m", "\xff", strings.Repeat("x", 129)} {
		if canary.CheckName(name) == nil {
			t.Errorf("%q is taken", name)
		}
	}
}
