// Package space watches how much room the store's disk has left. A store that can
// write nothing any more ends the broker; so before that it warns, and then has the
// broker issue nothing new, while it renews and revokes.
package space

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// A Level is what the room that is left allows.
type Level string

const (
	Enough Level = "enough"
	Low    Level = "low"  // an operator should make room
	Full   Level = "full" // what is left is for renewing and revoking
)

// The watermarks: parts of the disk, or less on a large one.
const (
	lowPart, lowBytes   = 5, 2 << 30    // a fifth, or 2 GiB
	fullPart, fullBytes = 10, 512 << 20 // a tenth, or 512 MiB
)

// every is how often is looked.
const every = 2 * time.Second

// A Gauge watches one folder's disk.
type Gauge struct {
	Dir string
	Log *slog.Logger
	// Measure is the disk's; nil: of the machine.
	Measure func(dir string) (free, size uint64, err error)

	mu         sync.Mutex
	level      Level  // guarded by mu
	free, size uint64 // guarded by mu
	failed     error  // guarded by mu
}

// ErrFull says that the disk has no room for anything new.
var ErrFull = errors.New("the broker's disk is almost full: it renews and revokes, and issues nothing new")

// Run looks until ctx ends.
func (g *Gauge) Run(ctx context.Context) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		g.Look()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Look measures once.
func (g *Gauge) Look() {
	measure := g.Measure
	if measure == nil {
		measure = disk
	}
	free, size, err := measure(g.Dir)

	g.mu.Lock()
	defer g.mu.Unlock()
	before := g.level
	if g.failed = err; err != nil {
		return // a store that can't be written fails by itself
	}
	g.free, g.size, g.level = free, size, levelOf(free, size)
	if g.level != before && (before != "" || g.level != Enough) {
		g.Log.Warn("the room on the broker's disk", "dir", g.Dir, "is", string(g.level), "free_bytes", free, "size_bytes", size)
	}
}

func levelOf(free, size uint64) Level {
	switch {
	case free < min(size/fullPart, fullBytes):
		return Full
	case free < min(size/lowPart, lowBytes):
		return Low
	}
	return Enough
}

// New fails with ErrFull where nothing new may be written.
func (g *Gauge) New() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.level == Full {
		return ErrFull
	}
	return nil
}

// Now returns the level and what was measured.
func (g *Gauge) Now() (level Level, free, size uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.level, g.free, g.size
}

// Alarms are what waits for an operator.
func (g *Gauge) Alarms() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	const mib = 1 << 20
	left := fmt.Sprintf("%d of %d MiB are free on the disk of %s", g.free/mib, g.size/mib, g.Dir)
	switch {
	case g.failed != nil:
		return []string{fmt.Sprintf("how much room the disk of %s has can't be measured: %v", g.Dir, g.failed)}
	case g.level == Low:
		return []string{left + ": below " + mark(g.size/fullPart, fullBytes) + " the broker issues nothing new"}
	case g.level == Full:
		return []string{left + ": the broker renews and revokes, and issues nothing new until there is more"}
	}
	return nil
}

func mark(part, most uint64) string { return fmt.Sprintf("%d MiB", min(part, most)>>20) }
