// Package inventory is what the broker knows of hosts: who was admitted, by
// which TPM, in which state, with which labels and reference set.
//
// Two things are kept apart. The tier says that a TPM is genuine, which
// vendors' roots say of any laptop; admission says that it is ours, which only
// an operator says: by registering an EK, by a join token, or by approving.
// A host's id is random and outlives its keys; EK hashes are attributes of it.
package inventory

import (
	"crypto/rand"
	"database/sql"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/store"
)

// A State is what the broker holds of a host. Unreachable is stale, never
// failed.
type State string

const (
	Registered  State = "registered"  // its EK is known, it has not joined yet
	Pending     State = "pending"     // it proved a TPM; an operator has to admit it
	Trusted     State = "trusted"     // its last evidence was good
	Stale       State = "stale"       // silent for longer than allowed
	Failed      State = "failed"      // its last evidence said no
	Quarantined State = "quarantined" // an operator, or counters that went back, said no
	Removed     State = "removed"     // a tombstone: its EKs and keys are refused
)

// States are all of them.
var States = []State{Registered, Pending, Trusted, Stale, Failed, Quarantined, Removed}

// A Host is one machine. The zero values of key fields mean that it never
// joined.
type Host struct {
	ID          string
	Name        string
	State       State
	Reason      string // of the state
	Admitted    bool
	Reenrolling bool // an operator allows the next join to bring a new AK
	Tier        string
	Labels      map[string]string
	Reference   string // name of the reference set that its PCRs must match
	Address     string // last seen at
	EKs         []evidence.Digest
	AKPublic    []byte
	TLSKey      evidence.Digest // SHA-256 of the TLS key's PKIX DER
	Counters    *appraise.Counters
	PCRs        map[int]evidence.Digest // as last quoted
	Facts       json.RawMessage         // as last appraised
	Created     time.Time
	LastProved  time.Time
	SilentAt    time.Time // when it counts as silent, in serving time; zero: never
}

var (
	// ErrUnknown says that no host has that id, name or key.
	ErrUnknown = errors.New("no such host")
	// ErrTaken says that an EK belongs to a host already.
	ErrTaken = errors.New("the EK belongs to another host")
)

// NewID makes a random id: 80 bits, lowercase base 32.
func NewID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

const columns = `id, name, state, state_reason, admitted, reenrolling, tier, labels, reference, address,
	ak_public, tls_key_hash, counters, pcrs, facts, created, last_proved, silent_at`

