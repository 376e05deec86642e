package values_test

import (
	"path/filepath"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/broker/internal/state/values"
	"github.com/countersign/countersign/test/check"
)

// A value is told from none even where it is empty, as one that was damaged: by its
// name alone a serial is revoked.
func TestEmptyIsNotMissing(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { check.Nil(t, s.Close()) })
	table := values.In(s)
	check.Nil(t, table.Add(t.Context(), "revoked", "17", []byte{}))

	if value := check.Must(table.Get(t.Context(), "revoked", "17"))(t); value == nil {
		t.Error("an empty value is taken for none")
	}
	if value := check.Must(table.Get(t.Context(), "revoked", "18"))(t); value != nil {
		t.Errorf("a value that isn't there is %q", value)
	}
}
