package enroll

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// A host that waits for an operator, and comes with another key each time, leaves few
// records in an hour, and takes no other's place.
func TestAWaitingHostWithManyKeys(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { check.Nil(t, s.Close()) })
	now := noon
	d := &Desk{Store: s, MostPending: 10, Now: func() time.Time { return now }, Wall: func() time.Time { return now }}
	ak := softAK(t)
	join := func(ek string, key string) error {
		j := &joining{Desk: d, Joining: &challenge.Joining{EKs: []challenge.Endorsement{{EK: &tpmappraise.EK{Hash: evidence.Sum([]byte(ek))}}}, AK: ak, Name: "itself"},
			conn: &challenge.Conn{KeySPKI: []byte(key), Address: "10.0.0.9"}, quoted: &tpmappraise.Verified{}, now: now, wall: now, requestID: "r"}
		return s.Update(t.Context(), store.Any(store.Hosts, store.Tokens), j.enrol)
	}
	records := func() (n int) {
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
			return audit.Read(tx, 0, 1000, func(int64, []byte) error { n++; return nil })
		}))
		return n
	}

	check.Nil(t, join("ek", "first"))
	for range 100 {
		check.Nil(t, join("ek", "first")) // the honest twin: an agent that asks again
	}
	if n := records(); n != 1 {
		t.Errorf("asking again left %d records", n)
	}
	var refused int
	for i := range 100 {
		err := join("ek", fmt.Sprint(i))
		if errors.Is(err, ErrOften) {
			refused++
		} else {
			check.Nil(t, err)
		}
	}
	if n := records(); refused < 70 || n > 30 {
		t.Errorf("%d of 100 other keys were refused; %d records", refused, n)
	}
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		if n := check.Must(inventory.CountPending(tx))(t); n != 1 {
			t.Errorf("%d hosts wait", n)
		}
		return nil
	}))
	now = now.Add(time.Hour)
	check.Nil(t, join("ek", "an hour later"))
}
