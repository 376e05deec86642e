package server

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"
)

const (
	handshakeTime = 10 * time.Second
	// handshakeBytes bounds what a peer sends before it is known who it is. A
	// host's flight has 2 to 4 KiB.
	handshakeBytes = 32 << 10
	maxHandshakes  = 1024
	handshakeShare = 512 // of one source; hosts behind one address begin at the same time
)

// A gate accepts connections, finishes their handshakes, and hands each to the
// HTTP server of its class. Until it is known who a peer is, it takes little and
// its time is short; afterwards it takes from its class alone.
type gate struct {
	door       *Door
	config     *tls.Config
	handshakes *crowd
	ways       map[class]*way
}

// A way is what one class of connections goes through.
type way struct {
	crowd *crowd
	*handoff
}

func newGate(door *Door, at net.Addr) *gate {
	g := &gate{door: door, config: door.TLS(), handshakes: newCrowd(maxHandshakes, handshakeShare), ways: map[class]*way{}}
	for of, b := range classes {
		if of == local {
			continue // it comes by the socket
		}
		g.ways[of] = &way{crowd: newCrowd(b.connections, b.share), handoff: newHandoff(at)}
	}
	return g
}

// run accepts until l is closed.
func (g *gate) run(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		var again interface{ Temporary() bool }
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case errors.As(err, &again) && again.Temporary(): // as when descriptors ran out
			time.Sleep(10 * time.Millisecond)
			continue
		case err != nil:
			return err
		}
		guarded := &guardedConn{Conn: c, shaking: true, left: handshakeBytes}
		from := sourceOf(c)
		guarded.enter(g.handshakes, from)
		go g.admit(ctx, guarded, from)
	}
}

// admit finds out who is at the other end, and passes the connection on.
func (g *gate) admit(ctx context.Context, c *guardedConn, from string) {
	bounded, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	secured := tls.Server(c, g.config)
	if secured.HandshakeContext(bounded) != nil {
		_ = c.Close()
		return
	}
	peer, err := g.door.identify(bounded, secured.ConnectionState(), c.RemoteAddr().String())
	if err != nil {
		_ = c.Close()
		return
	}

	c.peer, c.shaking = peer, false
	owner := from
	if peer.class != stranger {
		owner = peer.challenge.Key().String()
	}
	way := g.ways[peer.class]
	c.enter(way.crowd, owner)
	if peer.class == stranger {
		c.endAfter(strangerTime)
	}
	way.pass(secured)
}

// A guardedConn is counted in one crowd at a time, until it is closed.
type guardedConn struct {
	net.Conn
	peer *conn // once the handshake is over

	// Until then alone, and of the goroutine that does it:
	shaking bool
	left    int // bytes that may be read

	mu     sync.Mutex
	closed bool   // guarded by mu
	leave  func() // guarded by mu
	end    *time.Timer
}

// enter counts the connection in c and no longer where it was counted before.
func (g *guardedConn) enter(c *crowd, owner string) {
	leave := c.enter(owner, func() { _ = g.Close() })
	g.mu.Lock()
	before := g.leave
	g.leave = leave
	closed := g.closed
	g.mu.Unlock()
	if before != nil {
		before()
	}
	if closed {
		leave()
	}
}

func (g *guardedConn) endAfter(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.end = time.AfterFunc(d, func() { _ = g.Close() })
	}
}

// Read fails after handshakeBytes while the handshake is not over.
func (g *guardedConn) Read(p []byte) (int, error) {
	if g.shaking {
		if g.left <= 0 {
			return 0, errHandshake
		}
		p = p[:min(len(p), g.left)]
	}
	n, err := g.Conn.Read(p)
	if g.shaking {
		g.left -= n
	}
	return n, err
}

// Close leaves the crowd.
func (g *guardedConn) Close() error {
	g.mu.Lock()
	g.closed = true
	leave, end := g.leave, g.end
	g.mu.Unlock()
	if end != nil {
		end.Stop()
	}
	if leave != nil {
		leave()
	}
	return g.Conn.Close()
}

var errHandshake = errors.New("the handshake is longer than any that is accepted")

// A handoff is the listener of one class's server.
type handoff struct {
	at    net.Addr
	conns chan net.Conn
	done  chan struct{}
	close func()
}

func newHandoff(at net.Addr) *handoff {
	h := &handoff{at: at, conns: make(chan net.Conn), done: make(chan struct{})}
	h.close = sync.OnceFunc(func() { close(h.done) })
	return h
}

func (h *handoff) pass(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		_ = c.Close()
	}
}

// Accept waits for a connection.
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handoff) Close() error { h.close(); return nil }

// Addr is the address that the gate listens on.
func (h *handoff) Addr() net.Addr { return h.at }
