package server

import (
	"container/list"
	"net"
	"net/netip"
	"sync"
)

// source is what one peer can't easily have many of: an IPv4 address, or an
// IPv6 network of 64 bits, whose addresses are all its own.
func source(address string) string {
	ip, err := netip.ParseAddr(address)
	if err != nil || ip.Unmap().Is4() {
		return address
	}
	return netip.PrefixFrom(ip.WithZone(""), 64).Masked().String()
}

// sourceOf is the source of a connection's other end.
func sourceOf(c net.Conn) string {
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	return source(host)
}

// A crowd bounds what is open at a time, by owner. There is always room for one
// more: the oldest of the owner that has its share, or that has most, is closed.
// So who holds many only holds up itself, and a peer that came back after its
// line was cut is not kept out by its own dead connections.
type crowd struct {
	most, share int // of all, and of one owner

	mu     sync.Mutex
	open   int                   // guarded by mu
	owners map[string]*list.List // guarded by mu; of func(), the oldest first
}

func newCrowd(most, share int) *crowd {
	return &crowd{most: most, share: share, owners: map[string]*list.List{}}
}

// enter counts one more of the owner, which end closes. leave may be called
// more than once.
func (c *crowd) enter(owner string, end func()) (leave func()) {
	c.mu.Lock()
	var evicted func()
	switch has := c.owners[owner]; {
	case has != nil && has.Len() >= c.share:
		evicted = c.remove(owner, has.Front())
	case c.open >= c.most:
		loser := c.largest()
		evicted = c.remove(loser, c.owners[loser].Front())
	}
	if c.owners[owner] == nil {
		c.owners[owner] = list.New()
	}
	mine := c.owners[owner].PushBack(end)
	c.open++
	c.mu.Unlock()

	if evicted != nil {
		evicted()
	}
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.remove(owner, mine)
	})
}

// remove takes one out, unless it was taken out before. c.mu is held.
func (c *crowd) remove(owner string, one *list.Element) (end func()) {
	has := c.owners[owner]
	if has == nil {
		return nil
	}
	before := has.Len()
	end, _ = has.Remove(one).(func())
	c.open -= before - has.Len()
	if has.Len() == 0 {
		delete(c.owners, owner)
	}
	return end
}

// largest returns the owner that has most. c.mu is held.
func (c *crowd) largest() (owner string) {
	most := 0
	for o, has := range c.owners {
		if has.Len() > most {
			owner, most = o, has.Len()
		}
	}
	return owner
}

// A crowdListener bounds the connections that it accepts, by their source.
type crowdListener struct {
	net.Listener
	crowd *crowd
}

func (l *crowdListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &guardedConn{Conn: c}
	g.enter(l.crowd, sourceOf(c))
	return g, nil
}
