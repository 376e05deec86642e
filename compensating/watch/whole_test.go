package watch

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A state that was written before it had parts is taken up: how far logs were read,
// what of them waits, what was found and told. The next save writes parts.
func TestRestoresAStateWithoutParts(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "postgresql.log")
	write(t, log, []byte("read before\n"), os.O_TRUNC)
	c := &Config{StateDir: filepath.Join(dir, "state"), Governed: []string{"svc-*"}, Sensors: []Sensor{{Kind: "postgres-stderr", Name: "db", Path: log}}}
	if err := os.Mkdir(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	sighting := fmt.Sprintf(`{"time":%q,"kind":"login","account":"svc-x","source":"db"}`, noon.Format(time.RFC3339))
	text := fmt.Sprintf(`{"audit":7,"epoch":2,"sensors":{"db":{"places":[],"reader":{}}},"judge":{"used":{"h":["s"]}},"held":[{"sighting":%s,"since":%q}],
		"findings":[{"key":{"detector":"silent-sensor","cause":"lost db"},"finding":{"detector":"silent-sensor","count":1,"first":%[2]q,"last":%[2]q},"told":1}]}`,
		sighting, noon.Format(time.RFC3339))
	write(t, filepath.Join(c.StateDir, "state.json"), []byte(strings.ReplaceAll(text, "\n\t\t", "")), os.O_TRUNC)
	now := noon
	for round := range 2 { // the second from the parts that the first wrote
		w, err := Open(c, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
		if err != nil {
			t.Fatal(err)
		}
		if w.kept.Audit != 7 || w.kept.Epoch != 2 || !w.judge.Uses("h", "s") || len(w.kept.Findings) != 1+round {
			t.Fatalf("round %d: %+v", round, w.kept)
		}
		now = now.Add(time.Minute)
		w.synced = now
		if err := w.settleNow(); err != nil {
			t.Fatal(err)
		}
		if len(w.book) != 2 {
			t.Errorf("round %d: %d findings, want the old one and the login that waited", round, len(w.book))
		}
		if err := w.save(); err != nil {
			t.Fatal(err)
		}
		w.Close()
	}
}
