// Package canary makes decoy credentials: user names like those that a scope hands out, which
// were made in no database and given to nobody. Whoever uses one found it where he
// should not have looked.
//
// A canary's name is a secret from everybody but who sets it and the watch. Its
// password is nobody's: it is not kept, and opens nothing.
package canary

import (
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Canary is one decoy credential.
type Canary struct {
	ID       string
	Scope    string // whose credentials it looks like
	Username string
	Audience []string // of the scope, when it was made
	Issued   time.Time
	By       string
}

var (
	// ErrUnknown says that there is no such canary.
	ErrUnknown = errors.New("no such canary")
	// ErrTaken says that another has the name.
	ErrTaken = errors.New("a canary has this user name already")
	// ErrFull says that there are as many as may be.
	ErrFull = fmt.Errorf("there are %d canaries, which is all that are kept", most)
)

const (
	most    = 10_000
	maxName = 128
)

// CheckName says whether something can log in by this name.
func CheckName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("user name %.32q: 1 to %d bytes, printable", name, maxName)
	}
	return nil
}

// Like makes another user name of an example's shape, as Vault makes them: random
// letters and digits at the end, or before the time in seconds. It fails where the
// example isn't of that shape.
func Like(example string, now time.Time) (string, bool) {
	parts := strings.Split(example, "-")
	i := len(parts) - 1
	if len(parts[i]) == 10 && strings.Trim(parts[i], "0123456789") == "" {
		parts[i] = strconv.FormatInt(now.Unix(), 10)
		i--
	}
	if i < 1 || len(parts[i]) < shortest || strings.Trim(parts[i], alphabet) != "" {
		return "", false
	}
	parts[i] = random(len(parts[i]))
	return strings.Join(parts, "-"), true
}

// ForRole is the user name that Vault's database engine makes for a role by
// default, out of the first letters of a token's and of the role's name.
func ForRole(role string, now time.Time) string {
	return fmt.Sprintf("v-token-co-%s-%s-%d", role[:min(len(role), 8)], random(20), now.Unix())
}

const (
	alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	shortest = 4 // of what is random in a name
)

func random(n int) string {
	b := make([]byte, n)
	for i := range b {
		k, err := rand.Int(rand.Reader, big.NewInt(int64(len(alphabet))))
		if err != nil {
			panic(err) // crypto/rand doesn't fail
		}
		b[i] = alphabet[k.Int64()]
	}
	return string(b)
}

// Add stores a canary.
func Add(tx *store.Tx, c Canary) error {
	var n, taken int
	if err := tx.QueryRow(`SELECT COUNT(*) FROM canaries`).Scan(&n); err != nil {
		return err
	}
	if err := tx.QueryRow(`SELECT COUNT(*) FROM canaries WHERE username = ?`, c.Username).Scan(&taken); err != nil {
		return err
	}
	switch {
	case taken > 0:
		return ErrTaken
	case n >= most:
		return ErrFull
	}
	audience, err := json.Marshal(c.Audience)
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO canaries (id, scope, username, audience, issued, issued_by) VALUES (?, ?, ?, ?, ?, ?)`,
		c.ID, c.Scope, c.Username, string(audience), store.Millis(c.Issued), c.By)
	return err
}

// List reads the canaries of a scope, or all, by age.
func List(tx *store.Tx, scope string) ([]Canary, error) {
	return store.Collect(tx, func(row store.Row) (c Canary, err error) {
		var audience string
		var issued int64
		if err := row.Scan(&c.ID, &c.Scope, &c.Username, &audience, &issued, &c.By); err != nil {
			return c, err
		}
		c.Issued = store.Time(issued)
		if err := json.Unmarshal([]byte(audience), &c.Audience); err != nil {
			return c, fmt.Errorf("canary %s: %w", c.ID, err)
		}
		return c, nil
	}, `SELECT id, scope, username, audience, issued, issued_by FROM canaries WHERE ? = '' OR scope = ? ORDER BY issued, id`, scope, scope)
}

// Remove removes a canary, and returns its scope.
func Remove(tx *store.Tx, id string) (scope string, err error) {
	err = tx.QueryRow(`SELECT scope FROM canaries WHERE id = ?`, id).Scan(&scope)
	if errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("%w: %s; `countersign canary list` shows them", ErrUnknown, id)
	}
	if err != nil {
		return "", err
	}
	_, err = tx.Exec(`DELETE FROM canaries WHERE id = ?`, id)
	return scope, err
}
