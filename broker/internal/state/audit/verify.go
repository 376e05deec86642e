package audit

import (
	"bytes"
	"context"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Tree hashes a log record by record (RFC 6962, section 2.1). It keeps of it only
// the right edge: some dozens of hashes, however long the log is.
type Tree struct {
	size int64
	edge []tlog.Hash // of the perfect subtrees that make the tree, the largest first
}

// Size is how many records were appended.
func (t *Tree) Size() int64 { return t.size }

// Append adds a record as it is stored. It returns the hashes that this completes, in
// the order in which tlog stores them: those from tlog.StoredHashCount(t.Size()) on.
func (t *Tree) Append(record []byte) []tlog.Hash {
	h := tlog.RecordHash(record)
	completed := []tlog.Hash{h}
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		h = tlog.NodeHash(t.edge[last], h)
		completed, t.edge = append(completed, h), t.edge[:last]
	}
	t.edge = append(t.edge, h)
	t.size++
	return completed
}

// Root is the tree's hash.
func (t *Tree) Root() (tlog.Hash, error) {
	if t.size == 0 {
		return tlog.TreeHash(0, nil)
	}
	h := t.edge[len(t.edge)-1]
	for i := len(t.edge) - 2; i >= 0; i-- {
		h = tlog.NodeHash(t.edge[i], h)
	}
	return h, nil
}

// A Verification is a log that was hashed again.
type Verification struct {
	Tree    Tree
	Problem error // the first thing that doesn't fit; nil: the log is whole
}

// verifyPage is how many records are read in one snapshot.
const verifyPage = 1000

// Verify hashes the log again, from where v stands, and holds every stored hash
// against it. It reads page by page, so that a broker can go on meanwhile; what is
// appended until the last page is read is verified, too. Each receives every record, with
// its index and the number of records at that moment; an error from it ends the reading.
func (v *Verification) Verify(ctx context.Context, s *store.Store, each func(index, all int64, body []byte) error) error {
	for more := true; more; {
		if err := s.Report(ctx, func(tx *store.Tx) (err error) {
			more, err = v.page(tx, each)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (v *Verification) bad(format string, args ...any) {
	if v.Problem == nil {
		v.Problem = fmt.Errorf(format, args...)
	}
}

// Page is Verify for the next page alone, of a snapshot that the caller has.
func (v *Verification) Page(tx *store.Tx, each func(index, all int64, body []byte) error) error {
	_, err := v.page(tx, each)
	return err
}

// page verifies the next records of one snapshot, and returns whether there are more.
func (v *Verification) page(tx *store.Tx, each func(index, all int64, body []byte) error) (more bool, err error) {
	all, err := size(tx)
	if err != nil {
		return false, err
	}
	from := v.Tree.size
	var computed []tlog.Hash
	read := 0
	err = Read(tx, from, verifyPage, func(index int64, body []byte) error {
		if index != v.Tree.size {
			v.bad("record %d is missing", v.Tree.size)
			v.Tree.size = index // what follows is still to be seen
		}
		if h, err := event.Header(body); err != nil || h.Index != index {
			v.bad("record %d is not readable", index)
		}
		if v.Problem == nil {
			computed = append(computed, v.Tree.Append(body)...)
		} else {
			v.Tree.size++
		}
		read++
		return each(index, all, body)
	})
	if err != nil {
		return false, err
	}
	more = read == verifyPage
	if v.Problem != nil {
		return more, nil
	}
	if err := v.compare(tx, from, computed); err != nil || more || v.Problem != nil {
		return more, err
	}
	var stored int64
	if err := tx.QueryRow(`SELECT COALESCE(MAX(idx)+1, 0) FROM audit_hashes`).Scan(&stored); err != nil {
		return false, err
	}
	if want := tlog.StoredHashCount(v.Tree.size); stored != want {
		v.bad("the tree has %d hashes for %d records, which need %d: records were cut off", stored, v.Tree.size, want)
	}
	return false, nil
}

// compare holds the hashes that the records from the given one on complete against
// the stored ones.
func (v *Verification) compare(tx *store.Tx, from int64, computed []tlog.Hash) error {
	first, next := tlog.StoredHashCount(from), 0
	err := tx.Each(func(row store.Row) error {
		var idx int64
		var stored []byte
		if err := row.Scan(&idx, &stored); err != nil {
			return err
		}
		if idx != first+int64(next) {
			v.bad("hash %d of the tree is missing", first+int64(next))
		} else if !bytes.Equal(stored, computed[next][:]) {
			v.bad("record %d was changed after it was written", recordOf(from, first+int64(next)))
		}
		next++
		return nil
	}, `SELECT idx, hash FROM audit_hashes WHERE idx >= ? AND idx < ? ORDER BY idx`, first, first+int64(len(computed)))
	if err == nil && next < len(computed) {
		v.bad("hash %d of the tree is missing", first+int64(next))
	}
	return err
}

// recordOf is the record from the given one on that completed the hash that is stored
// at index.
func recordOf(from, index int64) int64 {
	for tlog.StoredHashCount(from+1) <= index {
		from++
	}
	return from
}
