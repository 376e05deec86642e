package inventory

import (
	"cmp"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// ErrChanged is returned when a host's row changed after the caller read it.
var ErrChanged = errors.New("the host was changed meanwhile")

// A Standing is the part of a host's row that a proof reads and changes. It is smaller than
// a Host, because each request writes it.
type Standing struct {
	ID          string
	State       State
	Admitted    bool   // not changed by a proof
	Reenrolling bool   // not changed by a proof
	AKPublic    []byte // not changed by a proof
	Counters    *appraise.Counters
	FactsDigest string
	SilentAt    time.Time
	Continuity  Continuity

	stored string // Counters as they are in the row; empty means: as this version encodes them
}

// A Showing is what a proof showed of a host.
type Showing struct {
	Address string
	PCRs    map[int]evidence.Digest
	Facts   any // to be kept as JSON
	At      time.Time
}

// Standing returns the host's standing.
func (h Host) Standing() Standing {
	return Standing{ID: h.ID, State: h.State, Admitted: h.Admitted, Reenrolling: h.Reenrolling, AKPublic: h.AKPublic, Counters: h.Counters, FactsDigest: h.FactsDigest, SilentAt: h.SilentAt, Continuity: h.Continuity}
}

// Status returns the host's status.
func (s Standing) Status() Status {
	return Status{State: s.State, Admitted: s.Admitted, Joined: len(s.AKPublic) > 0, Reenrolling: s.Reenrolling}
}

// StandingOf reads a host's standing.
func StandingOf(tx *store.Tx, id string) (Standing, error) {
	s := Standing{ID: id}
	var silent int64
	err := tx.QueryRow(`SELECT state, admitted, reenrolling, ak_public, counters, facts_digest, silent_at, shown, left_behind, given FROM hosts WHERE id = ?`, id).
		Scan(&s.State, &s.Admitted, &s.Reenrolling, &s.AKPublic, &s.stored, &s.FactsDigest, &silent, &s.Continuity.Shown, &s.Continuity.Left, &s.Continuity.Given)
	if errors.Is(err, sql.ErrNoRows) {
		return s, fmt.Errorf("%w: %v", ErrUnknown, id)
	}
	if err != nil {
		return s, err
	}
	s.SilentAt = store.Time(silent)
	if s.stored != "" {
		if err := json.Unmarshal([]byte(s.stored), &s.Counters); err != nil {
			return s, fmt.Errorf("%w: %s: counters: %w", ErrUnreadable, id, err)
		}
	}
	return s, nil
}

// Become replaces the standing s by next and writes what the proof showed. It fails with
// ErrChanged and writes nothing if the row's standing isn't s any more.
func (s Standing) Become(tx *store.Tx, next Standing, shown Showing) error {
	before := s.stored
	if before == "" {
		b, err := json.Marshal(s.Counters)
		if err != nil {
			return err
		}
		before = string(b)
	}
	counters, err := json.Marshal(next.Counters)
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
	result, err := tx.Exec(`UPDATE hosts SET state = ?, state_reason = '', address = ?, counters = ?, pcrs = ?, facts = ?, facts_digest = ?, last_proved = ?, silent_at = ?, shown = ?, left_behind = ?, given = ?
		WHERE id = ? AND state = ? AND admitted = ? AND reenrolling = ? AND ak_public = ? AND counters = ? AND facts_digest = ? AND silent_at = ? AND given = ?`,
		string(next.State), shown.Address, string(counters), string(pcrs), string(facts), next.FactsDigest, store.Millis(shown.At), store.Millis(next.SilentAt),
		next.Continuity.Shown, next.Continuity.Left, next.Continuity.Given,
		s.ID, string(s.State), s.Admitted, s.Reenrolling, s.AKPublic, before, s.FactsDigest, store.Millis(s.SilentAt), s.Continuity.Given)
	if err != nil {
		return err
	}
	if n, err := result.RowsAffected(); err != nil || n != 1 {
		return cmp.Or(err, ErrChanged)
	}
	return nil
}