// Save writes h as it is now, its EKs too; an EK of another host is ErrTaken.
func Save(tx *store.Tx, h Host) error {
	labels, err := json.Marshal(h.Labels)
	if err != nil {
		return err
	}
	pcrs, err := json.Marshal(h.PCRs)
	if err != nil {
		return err
	}
	counters, err := json.Marshal(h.Counters)
	if err != nil {
		return err
	}
	facts := h.Facts
	if facts == nil {
		facts = json.RawMessage("{}")
	}
	var key sql.NullString
	if !h.TLSKey.IsZero() {
		key = sql.NullString{String: h.TLSKey.String(), Valid: true}
	}
	if _, err := tx.Exec(`INSERT INTO hosts (`+columns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET name = excluded.name, state = excluded.state, state_reason = excluded.state_reason,
		admitted = excluded.admitted, reenrolling = excluded.reenrolling, tier = excluded.tier, labels = excluded.labels,
		reference = excluded.reference, address = excluded.address, ak_public = excluded.ak_public,
		tls_key_hash = excluded.tls_key_hash, counters = excluded.counters, pcrs = excluded.pcrs, facts = excluded.facts,
		last_proved = excluded.last_proved, silent_at = excluded.silent_at`,
		h.ID, h.Name, string(h.State), h.Reason, h.Admitted, h.Reenrolling, h.Tier, string(labels), h.Reference, h.Address,
		h.AKPublic, key, string(counters), string(pcrs), string(facts), store.Millis(h.Created), store.Millis(h.LastProved), store.Millis(h.SilentAt)); err != nil {
		return err
	}
	for _, ek := range h.EKs {
		if _, err := tx.Exec(`INSERT INTO host_eks (ek_hash, host_id) VALUES (?, ?) ON CONFLICT (ek_hash) DO NOTHING`, ek.String(), h.ID); err != nil {
			return err
		}
		var owner string
		if err := tx.QueryRow(`SELECT host_id FROM host_eks WHERE ek_hash = ?`, ek.String()).Scan(&owner); err != nil {
			return err
		}
		if owner != h.ID {
			return fmt.Errorf("%w: EK %s is host %s's", ErrTaken, ek, owner)
		}
	}
	return nil
}

// Get reads the host with this id.
func Get(tx *store.Tx, id string) (Host, error) { return one(tx, `id = ?`, id) }

// ByTLSKey reads the host whose sessions this key opens.
func ByTLSKey(tx *store.Tx, key evidence.Digest) (Host, error) {
	return one(tx, `tls_key_hash = ?`, key.String())
}

// ByEK reads the host that an EK belongs to.
func ByEK(tx *store.Tx, ek evidence.Digest) (Host, error) {
	return one(tx, `id = (SELECT host_id FROM host_eks WHERE ek_hash = ?)`, ek.String())
}

// Find reads a host by id, or by its name where only one has that name.
func Find(tx *store.Tx, idOrName string) (Host, error) {
	h, err := Get(tx, idOrName)
	if !errors.Is(err, ErrUnknown) {
		return h, err
	}
	list, err := query(tx, `name = ? AND state <> 'removed'`, idOrName)
	switch {
	case err != nil:
		return Host{}, err
	case len(list) == 0:
		return Host{}, fmt.Errorf("%w: %s; `countersign host list` shows them", ErrUnknown, idOrName)
	}
	// Who waits for admission has only named itself.
	if admitted := slices.DeleteFunc(slices.Clone(list), func(h Host) bool { return !h.Admitted }); len(admitted) > 0 {
		list = admitted
	}
	if len(list) > 1 {
		return Host{}, fmt.Errorf("%d hosts are named %s: use the id", len(list), idOrName)
	}
	return list[0], nil
}

// All reads every host, tombstones too, by id.
func All(tx *store.Tx) ([]Host, error) { return query(tx, `1 = 1`) }

// Silent reads the hosts whose SilentAt has come.
func Silent(tx *store.Tx, now time.Time) ([]Host, error) {
	return query(tx, `silent_at > 0 AND silent_at <= ?`, store.Millis(now))
}

// Shift moves every SilentAt by d: time in which the broker could hear nobody
// doesn't count as silence.
func Shift(tx *store.Tx, d time.Duration) error {
	_, err := tx.Exec(`UPDATE hosts SET silent_at = silent_at + ? WHERE silent_at > 0`, d.Milliseconds())
	return err
}

// HeardSince says whether any other host proved itself after t.
func HeardSince(tx *store.Tx, except string, t time.Time) (bool, error) {
	var n int
	err := tx.QueryRow(`SELECT COUNT(*) FROM hosts WHERE last_proved > ? AND id <> ?`, store.Millis(t), except).Scan(&n)
	return n > 0, err
}

// CountPending is how many hosts wait for an operator.
func CountPending(tx *store.Tx) (n int, err error) {
	err = tx.QueryRow(`SELECT COUNT(*) FROM hosts WHERE state = ?`, string(Pending)).Scan(&n)
	return n, err
}

func one(tx *store.Tx, where string, arg any) (Host, error) {
	list, err := query(tx, where, arg)
	if err != nil {
		return Host{}, err
	}
	if len(list) == 0 {
		return Host{}, fmt.Errorf("%w: %v", ErrUnknown, arg)
	}
	return list[0], nil
}

func query(tx *store.Tx, where string, args ...any) ([]Host, error) {
	list, err := store.Collect(tx, scan, `SELECT `+columns+` FROM hosts WHERE `+where+` ORDER BY id`, args...)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].EKs, err = eks(tx, list[i].ID); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func scan(row store.Row) (Host, error) {
	var h Host
	var state, labels, counters, pcrs, facts string
	var key sql.NullString
	var created, proved, silent int64
	err := row.Scan(&h.ID, &h.Name, &state, &h.Reason, &h.Admitted, &h.Reenrolling, &h.Tier, &labels, &h.Reference, &h.Address,
		&h.AKPublic, &key, &counters, &pcrs, &facts, &created, &proved, &silent)
	if err != nil {
		return h, err
	}
	h.State = State(state)
	h.Facts = json.RawMessage(facts)
	h.Created, h.LastProved, h.SilentAt = store.Time(created), store.Time(proved), store.Time(silent)
	if key.Valid {
		if h.TLSKey, err = evidence.ParseDigest(key.String); err != nil {
			return h, fmt.Errorf("host %s: %w", h.ID, err)
		}
	}
	for _, f := range []struct {
		text string
		into any
	}{{labels, &h.Labels}, {counters, &h.Counters}, {pcrs, &h.PCRs}} {
		if f.text == "" {
			continue
		}
		if err := json.Unmarshal([]byte(f.text), f.into); err != nil {
			return h, fmt.Errorf("host %s: %w", h.ID, err)
		}
	}
	return h, nil
}

func eks(tx *store.Tx, id string) ([]evidence.Digest, error) {
	return store.Collect(tx, func(row store.Row) (d evidence.Digest, err error) {
		var text string
		if err := row.Scan(&text); err != nil {
			return d, err
		}
		return evidence.ParseDigest(text)
	}, `SELECT ek_hash FROM host_eks WHERE host_id = ? ORDER BY ek_hash`, id)
}
