// Package budget bounds how much of the store one host may fill in an hour: by
// bytes and by records that are kept for good. It counts what is written on a
// host's account, and says when that is too much; whoever serves the host then
// refuses what isn't needed to renew what it holds.
//
// It is in memory: a broker that starts again has forgotten what hosts wrote before.
package budget

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// What a host may have written in an hour. One with a hundred credentials that are
// replaced every 20 minutes writes 2,000 records.
const (
	Records = 10000
	Bytes   = 16 << 20
	Window  = time.Hour
)

// A Book has the accounts of all hosts that wrote something of late. The zero
// value is empty. Callers pass the time.
type Book struct {
	mu    sync.Mutex
	hosts map[string]*account // guarded by mu
	swept time.Time           // guarded by mu
}

type account struct {
	since          time.Time
	records, bytes int
}

func (a *account) over() bool { return a.records >= Records || a.bytes >= Bytes }

// Of returns the store's book, as a transaction reaches it.
func Of(tx *store.Tx) *Book { return store.Beside[Book](tx) }

// Spend enters what was written for a host. What a transaction writes that fails
// afterwards counts too.
func (b *Book) Spend(host string, records, bytes int, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(now)
	a := b.current(host, now)
	if a == nil {
		a = &account{since: now}
		b.hosts[host] = a
	}
	a.records, a.bytes = a.records+records, a.bytes+bytes
}

// Over reports whether the host has used up its hour, and when that ends.
func (b *Book) Over(host string, now time.Time) (until time.Time, over bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.current(host, now)
	if a == nil || !a.over() {
		return time.Time{}, false
	}
	return a.since.Add(Window), true
}

// An Excess is a host that has used up its hour.
type Excess struct {
	Host           string
	Records, Bytes int
	Until          time.Time
}

// Exceeded lists the hosts that have, those with most bytes first.
func (b *Book) Exceeded(now time.Time) (list []Excess) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for host := range b.hosts {
		if a := b.current(host, now); a != nil && a.over() {
			list = append(list, Excess{host, a.records, a.bytes, a.since.Add(Window)})
		}
	}
	slices.SortFunc(list, func(x, y Excess) int { return cmp.Or(y.Bytes-x.Bytes, cmp.Compare(x.Host, y.Host)) })
	return list
}

// current returns the host's account of this hour, nil if there is none. A clock
// that was set back begins a new hour. b.mu is held.
func (b *Book) current(host string, now time.Time) *account {
	a := b.hosts[host]
	if a == nil || now.Sub(a.since) >= Window || now.Before(a.since) {
		return nil
	}
	return a
}

// sweep forgets accounts of hours that are over, once in an hour. b.mu is held.
func (b *Book) sweep(now time.Time) {
	if b.hosts == nil {
		b.hosts = map[string]*account{}
	}
	if now.Sub(b.swept).Abs() < Window {
		return
	}
	b.swept = now
	for host := range b.hosts {
		if b.current(host, now) == nil {
			delete(b.hosts, host)
		}
	}
}
