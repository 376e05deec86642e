package main

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// Ends that can't be read are an alarm themselves.
func TestEndsThatAreNotKnown(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO operators (key_hash, name, role, created, expires) VALUES ('k', 'alice', 'admin', 'x', 'x')`)
		return err
	}))
	if alarms := (ends{store: s}).alarms(slog.New(slog.DiscardHandler), time.Now()); len(alarms) != 1 {
		t.Errorf("alarms: %q", alarms)
	}
}
