package watch

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/internal/durable"
)

const (
	// keepEnded is how long an entry stays in the ledger after its credential's end: a
	// use of it later is one of an account that nobody issued.
	keepEnded = 90 * 24 * time.Hour
	// compactFrom is the size of a ledger below which nothing is gained.
	compactFrom = 1 << 20
	// compactEvery is seldom: nothing is read meanwhile, for seconds with 100,000 entries.
	compactEvery = 24 * time.Hour
)

// compact writes the ledger anew once most of it was replaced by later lines: each
// entry once, and without those that ended long ago. Of each program the newest stays,
// for what is unlike it. A ledger that can't be written anew serves as it is.
func (w *Watch) compact(ctx context.Context) error {
	if w.size < compactFrom || w.size < 2*w.index.Size() {
		return nil
	}
	before, entries := w.size, w.index.Len()
	name, err := w.rewrite(ctx)
	if ctx.Err() != nil {
		return nil // another time
	}
	if err != nil {
		w.log.Warn("the ledger can't be written anew, and grows", "err", err)
		return nil
	}
	// From here on the old one has no name: what fails, fails the watch, which begins
	// with the new one.
	kept := w.judge.Save()
	w.index, w.judge = nil, nil // there is no memory for two
	if err := errors.Join(os.Rename(name, w.ledgerFile()), durable.SyncDir(w.config.StateDir), w.file.Close()); err != nil {
		return err
	}
	if err := w.load(kept); err != nil {
		return err
	}
	w.log.Info("the ledger was written anew", "bytes", w.size, "before", before, "entries", w.index.Len(), "entries_before", entries)
	return nil
}

// rewrite makes the new file, and gives its name.
func (w *Watch) rewrite(ctx context.Context) (name string, err error) {
	newest := map[string]bool{}
	if err := w.index.Programs(func(list []ledger.Entry) error {
		newest[list[len(list)-1].ID] = true
		return nil
	}); err != nil {
		return "", err
	}
	name = w.ledgerFile() + ".new"
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	out := bufio.NewWriterSize(f, 1<<20)
	err = w.index.Each(func(e ledger.Entry) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if end := e.End(); !newest[e.ID] && !end.IsZero() && w.now().Sub(end) > keepEnded {
			return nil
		}
		return json.NewEncoder(out).Encode(e)
	})
	if err := errors.Join(err, out.Flush(), f.Sync(), f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(name))
	}
	return name, nil
}

func (w *Watch) ledgerFile() string { return filepath.Join(w.config.StateDir, "ledger.jsonl") }
