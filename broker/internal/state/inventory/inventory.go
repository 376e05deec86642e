// Package inventory is what the broker knows of hosts: who was admitted, by
// which TPM, in which state, with which labels and reference set.
//
// Two things are kept apart. The tier says that a TPM is genuine, which
// vendors' roots say of any laptop; admission says that it is ours, which only
// an operator says: by registering an EK, by a join token, or by approving.
// A host's id is random and outlives its keys; EK hashes are attributes of it.
package inventory

import (
	"bytes"
	"cmp"
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
	"github.com/countersign/countersign/broker/internal/state/store"
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
	FactsDigest string                  // appraise.Host's, of what the audit log has of them
	Created     time.Time
	LastProved  time.Time
	Continuity  Continuity
	StepUps     int64     // how often its logs were asked for from their first entry
	SilentAt    time.Time // when it counts as silent, in serving time; zero: never

	// Unreadable is why the row can't be read whole. Lists have such a host, too; nothing
	// else reads or writes it. Part of a host can't be saved, either.
	Unreadable error `json:"-"`
	part       bool
}

var (
	// ErrUnknown says that no host has that id, name or key.
	ErrUnknown = errors.New("no such host")
	// ErrTaken says that an EK belongs to a host already.
	ErrTaken = errors.New("the EK belongs to another host")
	// ErrUnreadable is returned for a host whose row holds what no broker wrote.
	ErrUnreadable = errors.New("the host's row can't be read")
)

// NewID makes a random id: 80 bits, lowercase base 32.
func NewID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

const (
	saved = `id, name, state, state_reason, admitted, reenrolling, tier, labels, reference, address,
	ak_public, tls_key_hash, counters, pcrs, facts, facts_digest, created, last_proved, silent_at, step_ups, shown, left_behind, given`
	ofEKs   = `, (SELECT group_concat(ek_hash) FROM host_eks WHERE host_id = hosts.id)`
	columns = saved + ofEKs
	listed  = `id, name, state, state_reason, admitted, reenrolling, tier, labels, reference, address,
	ak_public, tls_key_hash, '', '', '{}', '', created, last_proved, silent_at, step_ups, shown, left_behind, given` + ofEKs
	asked = `id, name, state, state_reason, admitted, reenrolling, tier, labels, reference, address,
	ak_public, tls_key_hash, counters, '', '{}', facts_digest, created, last_proved, silent_at, step_ups, shown, left_behind, given, ''`
)

