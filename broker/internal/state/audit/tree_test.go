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

// A header is read without the detail, whatever texts before it hold.
func TestParseHeader(t *testing.T) {
	for body, want := range map[string]Header{
		`{"index":7,"time":"2026-01-02T03:04:05Z","kind":"a.b","actor":"broker","lease":"l","detail":{"kind":"x","index":9}}`: {Index: 7, Kind: "a.b", Lease: "l"},
		`{"index":7,"kind":"a.b","actor":"operator:x\",\"detail\":{","host":"h"}`:                                             {Index: 7, Kind: "a.b", Host: "h"},
		`{"index":7,"kind":"a.b","actor":"x"}`:                                                                                {Index: 7, Kind: "a.b"},
	} {
		h, err := ParseHeader([]byte(body))
		if want.Time = h.Time; err != nil || h != want {
			t.Errorf("%s: %+v, %v", body, h, err)
		}
	}
	if _, err := ParseHeader([]byte(`{"index":7,"kind"`)); err == nil {
		t.Error("half a record was read")
	}
}
