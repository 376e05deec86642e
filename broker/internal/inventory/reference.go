package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/store"
)

// A Reference is one version of a named set of PCR values (SHA-256 bank). A
// host matches the set when it matches any of its versions, so that a fleet
// can move from one to the next.
type Reference struct {
	Name        string
	Version     int64
	PCRs        map[int]evidence.Digest
	LearnedFrom string // host id
	Created     time.Time
}

// ErrNoReference says that no set has that name.
var ErrNoReference = errors.New("no such reference set")

// AddReference stores r as the next version of its set.
func AddReference(tx *store.Tx, r Reference) (Reference, error) {
	if len(r.PCRs) == 0 {
		return r, errors.New("a reference set without a PCR would match every host")
	}
	if err := tx.QueryRow(`SELECT COALESCE(MAX(version), 0) + 1 FROM reference_sets WHERE name = ?`, r.Name).Scan(&r.Version); err != nil {
		return r, err
	}
	pcrs, err := json.Marshal(r.PCRs)
	if err != nil {
		return r, err
	}
	_, err = tx.Exec(`INSERT INTO reference_sets (name, version, pcrs, learned_from, created) VALUES (?, ?, ?, ?, ?)`,
		r.Name, r.Version, string(pcrs), r.LearnedFrom, store.Millis(r.Created))
	return r, err
}

// References reads the versions of one set, newest first, or of all where name
// is empty.
func References(tx *store.Tx, name string) ([]Reference, error) {
	rows, err := tx.Query(`SELECT name, version, pcrs, learned_from, created FROM reference_sets
		WHERE ? = '' OR name = ? ORDER BY name, version DESC`, name, name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var list []Reference
	for rows.Next() {
		var r Reference
		var pcrs string
		var created int64
		if err := rows.Scan(&r.Name, &r.Version, &pcrs, &r.LearnedFrom, &created); err != nil {
			return nil, err
		}
		r.Created = store.Time(created)
		if err := json.Unmarshal([]byte(pcrs), &r.PCRs); err != nil {
			return nil, fmt.Errorf("reference %s version %d: %w", r.Name, r.Version, err)
		}
		list = append(list, r)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if name != "" && len(list) == 0 {
		return nil, fmt.Errorf("%w: %s; `countersign reference learn --host H %s` makes it", ErrNoReference, name, name)
	}
	return list, nil
}

// Mismatch says how pcrs differ from r, in the order of the indices; it is
// empty where they match.
func (r Reference) Mismatch(pcrs map[int]evidence.Digest) []string {
	var diffs []string
	for _, i := range slices.Sorted(maps.Keys(r.PCRs)) {
		switch have, ok := pcrs[i]; {
		case !ok:
			diffs = append(diffs, fmt.Sprintf("PCR %d was not quoted", i))
		case !have.Equal(r.PCRs[i]):
			diffs = append(diffs, fmt.Sprintf("PCR %d is %s, version %d has %s", i, have, r.Version, r.PCRs[i]))
		}
	}
	return diffs
}
