package store

import (
	"database/sql"
	"errors"
	"sync"
)

// Generation is how often a topic was changed as a whole, by an Update of Any row of it,
// as the transaction sees it.
func Generation(t *Tx, of Topic) (n int64, err error) {
	err = t.QueryRow(`SELECT n FROM generations WHERE topic = ?`, string(of)).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return n, err
}

// advance counts the topics of which any row may be changed.
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

// A Cache keeps what Read made of a topic until the topic's generation changes: whoever
// changed it, in which process. The zero value with its fields set is ready; it is safe
// for concurrent use.
type Cache[T any] struct {
	Topic Topic
	Read  func(*Tx) (T, error)

	mu         sync.Mutex
	filled     bool  // guarded by mu
	generation int64 // guarded by mu
	value      T     // guarded by mu
}

// In is the value as the transaction sees it. An Update uses what is kept and keeps
// nothing: it may be undone.
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

// Changes returns a channel that receives after commits that changed something of the
// topic, be it single rows or any: at least once after the last of them. It is for loops
// of this process that live as long as the store, and that look for themselves now and
// then: what another process changes it doesn't tell.
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

// tell wakes who waits for changes of what rows name.
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
