package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Reference is one version of a named reference set. A host matches the set
// by any version that is in force, so that a fleet can move from one to the
// next.
type Reference struct {
	Name        string
	Version     int64
	Content     json.RawMessage // a reference.Content
	LearnedFrom string          // host id; empty: written by hand
	Created     time.Time
	Approved    time.Time // zero: a draft
	Ends        time.Time // zero: it stays in force
}

// Reference states.
const (
	Draft    = "draft"
	Approved = "approved"
	Ended    = "ended"
)

// State says whether r is in force now.
func (r Reference) State(now time.Time) string {
	switch {
	case r.Approved.IsZero():
		return Draft
	case !r.Ends.IsZero() && !now.Before(r.Ends):
		return Ended
	}
	return Approved
}

// ErrNoReference says that no set has that name.
var ErrNoReference = errors.New("no such reference set")

// AddReference stores r as the next version of its set, a draft.
func AddReference(tx *store.Tx, r Reference) (Reference, error) {
	if err := tx.QueryRow(`SELECT COALESCE(MAX(version), 0) + 1 FROM reference_sets WHERE name = ?`, r.Name).Scan(&r.Version); err != nil {
		return r, err
	}
	_, err := tx.Exec(`INSERT INTO reference_sets (name, version, content, learned_from, created) VALUES (?, ?, ?, ?, ?)`,
		r.Name, r.Version, string(r.Content), r.LearnedFrom, store.Millis(r.Created))
	return r, err
}

// ApproveReference puts a version in force, 0 for the newest; those that were,
// and would stay longer, end at olderEnd.
func ApproveReference(tx *store.Tx, name string, version int64, now, olderEnd time.Time) (Reference, error) {
	list, err := Versions(tx, name)
	if err != nil {
		return Reference{}, err
	}
	if version == 0 {
		version = list[0].Version
	}
	for _, r := range list {
		if r.Version != version {
			continue
		}
		if _, err := tx.Exec(`UPDATE reference_sets SET ends = ? WHERE name = ? AND approved > 0 AND (ends = 0 OR ends > ?)`,
			store.Millis(olderEnd), name, store.Millis(olderEnd)); err != nil {
			return r, err
		}
		if err := tx.QueryRow(`SELECT content FROM reference_sets WHERE name = ? AND version = ?`, name, version).Scan((*[]byte)(&r.Content)); err != nil {
			return r, err
		}
		r.Approved, r.Ends = now, time.Time{}
		_, err := tx.Exec(`UPDATE reference_sets SET approved = ?, ends = 0 WHERE name = ? AND version = ?`, store.Millis(now), name, version)
		return r, err
	}
	return Reference{}, fmt.Errorf("%w: %s has no version %d", ErrNoReference, name, version)
}

// References reads the versions of one set, newest first.
func References(tx *store.Tx, name string) ([]Reference, error) {
	list, err := store.Collect(tx, scanReference, `SELECT name, version, content, learned_from, created, approved, ends FROM reference_sets
		WHERE name = ? ORDER BY version DESC`, name)
	return list, known(list, err, name)
}

// Versions is References, without their contents.
func Versions(tx *store.Tx, name string) ([]Reference, error) {
	list, err := store.Collect(tx, scanReference, `SELECT name, version, '', learned_from, created, approved, ends FROM reference_sets
		WHERE name = ? ORDER BY version DESC`, name)
	return list, known(list, err, name)
}

func known(list []Reference, err error, name string) error {
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("%w: %s; `countersign reference learn --host H %s` makes it", ErrNoReference, name, name)
	}
	return err
}

func scanReference(row store.Row) (r Reference, err error) {
	var content string
	var created, approved, ends int64
	err = row.Scan(&r.Name, &r.Version, &content, &r.LearnedFrom, &created, &approved, &ends)
	r.Content, r.Created, r.Approved, r.Ends = json.RawMessage(content), store.Time(created), timeOrZero(approved), timeOrZero(ends)
	return r, err
}

// A ReferenceFilter selects versions of reference sets.
type ReferenceFilter struct {
	Name    string // empty: of all sets
	Version int64  // of Name; 0: all
	After   ReferencePlace
	Limit   int
}

// A ReferencePlace is where a version stands in a list; zero: before the first.
type ReferencePlace struct {
	Name    string
	Version int64
}

// maxPage bounds, in bytes, the contents of one page of versions; one larger than that
// is a page by itself.
const maxPage = 2 << 20

