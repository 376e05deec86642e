package audit

import (
	"database/sql"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"sync"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// A cached tree is the tree after the last Append of this process, whether or not that was
// committed. load uses it only if size and last hash equal those in the store.
type cached struct {
	mu   sync.Mutex
	tree Tree // guarded by mu
}

// load returns the tree of the log as the transaction sees it.
func load(tx *store.Tx) (Tree, error) {
	var t Tree
	var idx int64
	var last []byte
	err := tx.QueryRow(`SELECT (SELECT COALESCE(MAX(idx) + 1, 0) FROM audit_records), idx, hash FROM audit_hashes ORDER BY idx DESC LIMIT 1`).Scan(&t.size, &idx, &last)
	if errors.Is(err, sql.ErrNoRows) {
		return t, nil
	}
	if err != nil {
		return t, err
	}
	if want := tlog.StoredHashCount(t.size); idx+1 != want {
		return t, fmt.Errorf("audit: the tree has %d hashes for %d records, which need %d; `countersign fsck` says more", idx+1, t.size, want)
	}

	c := store.Beside[cached](tx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tree.size == t.size && string(c.tree.edge[len(c.tree.edge)-1][:]) == string(last) {
		return c.tree.clone(), nil
	}
	if t.edge, err = reader(tx).ReadHashes(edgeOf(t.size)); err != nil {
		return t, err
	}
	c.tree = t.clone()
	return t, nil
}

// keep caches the tree that the transaction has made.
func keep(tx *store.Tx, t Tree) {
	c := store.Beside[cached](tx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tree = t
}

func (t Tree) clone() Tree { return Tree{t.size, slices.Clone(t.edge)} }

// edgeOf returns the indexes of the hashes on the tree's right edge, largest subtree first.
func edgeOf(size int64) (indexes []int64) {
	for from := int64(0); from < size; {
		level := bits.Len64(uint64(size-from)) - 1
		indexes = append(indexes, tlog.StoredHashIndex(level, from>>level))
		from += 1 << level
	}
	return indexes
}

// reader reads stored hashes, all of one call by one statement.
func reader(tx *store.Tx) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		if len(indexes) == 0 {
			return nil, nil
		}
		// The number of placeholders is a power of two, so that few statements are prepared.
		args := make([]any, 1<<bits.Len(uint(len(indexes)-1)))
		for i := range args {
			args[i] = indexes[min(i, len(indexes)-1)]
		}
		read := make(map[int64]tlog.Hash, len(indexes))
		err := tx.Each(func(row store.Row) error {
			var idx int64
			var b []byte
			if err := row.Scan(&idx, &b); err != nil {
				return err
			}
			if len(b) != tlog.HashSize {
				return fmt.Errorf("hash %d has %d bytes", idx, len(b))
			}
			read[idx] = tlog.Hash(b)
			return nil
		}, selectHashes(len(args)), args...)
		if err != nil {
			return nil, err
		}

		hashes := make([]tlog.Hash, len(indexes))
		for i, idx := range indexes {
			h, ok := read[idx]
			if !ok {
				return nil, fmt.Errorf("hash %d is missing", idx)
			}
			hashes[i] = h
		}
		return hashes, nil
	})
}

func selectHashes(n int) string {
	return `SELECT idx, hash FROM audit_hashes WHERE idx IN (` + places(n, `?`) + `)`
}

func insertHashes(n int) string {
	return `INSERT INTO audit_hashes (idx, hash) VALUES ` + places(n, `(?, ?)`)
}

func places(n int, each string) string { return strings.TrimSuffix(strings.Repeat(each+", ", n), ", ") }
