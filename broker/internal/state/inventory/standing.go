package inventory

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Standing is what a proof changes of a host, and what it is held against: less than a
// Host, as each request reads and writes it.
type Standing struct {
	ID          string
	State       State
	Reenrolling bool   // not changed by a proof
	AKPublic    []byte // not changed by a proof
	Counters    *appraise.Counters
	FactsDigest string
	SilentAt    time.Time
}

// A Showing is what a host showed by a proof.
type Showing struct {
	Address string
	PCRs    map[int]evidence.Digest
	Facts   any // to be kept as JSON
	At      time.Time
}

// StandingOf reads a host's standing.
func StandingOf(tx *store.Tx, id string) (Standing, error) {
	s := Standing{ID: id}
	var counters string
	var silent int64
	err := tx.QueryRow(`SELECT state, reenrolling, ak_public, counters, facts_digest, silent_at FROM hosts WHERE id = ?`, id).
		Scan(&s.State, &s.Reenrolling, &s.AKPublic, &counters, &s.FactsDigest, &silent)
	if errors.Is(err, sql.ErrNoRows) {
		return s, fmt.Errorf("%w: %v", ErrUnknown, id)
	}
	if err != nil {
		return s, err
	}
	s.SilentAt = store.Time(silent)
	if counters != "" {
		if err := json.Unmarshal([]byte(counters), &s.Counters); err != nil {
			return s, fmt.Errorf("%w: %s: counters: %w", ErrUnreadable, id, err)
		}
	}
	return s, nil
}

// Save writes the standing that a good proof gave, and what it showed.
func (s Standing) Save(tx *store.Tx, shown Showing) error {
	counters, err := json.Marshal(s.Counters)
	if err != nil {
		return err
	}
	pcrs, err := json.Marshal(shown.PCRs)
	if err != nil {
		return err
	}
	facts, err := json.Marshal(shown.Facts)
	if err != nil {
		return err
	}
	_, err = tx.Exec(`UPDATE hosts SET state = ?, state_reason = '', address = ?, counters = ?, pcrs = ?, facts = ?, facts_digest = ?, last_proved = ?, silent_at = ? WHERE id = ?`,
		string(s.State), shown.Address, string(counters), string(pcrs), string(facts), s.FactsDigest, store.Millis(shown.At), store.Millis(s.SilentAt), s.ID)
	return err
}
