package supervisor

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/internal/clock"
	"github.com/countersign/countersign/internal/durable"
)

// Clock is the time that leases run by. It is the wall clock as it was when the
// agent first started in this boot, and goes on from there over restarts of
// the agent: the run folder is in memory, and so is of this boot.
func Clock(runDir string, wall time.Time) (func() time.Time, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(runDir, 0o700); err != nil { // it may have been there
		return nil, err
	}
	path := filepath.Join(runDir, "clock")
	var booted time.Time
	b, err := durable.Read(path)
	if err == nil {
		err = json.Unmarshal(b, &booted)
	}
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		booted = wall.Add(-clock.SinceBoot())
		if b, err = json.Marshal(booted); err != nil {
			return nil, err
		}
		if err := durable.Write(path, b); err != nil {
			return nil, err
		}
	}
	return clock.Steady(booted.Add(clock.SinceBoot())), nil
}
