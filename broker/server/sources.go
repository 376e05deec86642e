package server

import (
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

// shares count what each source has at the moment, and let none have more than
// most.
type shares struct {
	most int

	mu  sync.Mutex
	has map[string]int // guarded by mu; by source
}

func newShares(most int) *shares { return &shares{most: most, has: map[string]int{}} }

func (s *shares) enter(from string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.has[from] >= s.most {
		return false
	}
	s.has[from]++
	return true
}

func (s *shares) leave(from string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.has[from]--; s.has[from] == 0 {
		delete(s.has, from)
	}
}

// A fairListener closes connections of a source that has its share of them.
type fairListener struct {
	net.Listener
	open *shares
}

func newFairListener(l net.Listener, share int) *fairListener {
	return &fairListener{Listener: l, open: newShares(share)}
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		from := source(host)
		if l.open.enter(from) {
			return &fairConn{Conn: c, leave: sync.OnceFunc(func() { l.open.leave(from) })}, nil
		}
		_ = c.Close()
	}
}

type fairConn struct {
	net.Conn
	leave func()
}

func (c *fairConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
