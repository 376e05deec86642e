package audit

import (
	"fmt"
	"testing"

	"golang.org/x/mod/sumdb/tlog"
)

// The tree that keeps its edge alone has the hashes and roots of tlog's own.
func TestTreeIsTlogs(t *testing.T) {
	var tree Tree
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, idx := range indexes {
			out[i] = stored[idx]
		}
		return out, nil
	})
	for n := range int64(600) {
		root, err := tree.Root()
		if err != nil {
			t.Fatal(err)
		}
		want, err := tlog.TreeHash(n, reader)
		if err != nil {
			t.Fatal(err)
		}
		if root != want {
			t.Fatalf("%d records: root %v, want %v", n, root, want)
		}
		record := fmt.Appendf(nil, "record %d", n)
		hashes, err := tlog.StoredHashes(n, record, reader)
		if err != nil {
			t.Fatal(err)
		}
		if got := tree.Append(record); fmt.Sprint(got) != fmt.Sprint(hashes) {
			t.Fatalf("record %d completes %v, want %v", n, got, hashes)
		}
		stored = append(stored, hashes...)
	}
	if len(tree.edge) > 10 {
		t.Errorf("the edge of 600 records has %d hashes", len(tree.edge))
	}
}
