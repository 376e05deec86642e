package inventory

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/test/check"
)

// A token admits one host, once, until its end. Only its hash is in the store.
func TestTokens(t *testing.T) {
	want := JoinToken{Name: "web-1", Labels: map[string]string{"env": "prod"}, Reference: "web", Expires: noon}
	for name, c := range map[string]struct {
		token func(made string) string
		times []time.Time // at which it is used
		says  string      // the last error; empty: it is good
	}{
		"good":                     {func(made string) string { return made }, []time.Time{noon.Add(-time.Millisecond)}, ""},
		"at its end":               {func(made string) string { return made }, []time.Time{noon}, "expired at 2026-03-01T12:00:00Z"},
		"twice":                    {func(made string) string { return made }, []time.Time{noon.Add(-time.Hour), noon.Add(-time.Minute)}, "used at 2026-03-01T11:00:00Z"},
		"twice, and after its end": {func(made string) string { return made }, []time.Time{noon.Add(-time.Hour), noon.Add(time.Hour)}, "used at 2026-03-01T11:00:00Z"},
		"another":                  {func(made string) string { return made + "a" }, []time.Time{noon.Add(-time.Hour)}, "unknown"},
		"in capitals":              {strings.ToUpper, []time.Time{noon.Add(-time.Hour)}, "unknown"},
		"nothing":                  {func(string) string { return "" }, []time.Time{noon.Add(-time.Hour)}, "unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t)
			var made string
			update(t, s, func(tx *store.Tx) error {
				secret, err := CreateToken(tx, want)
				made = string(secret.Reveal())
				return err
			})
			if !strings.HasPrefix(made, "cs-") || len(made) != len("cs-")+32 {
				t.Fatalf("a token of %d bytes", len(made))
			}
			var got JoinToken
			var err error
			for i, at := range c.times {
				err = s.Update(t.Context(), store.Everything(), func(tx *store.Tx) (err error) {
					got, err = UseToken(tx, c.token(made), "host", at)
					return err
				})
				if i < len(c.times)-1 {
					check.Nil(t, err)
				}
			}
			if c.says != "" {
				if !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v, want %s", err, c.says)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%+v, %v", got, err)
			}
			check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
				var hash, by string
				err := tx.QueryRow(`SELECT hash, used_by FROM join_tokens`).Scan(&hash, &by)
				if strings.Contains(hash, made) || hash != TokenHash(made) || by != "host" {
					t.Errorf("kept: %s, by %s", hash, by)
				}
				return err
			}))
		})
	}
}
