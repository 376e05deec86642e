package audit_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/internal/checkpoint"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func open(t *testing.T, dir, file string) (*store.Store, *audit.Log) {
	t.Helper()
	s, err := storetest.Open(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	l, err := audit.Open(s, dir, "b1")
	if err != nil {
		t.Fatal(err)
	}
	return s, l
}

func appendN(t *testing.T, s *store.Store, n int) {
	t.Helper()
	for range n {
		if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			_, err := audit.Append(tx, event.Record{Time: now, Actor: "broker"}, event.Canary{As: event.CanaryIssued, ID: fmt.Sprint(n)})
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func head(t *testing.T, l *audit.Log, since int64) (checkpoint.Checkpoint, []byte, [][]byte) {
	t.Helper()
	signed, proof, err := l.Head(t.Context(), since)
	if err != nil {
		t.Fatal(err)
	}
	c, err := checkpoint.Open(signed, l.Verifier())
	if err != nil {
		t.Fatal(err)
	}
	return c, signed, proof
}

func verify(t *testing.T, s *store.Store) error {
	t.Helper()
	var v audit.Verification
	if err := v.Verify(t.Context(), s, func(int64, int64, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	return v.Problem
}

func TestEveryHeadFollowsEveryOlderOne(t *testing.T) {
	dir := t.TempDir()
	if err := audit.CreateKey(dir, "b1", rand.Reader); err != nil {
		t.Fatal(err)
	}
	s, l := open(t, dir, "store.db")
	var heads []checkpoint.Checkpoint
	for range 20 {
		c, _, _ := head(t, l, 0)
		heads = append(heads, c)
		appendN(t, s, 1)
	}
	for _, old := range heads {
		c, _, proof := head(t, l, old.Size)
		if fresh, err := c.Follows(old, proof); err != nil || fresh {
			t.Errorf("size %d after %d: newEpoch=%v err=%v", c.Size, old.Size, fresh, err)
		}
		if old.Size < 2 {
			continue
		}
		old.Root[0] ^= 1
		if _, err := c.Follows(old, proof); !errors.Is(err, checkpoint.ErrRolledBack) {
			t.Errorf("another tree of size %d was taken for a prefix: %v", old.Size, err)
		}
	}
	if err := verify(t, s); err != nil {
		t.Error(err)
	}
}

func TestReceipt(t *testing.T) {
	dir := t.TempDir()
	if err := audit.CreateKey(dir, "b1", rand.Reader); err != nil {
		t.Fatal(err)
	}
	s, l := open(t, dir, "store.db")
	appendN(t, s, 9)
	record, signed, proof, err := l.Receipt(t.Context(), 4)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := audit.CheckReceipt(l.Verifier(), record, signed, proof); err != nil || r.Index != 4 {
		t.Fatalf("receipt: %+v, %v", r, err)
	}
	forged := []byte(strings.Replace(string(record), `"actor":"broker"`, `"actor":"nobody"`, 1))
	if _, err := audit.CheckReceipt(l.Verifier(), forged, signed, proof); err == nil {
		t.Error("a changed record passed")
	}
	if _, _, _, err := l.Receipt(t.Context(), 9); err == nil {
		t.Error("a receipt for a record that isn't there")
	}
}

func TestVerifyNamesWhatWasChanged(t *testing.T) {
	for _, tt := range []struct{ name, sql, want string }{
		{"changed", `UPDATE audit_records SET body = replace(body, 'broker', 'nobody') WHERE idx = 3`, "record 3"},
		{"removed", `DELETE FROM audit_records WHERE idx = 3`, "record 3 is missing"},
		{"cut off", `DELETE FROM audit_records WHERE idx = 9`, "cut off"},
		{"hash changed", `UPDATE audit_hashes SET hash = zeroblob(32) WHERE idx = 0`, "record 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := audit.CreateKey(dir, "b1", rand.Reader); err != nil {
				t.Fatal(err)
			}
			s, _ := open(t, dir, "store.db")
			appendN(t, s, 10)
			if err := verify(t, s); err != nil {
				t.Fatalf("the honest twin: %v", err)
			}
			if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
				_, err := tx.Exec(tt.sql)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if err := verify(t, s); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("verify: %v, want it to name %q", err, tt.want)
			}
		})
	}
}

func TestRestoredBackupOpensAnEpoch(t *testing.T) {
	dir := t.TempDir()
	if err := audit.CreateKey(dir, "b1", rand.Reader); err != nil {
		t.Fatal(err)
	}
	s, l := open(t, dir, "store.db")
	appendN(t, s, 8)
	before, signed, _ := head(t, l, 0)

	// The same broker on a store that has seen less.
	backup, restored := open(t, dir, "backup.db")
	appendN(t, backup, 3)
	for i := range 2 { // shown twice, opened once
		if since, err := restored.Shown(t.Context(), signed, "host:h", now); err != nil || since != 0 {
			t.Fatalf("shown %d: since %d, %v", i, since, err)
		}
	}
	after, _, _ := head(t, restored, 0)
	if after.Epoch != 2 || after.Size != 4 {
		t.Errorf("epoch %d size %d, want epoch 2 with one more record", after.Epoch, after.Size)
	}
	if fresh, err := after.Follows(before, nil); err != nil || !fresh {
		t.Errorf("new epoch: %v, %v", fresh, err)
	}
	if since, err := l.Shown(t.Context(), signed, "host:h", now); err != nil || since != before.Size {
		t.Errorf("an honest checkpoint: since %d, %v", since, err)
	}
	if _, err := l.Shown(t.Context(), []byte(fmt.Sprintf("countersign/b1/9\n9\n%s\n", "x")), "host:h", now); !errors.Is(err, audit.ErrNotOurs) {
		t.Errorf("an unsigned checkpoint: %v", err)
	}
}
