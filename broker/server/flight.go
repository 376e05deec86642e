package server

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// A flight is the requests of one kind that are in memory, by their bytes. One
// owner has a share of them; beyond it there is an error. For what others have, a
// request waits; what is still being read after patience is then given up, so
// that who sends slowly holds up nobody.
type flight struct {
	all      *semaphore.Weighted
	share    int           // bytes of one owner
	requests int           // and how many, at a time
	patience time.Duration // 0: nothing is given up

	mu      sync.Mutex
	of      map[string]taken   // guarded by mu; by owner
	reading map[*held]struct{} // guarded by mu
}

// A held is one request.
type held struct {
	owner string
	size  int
	stop  func() // ends its reading
	began time.Time
}

type taken struct{ bytes, requests int }

func newFlight(most, share, requests int, patience time.Duration) *flight {
	return &flight{all: semaphore.NewWeighted(int64(most)), share: share, requests: requests, patience: patience,
		of: map[string]taken{}, reading: map[*held]struct{}{}}
}

var (
	errShare = errors.New("this host sends too much at the same time; try again")
	errBusy  = errors.New("too much is sent at the same time; try again")
)

// enter waits for h's place. Afterwards it is being read.
func (f *flight) enter(ctx context.Context, h *held) error {
	if !f.count(h, 1) {
		return errShare
	}
	if !f.all.TryAcquire(int64(h.size)) {
		f.hurry()
		again := time.AfterFunc(f.patience, f.hurry)
		defer again.Stop()
		bounded, cancel := context.WithTimeout(ctx, waitTime)
		defer cancel()
		if f.all.Acquire(bounded, int64(h.size)) != nil {
			f.count(h, -1)
			return errBusy
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	h.began = time.Now()
	f.reading[h] = struct{}{}
	return nil
}

// hurry gives up what others have waited for.
func (f *flight) hurry() {
	if f.patience == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for h := range maps.Keys(f.reading) {
		if time.Since(h.began) >= f.patience {
			delete(f.reading, h)
			h.stop()
		}
	}
}

// read says that h was read, or won't be.
func (f *flight) read(h *held) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.reading, h)
}

// leave frees h's place.
func (f *flight) leave(h *held) {
	f.read(h)
	f.all.Release(int64(h.size))
	f.count(h, -1)
}

// count adds h to what its owner has, unless that is then more than its share;
// or, by -1, takes it away.
func (f *flight) count(h *held, by int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.of[h.owner]
	t.bytes, t.requests = t.bytes+by*h.size, t.requests+by
	switch {
	case by > 0 && (t.bytes > f.share || t.requests > f.requests):
		return false
	case t.requests == 0:
		delete(f.of, h.owner)
	default:
		f.of[h.owner] = t
	}
	return true
}
