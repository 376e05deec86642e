package watch

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// TestCompact: a ledger of which most was replaced is written anew, has what is needed,
// and what comes afterwards is found, also by the next run.
func TestCompact(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), noon
	open := func() *Watch {
		t.Helper()
		w, err := Open(&Config{StateDir: dir}, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := open()
	entry := func(i int) ledger.Entry {
		issued := noon.Add(time.Duration(i-999) * 24 * time.Hour)
		return ledger.Entry{ID: fmt.Sprint("L", i), Scope: fmt.Sprint("s", i%10), Host: "h", Sources: []string{"10.0.0.1"}, Issued: issued, Expires: issued.Add(time.Hour),
			Names: ledger.Names{DBUsername: fmt.Sprintf("v-token-co-billing--%020d-%d", i, noon.Unix()), VaultLease: fmt.Sprint("database/creds/billing-ro/", i)}}
	}
	give := func(entries ...ledger.Entry) {
		t.Helper()
		if err := w.apply(update{entries: entries}); err != nil {
			t.Fatal(err)
		}
	}
	old := entry(0)
	old.Scope = "seldom" // the newest of its program, however old
	give(old)
	for i := 1; i < 1000; i++ {
		give(slices.Repeat([]ledger.Entry{entry(i)}, 4)...)
	}
	if err := w.compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		if n := w.index.Len(); n < 85 || n > 95 || w.size != w.index.Size() {
			t.Errorf("%s: %d entries in %d bytes, %d of them alive", when, n, w.size, w.index.Size())
		}
		for id, want := range map[string]int{"L0": 1, "L1": 0, "L905": 0, "L915": 1, "L999": 1} {
			if found, err := w.index.Find(ledger.ByID, id); err != nil || len(found) != want {
				t.Errorf("%s: %s is there %d times, %v", when, id, len(found), err)
			}
		}
		found, err := w.judge.See(sightings.Sighting{Time: now, Kind: sightings.Login, Account: entry(999).Names.DBUsername, From: netip.MustParseAddr("10.0.0.9")})
		if err != nil || len(found) != 1 {
			t.Errorf("%s: a theft is %v, %v", when, found, err)
		}
	}
	check("written anew")
	give(entry(1000))
	if err := w.save(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	w = open()
	check("opened again")
	w.Close()
	if left, err := filepath.Glob(filepath.Join(dir, "*.new")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	// A disk that takes no second one: the ledger serves as it is.
	w = open()
	defer w.Close()
	give(slices.Repeat([]ledger.Entry{entry(1000)}, 8000)...)
	w.config.StateDir = filepath.Join(dir, "absent")
	before := w.size
	if err := w.compact(t.Context()); err != nil || w.size != before {
		t.Errorf("%v, %d bytes of %d", err, w.size, before)
	}
}