// ReferencePage reads versions by name, the newest of each first, and whether there
// are more.
func ReferencePage(tx *store.Tx, f ReferenceFilter) (list []Reference, more bool, err error) {
	enough, size := errors.New("enough"), 0
	read := func(row store.Row) error {
		r, err := scanReference(row)
		if err != nil {
			return err
		}
		if size += len(r.Content); len(list) > 0 && (size > maxPage || len(list) == f.Limit) {
			more = true
			return enough
		}
		list = append(list, r)
		return nil
	}
	const columns = `SELECT name, version, content, learned_from, created, approved, ends FROM reference_sets`
	switch {
	case f.Version != 0:
		err = tx.Each(read, columns+` WHERE name = ? AND version = ?`, f.Name, f.Version)
	case f.Name != "" && f.After.Version == 0:
		err = tx.Each(read, columns+` WHERE name = ? ORDER BY version DESC`, f.Name)
	case f.Name != "":
		err = tx.Each(read, columns+` WHERE name = ? AND version < ? ORDER BY version DESC`, f.Name, f.After.Version)
	default:
		if f.After.Name != "" {
			err = tx.Each(read, columns+` WHERE name = ? AND version < ? ORDER BY version DESC`, f.After.Name, f.After.Version)
		}
		if err == nil {
			err = tx.Each(read, columns+` WHERE name > ? ORDER BY name, version DESC`, f.After.Name)
		}
	}
	if errors.Is(err, enough) {
		return list, true, nil
	}
	if err == nil && len(list) == 0 && f.Name != "" && f.After == (ReferencePlace{}) {
		if f.Version != 0 {
			err = fmt.Errorf("%w: %s has no version %d", ErrNoReference, f.Name, f.Version)
		} else {
			err = known(nil, nil, f.Name)
		}
	}
	return list, more, err
}

func timeOrZero(millis int64) time.Time {
	if millis == 0 {
		return time.Time{}
	}
	return store.Time(millis)
}

// Maintain lets be what a set's file rules don't allow, until then.
func Maintain(tx *store.Tx, name string, until time.Time) error {
	_, err := tx.Exec(`INSERT INTO reference_maintenance (name, ends) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET ends = excluded.ends`, name, store.Millis(until))
	return err
}

// Maintenance is when a set's maintenance ends, or ended.
func Maintenance(tx *store.Tx, name string) (time.Time, error) {
	var ends int64
	err := tx.QueryRow(`SELECT COALESCE(MAX(ends), 0) FROM reference_maintenance WHERE name = ?`, name).Scan(&ends)
	return timeOrZero(ends), err
}

// A Release is one version of a named set of files that a build announced.
type Release struct {
	Name    string
	Version int64
	Source  string // what it was made of
	Files   []ReleaseFile
	Added   time.Time
	Ends    time.Time // zero: it stays in force
}

// A ReleaseFile is a path and its digest, as "sha256:…".
type ReleaseFile struct {
	Path   string `json:"path"`
	Digest string `json:"digest"`
}

// AddRelease stores r as the next version of its name; older ones, which would
// stay longer, end at olderEnd.
func AddRelease(tx *store.Tx, r Release, olderEnd time.Time) (Release, error) {
	if err := tx.QueryRow(`SELECT COALESCE(MAX(version), 0) + 1 FROM releases WHERE name = ?`, r.Name).Scan(&r.Version); err != nil {
		return r, err
	}
	files, err := json.Marshal(r.Files)
	if err != nil {
		return r, err
	}
	if _, err := tx.Exec(`UPDATE releases SET ends = ? WHERE name = ? AND (ends = 0 OR ends > ?)`, store.Millis(olderEnd), r.Name, store.Millis(olderEnd)); err != nil {
		return r, err
	}
	_, err = tx.Exec(`INSERT INTO releases (name, version, source, files, added, ends) VALUES (?, ?, ?, ?, ?, 0)`, r.Name, r.Version, r.Source, string(files), store.Millis(r.Added))
	return r, err
}

// A ReleaseSize is a release without its files.
type ReleaseSize struct {
	Name    string
	Version int64
	Source  string
	Files   int
	Added   time.Time
	Ends    time.Time // zero: it stays in force
}

// Size is r without its files.
func (r Release) Size() ReleaseSize {
	return ReleaseSize{r.Name, r.Version, r.Source, len(r.Files), r.Added, r.Ends}
}

// ReleaseSizes reads the versions of one name, newest first, or of all.
func ReleaseSizes(tx *store.Tx, name string) ([]ReleaseSize, error) {
	return store.Collect(tx, func(row store.Row) (r ReleaseSize, err error) {
		var added, ends int64
		err = row.Scan(&r.Name, &r.Version, &r.Source, &r.Files, &added, &ends)
		r.Added, r.Ends = store.Time(added), timeOrZero(ends)
		return r, err
	}, `SELECT name, version, source, json_array_length(files), added, ends FROM releases WHERE ? = '' OR name = ? ORDER BY name, version DESC`, name, name)
}

// Releases reads all versions of all releases, the newest of each name first.
func Releases(tx *store.Tx) ([]Release, error) {
	return store.Collect(tx, func(row store.Row) (r Release, err error) {
		var files string
		var added, ends int64
		if err := row.Scan(&r.Name, &r.Version, &r.Source, &files, &added, &ends); err != nil {
			return r, err
		}
		if err := json.Unmarshal([]byte(files), &r.Files); err != nil {
			return r, fmt.Errorf("release %s version %d: %w", r.Name, r.Version, err)
		}
		r.Added, r.Ends = store.Time(added), timeOrZero(ends)
		return r, nil
	}, `SELECT name, version, source, files, added, ends FROM releases ORDER BY name, version DESC`)
}
