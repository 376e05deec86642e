// Package logcache remembers what was proven of hosts' logs, so that a host
// sends only news. It is a cache and never the truth: what it forgets, a host
// sends again whole, and after a restart all do. What it knows of a host holds for as many
// step-ups as the host's row has: after another, a host shows its logs from their first entry.
package logcache

import (
	"container/list"
	"sync"

	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// Most bounds what is remembered of all hosts together, in bytes: the lists of some
// hundred hosts with 5,000 measured files each.
const Most = 256 << 20

// A Cache is safe for concurrent use.
type Cache struct {
	mu    sync.Mutex
	hosts map[string]*list.Element // guarded by mu
	order *list.List               // of entries, the last used first
	size  int                      // of all, in bytes
	most  int
}

type entry struct {
	host    string
	stepUps int64
	known   *appraise.Known
}

// New makes an empty cache of at most so many bytes, or of one host.
func New(most int) *Cache {
	return &Cache{hosts: map[string]*list.Element{}, order: list.New(), most: most}
}

// Get is what is known of a host since its last step-up; nil: nothing.
func (c *Cache) Get(host string, stepUps int64) *appraise.Known {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.hosts[host]
	if !ok || at.Value.(entry).stepUps != stepUps {
		return nil
	}
	c.order.MoveToFront(at)
	return at.Value.(entry).known
}

// Put remembers what a host's newest evidence proved, that went on from prior.
// Where another is known by now, or was forgotten, it is not kept: what has to be
// sent whole is not made up for by a request that was under way.
func (c *Cache) Put(host string, stepUps int64, prior, known *appraise.Known) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var now *appraise.Known
	if at, ok := c.hosts[host]; ok {
		switch e := at.Value.(entry); {
		case e.stepUps > stepUps:
			return
		case e.stepUps == stepUps:
			now = e.known
		}
	}
	if now != prior {
		return
	}
	c.drop(host)
	e := entry{host, stepUps, known}
	c.hosts[host] = c.order.PushFront(e)
	c.size += known.Size()
	for c.size > c.most && c.order.Len() > 1 {
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
	c.size -= at.Value.(entry).known.Size()
	c.order.Remove(at)
	delete(c.hosts, host)
}
