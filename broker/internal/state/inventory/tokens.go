package inventory

import (
	"crypto/rand"
	"database/sql"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/secret"
)

// A JoinToken admits one host, once. Only its hash is stored.
type JoinToken struct {
	Name      string // the host's name; empty: what it calls itself
	Labels    map[string]string
	Reference string
	Expires   time.Time
}

// ErrToken says that a join token admits nobody. Which of unknown, used and
// expired it is, is for the audit log and not for who brought it.
var ErrToken = errors.New("the join token is unknown, used or expired: ask an operator for a new one")

// TokenHash returns the hash by which the store and the log know a token.
func TokenHash(token string) string {
	return evidence.Sum([]byte("countersign join token\x00" + token)).String()
}

// CreateToken stores t and returns its secret: 160 bits in base 32.
func CreateToken(tx *store.Tx, t JoinToken) (secret.Bytes, error) {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails
	token := "cs-" + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
	labels, err := json.Marshal(t.Labels)
	if err != nil {
		return secret.Bytes{}, err
	}
	_, err = tx.Exec(`INSERT INTO join_tokens (hash, name, labels, reference, expires) VALUES (?, ?, ?, ?, ?)`,
		TokenHash(token), t.Name, string(labels), t.Reference, store.Millis(t.Expires))
	return secret.New([]byte(token)), err
}

// UseToken spends a token for a host; ErrToken where it can't be spent.
func UseToken(tx *store.Tx, token, host string, now time.Time) (JoinToken, error) {
	var t JoinToken
	var labels string
	var expires, used int64
	err := tx.QueryRow(`SELECT name, labels, reference, expires, used FROM join_tokens WHERE hash = ?`, TokenHash(token)).
		Scan(&t.Name, &labels, &t.Reference, &expires, &used)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return t, fmt.Errorf("%w (unknown)", ErrToken)
	case err != nil:
		return t, err
	case used != 0:
		return t, fmt.Errorf("%w (used at %s)", ErrToken, store.Time(used).Format(time.RFC3339))
	case !now.Before(store.Time(expires)):
		return t, fmt.Errorf("%w (expired at %s)", ErrToken, store.Time(expires).Format(time.RFC3339))
	}
	t.Expires = store.Time(expires)
	if err := json.Unmarshal([]byte(labels), &t.Labels); err != nil {
		return t, err
	}
	if _, err := tx.Exec(`UPDATE join_tokens SET used = ?, used_by = ? WHERE hash = ?`, store.Millis(now), host, TokenHash(token)); err != nil {
		return t, err
	}
	return t, denials.Set(tx, denials.Denial{Kind: denials.Token, Name: TokenHash(token), Until: t.Expires})
}
