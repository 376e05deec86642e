// Package measured remembers what was proven of hosts' logs, so that a host
// sends only news. It is a cache and never the truth: what it forgets, a host
// sends again whole, and after a restart all do.
package measured

import (
	"container/list"
	"sync"

	"github.com/countersign/countersign/broker/internal/appraise"
)

// MostFiles bounds the measurements of all hosts together; one costs some 60
// bytes, since hosts share their names and digests.
const MostFiles = 8 << 20

// A Cache is safe for concurrent use.
type Cache struct {
	mu    sync.Mutex
	hosts map[string]*list.Element // guarded by mu
	order *list.List               // of entries, the last used first
	files int                      // of all
	most  int
}

type entry struct {
	host  string
	known *appraise.Known
}

// size is what an entry counts: its files, and as much again as an event log's
// facts cost.
func (e entry) size() int { return e.known.Files() + 200 }

// New makes an empty cache of at most so many files.
func New(most int) *Cache {
	return &Cache{hosts: map[string]*list.Element{}, order: list.New(), most: most}
}

// Get is what is known of a host; nil: nothing.
func (c *Cache) Get(host string) *appraise.Known {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.hosts[host]
	if !ok {
		return nil
	}
	c.order.MoveToFront(at)
	return at.Value.(entry).known
}

// Put remembers what a host's newest evidence proved.
func (c *Cache) Put(host string, known *appraise.Known) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(host)
	e := entry{host, known}
	c.hosts[host] = c.order.PushFront(e)
	c.files += e.size()
	for c.files > c.most && c.order.Len() > 1 {
		c.drop(c.order.Back().Value.(entry).host)
	}
}

// Forget has a host send everything again.
func (c *Cache) Forget(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(host)
}

func (c *Cache) drop(host string) {
	at, ok := c.hosts[host]
	if !ok {
		return
	}
	c.files -= at.Value.(entry).size()
	c.order.Remove(at)
	delete(c.hosts, host)
}
