package store

import (
	"database/sql"
	"errors"
	"sync"
)

// Generation returns how many updates of Any row of the topic the transaction sees.
func Generation(t *Tx, of Topic) (n int64, err error) {
	err = t.QueryRow(`SELECT n FROM generations WHERE topic = ?`, string(of)).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return n, err
}

// advance increments the generations of topics that rows name as a whole.
func advance(t *Tx, rows Rows) error {
	for _, r := range rows {
		if r.id != "" {
			continue
		}
		if _, err := t.Exec(`INSERT INTO generations (topic, n) VALUES (?, 1) ON CONFLICT (topic) DO UPDATE SET n = generations.n + 1`, string(r.topic)); err != nil {
			return err
		}
	}
	return nil
}

// A Cache keeps the result of Read until the topic's generation changes, in whichever
// process. It is safe for concurrent use. Set Topic and Read before the first use.
type Cache[T any] struct {
	Topic Topic
	Read  func(*Tx) (T, error)

	mu         sync.Mutex
	filled     bool  // guarded by mu
	generation int64 // guarded by mu
	value      T     // guarded by mu
}

// In returns the value as the transaction sees it. In an Update, which may be rolled back,
// it doesn't cache what it reads.
func (c *Cache[T]) In(t *Tx) (T, error) {
	n, err := Generation(t, c.Topic)
	if err != nil {
		return *new(T), err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.filled && c.generation == n {
		return c.value, nil
	}
	value, err := c.Read(t)
	if err == nil && !t.writes {
		c.filled, c.generation, c.value = true, n, value
	}
	return value, err
}

// watchers wait for changes.
type watchers struct {
	mu sync.Mutex
	of map[Topic][]chan struct{} // guarded by mu
}

// Changes returns a channel that receives after a commit that changed rows of the topic. If
// several commits follow each other it may receive once, after the last. It doesn't report
// changes of other processes: the receiver has to look at the store now and then, too. The
// channel is never removed; use it in loops that run as long as the store.
func (s *Store) Changes(t Topic) <-chan struct{} {
	changed := make(chan struct{}, 1)
	s.watchers.mu.Lock()
	defer s.watchers.mu.Unlock()
	if s.watchers.of == nil {
		s.watchers.of = map[Topic][]chan struct{}{}
	}
	s.watchers.of[t] = append(s.watchers.of[t], changed)
	return changed
}

// tell wakes the receivers for the topics of rows.
func (w *watchers) tell(rows Rows) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range rows {
		for _, changed := range w.of[r.topic] {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}