// Save writes h as it is now, its EKs too; an EK of another host is ErrTaken. A host that is
// out goes to the denial log.
func Save(tx *store.Tx, h Host) error {
	if h.part {
		return fmt.Errorf("inventory: %s is part of a host, and not to be saved", h.ID)
	}
	if h.Unreadable != nil {
		return h.Unreadable
	}
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
	if _, err := tx.Exec(`INSERT INTO hosts (`+saved+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET name = excluded.name, state = excluded.state, state_reason = excluded.state_reason,
		admitted = excluded.admitted, reenrolling = excluded.reenrolling, tier = excluded.tier, labels = excluded.labels,
		reference = excluded.reference, address = excluded.address, ak_public = excluded.ak_public,
		tls_key_hash = excluded.tls_key_hash, counters = excluded.counters, pcrs = excluded.pcrs, facts = excluded.facts, facts_digest = excluded.facts_digest,
		last_proved = excluded.last_proved, silent_at = excluded.silent_at, step_ups = excluded.step_ups,
		shown = excluded.shown, left_behind = excluded.left_behind, given = excluded.given`,
		h.ID, h.Name, string(h.State), h.Reason, h.Admitted, h.Reenrolling, h.Tier, string(labels), h.Reference, h.Address,
		h.AKPublic, key, string(counters), string(pcrs), string(facts), h.FactsDigest, store.Millis(h.Created), store.Millis(h.LastProved), store.Millis(h.SilentAt), h.StepUps,
		h.Continuity.Shown, h.Continuity.Left, h.Continuity.Given); err != nil {
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
	return deny(tx, h)
}

// Get reads the host with this id.
func Get(tx *store.Tx, id string) (Host, error) {
	return one(tx, `SELECT `+columns+` FROM hosts WHERE id = ?`, id)
}

// StateOf is a host's state alone.
func StateOf(tx *store.Tx, id string) (state State, err error) {
	err = tx.QueryRow(`SELECT state FROM hosts WHERE id = ?`, id).Scan(&state)
	if errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("%w: %v", ErrUnknown, id)
	}
	return state, err
}

// ByTLSKey reads the host whose sessions this key opens, as far as it takes to answer
// it: neither what it showed last nor its EKs. It can't be saved.
func ByTLSKey(tx *store.Tx, key evidence.Digest) (Host, error) {
	h, err := one(tx, `SELECT `+asked+` FROM hosts WHERE tls_key_hash = ?`, key.String())
	h.part = true
	return h, err
}

// ByEK reads the host that an EK belongs to.
func ByEK(tx *store.Tx, ek evidence.Digest) (Host, error) {
	return one(tx, `SELECT `+columns+` FROM hosts WHERE id = (SELECT host_id FROM host_eks WHERE ek_hash = ?)`, ek.String())
}

// ByAK reads the host that an attestation key belongs to, a TPMT_PUBLIC.
func ByAK(tx *store.Tx, ak []byte) (Host, error) {
	return one(tx, `SELECT `+columns+` FROM hosts WHERE ak_public = ? ORDER BY state = 'removed' DESC, id LIMIT 1`, ak)
}

// GiveUp takes from a host the keys that heir has, too: an operator said whose TPM it is.
func GiveUp(tx *store.Tx, h, heir Host) error {
	for _, ek := range heir.EKs {
		if _, err := tx.Exec(`DELETE FROM host_eks WHERE ek_hash = ? AND host_id = ?`, ek.String(), h.ID); err != nil {
			return err
		}
	}
	h.EKs = slices.DeleteFunc(slices.Clone(h.EKs), func(ek evidence.Digest) bool { return slices.Contains(heir.EKs, ek) })
	if bytes.Equal(h.AKPublic, heir.AKPublic) {
		h.AKPublic = nil
	}
	if h.TLSKey == heir.TLSKey {
		h.TLSKey = evidence.Digest{}
	}
	return Save(tx, h)
}

// Keys are those of one TPM.
type Keys struct {
	EKs      []evidence.Digest
	AKPublic []byte
	TLSKey   evidence.Digest
}

// Owners reads the hosts that have one of the keys, each once: the owner of the first EK
// first.
func Owners(tx *store.Tx, k Keys) (owners []Host, err error) {
	add := func(h Host, err error) error {
		if errors.Is(err, ErrUnknown) || err == nil && slices.ContainsFunc(owners, func(o Host) bool { return o.ID == h.ID }) {
			return nil
		}
		owners = append(owners, h)
		return err
	}
	for _, ek := range k.EKs {
		if err := add(ByEK(tx, ek)); err != nil {
			return nil, err
		}
	}
	if err := add(ByAK(tx, k.AKPublic)); err != nil {
		return nil, err
	}
	if err := add(one(tx, `SELECT `+columns+` FROM hosts WHERE tls_key_hash = ?`, k.TLSKey.String())); err != nil {
		return nil, err
	}
	return owners, nil
}

// mostNamesakes bounds the hosts of one name that Find looks at, admitted ones first:
// those that wait for admission name themselves.
const mostNamesakes = 1000

// Find reads a host by id, or by its name where only one has that name.
func Find(tx *store.Tx, idOrName string) (Host, error) {
	h, err := Get(tx, idOrName)
	if !errors.Is(err, ErrUnknown) {
		return h, err
	}
	list, err := store.Collect(tx, scan, `SELECT `+columns+` FROM hosts WHERE name = ? AND state <> 'removed' ORDER BY admitted DESC, id LIMIT ?`, idOrName, mostNamesakes)
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
	return list[0], list[0].Unreadable
}

// A Cursor is a host's place in a list; the zero Cursor is before the first.
type Cursor struct {
	Name   string // in the order of names
	Proved int64  // in the order of last proofs; Unix milliseconds
	ID     string
}

// Cursor is where a list goes on behind h.
func (h Host) Cursor() Cursor { return Cursor{h.Name, store.Millis(h.LastProved), h.ID} }

// ByName reads at most limit hosts behind after, tombstones too, in the order of
// names; of each what lists show: no facts, PCRs and counters.
func ByName(tx *store.Tx, after Cursor, limit int) ([]Host, error) {
	return store.Collect(tx, scan, `SELECT `+listed+` FROM hosts WHERE (name, id) > (?, ?) ORDER BY name, id LIMIT ?`, after.Name, after.ID, limit)
}

// ByProof is ByName in the order of last proofs, the oldest first.
func ByProof(tx *store.Tx, after Cursor, limit int) ([]Host, error) {
	return store.Collect(tx, scan, `SELECT `+listed+` FROM hosts WHERE (last_proved, id) > (?, ?) ORDER BY last_proved, id LIMIT ?`, after.Proved, after.ID, limit)
}

// Names are the names of hosts, by id; ids without a host are left out.
func Names(tx *store.Tx, ids []string) (map[string]string, error) {
	list, err := json.Marshal(ids)
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(ids))
	err = tx.Each(func(row store.Row) error {
		var id, name string
		err := row.Scan(&id, &name)
		names[id] = name
		return err
	}, `SELECT hosts.id, hosts.name FROM json_each(?) AS wanted CROSS JOIN hosts ON hosts.id = wanted.value`, string(list))
	return names, err
}

// A Silence is a host whose SilentAt has come.
type Silence struct {
	ID string
	At int64 // its SilentAt, in Unix milliseconds
}

// Silent reads at most limit hosts behind after whose SilentAt has come, the longest
// silent first.
func Silent(tx *store.Tx, now time.Time, after Silence, limit int) ([]Silence, error) {
	return store.Collect(tx, func(row store.Row) (s Silence, err error) {
		err = row.Scan(&s.At, &s.ID)
		return s, err
	}, `SELECT silent_at, id FROM hosts WHERE silent_at > 0 AND silent_at <= ? AND (silent_at, id) > (?, ?) ORDER BY silent_at, id LIMIT ?`,
		store.Millis(now), after.At, after.ID, limit)
}

// Shift moves every SilentAt by d: time in which the broker could hear nobody
// doesn't count as silence.
func Shift(tx *store.Tx, d time.Duration) error {
	_, err := tx.Exec(`UPDATE hosts SET silent_at = silent_at + ? WHERE silent_at > 0`, d.Milliseconds())
	return err
}

// Heard are the two hosts that proved themselves last, the last one first.
type Heard []struct {
	ID string
	At time.Time
}

// LastHeard reads who proved itself last until now. Later proofs are of a clock that was
// ahead, and show nobody to be heard.
func LastHeard(tx *store.Tx, now time.Time) (Heard, error) {
	return store.Collect(tx, func(row store.Row) (h struct {
		ID string
		At time.Time
	}, err error) {
		var ms int64
		err = row.Scan(&h.ID, &ms)
		h.At = store.Time(ms)
		return h, err
	}, `SELECT id, last_proved FROM hosts WHERE last_proved > 0 AND last_proved <= ? ORDER BY last_proved DESC, id DESC LIMIT 2`, store.Millis(now))
}

// Since reports whether another host than except proved itself after t.
func (h Heard) Since(t time.Time, except string) bool {
	for _, one := range h {
		if one.ID != except && one.At.After(t) {
			return true
		}
	}
	return false
}

// CountPending is how many hosts wait for an operator.
func CountPending(tx *store.Tx) (n int, err error) {
	err = tx.QueryRow(`SELECT COALESCE(SUM(n), 0) FROM counts WHERE topic = 'hosts' AND name = ?`, string(Pending)).Scan(&n)
	return n, err
}

func one(tx *store.Tx, query string, arg any) (Host, error) {
	h, err := scan(tx.QueryRow(query, arg))
	if errors.Is(err, sql.ErrNoRows) {
		return h, fmt.Errorf("%w: %v", ErrUnknown, arg)
	}
	return h, cmp.Or(err, h.Unreadable)
}

func scan(row store.Row) (Host, error) {
	var h Host
	var state, labels, counters, pcrs, facts string
	var key, eks sql.NullString
	var created, proved, silent int64
	err := row.Scan(&h.ID, &h.Name, &state, &h.Reason, &h.Admitted, &h.Reenrolling, &h.Tier, &labels, &h.Reference, &h.Address,
		&h.AKPublic, &key, &counters, &pcrs, &facts, &h.FactsDigest, &created, &proved, &silent, &h.StepUps, &h.Continuity.Shown, &h.Continuity.Left, &h.Continuity.Given, &eks)
	if err != nil {
		return h, err
	}
	h.State = State(state)
	h.Facts = json.RawMessage(facts)
	h.Created, h.LastProved, h.SilentAt = store.Time(created), store.Time(proved), store.Time(silent)
	if err := h.parse(key, eks.String, labels, counters, pcrs); err != nil {
		h.Unreadable = fmt.Errorf("%w: %s: %w", ErrUnreadable, h.ID, err)
	}
	return h, nil
}

// parse reads the columns that hold more than a word or a number.
func (h *Host) parse(key sql.NullString, eks, labels, counters, pcrs string) (err error) {
	if key.Valid {
		if h.TLSKey, err = evidence.ParseDigest(key.String); err != nil {
			return fmt.Errorf("TLS key: %w", err)
		}
	}
	for text := range strings.SplitSeq(eks, ",") {
		if text == "" {
			continue
		}
		ek, err := evidence.ParseDigest(text)
		if err != nil {
			return fmt.Errorf("EK: %w", err)
		}
		h.EKs = append(h.EKs, ek)
	}
	slices.SortFunc(h.EKs, func(a, b evidence.Digest) int { return strings.Compare(a.String(), b.String()) })
	for _, f := range []struct {
		name, text string
		into       any
	}{{"labels", labels, &h.Labels}, {"counters", counters, &h.Counters}, {"PCRs", pcrs, &h.PCRs}} {
		if f.text == "" {
			continue
		}
		if err := json.Unmarshal([]byte(f.text), f.into); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}
