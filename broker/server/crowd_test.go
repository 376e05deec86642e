package server

import (
	"errors"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/countersign/countersign/test/check"
)

func TestSource(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "192.0.2.1", true},
		{"2001:db8::1", "2001:db8::ffff:2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
		{"::ffff:192.0.2.1", "::ffff:192.0.2.2", false},
	} {
		if (source(tt.a) == source(tt.b)) != tt.same {
			t.Errorf("%s and %s: one source is %v, want %v", tt.a, tt.b, !tt.same, tt.same)
		}
	}
}

// There is room for one more, always: the oldest of who has most makes it.
func TestCrowd(t *testing.T) {
	c := newCrowd(4, 3)
	var closed []string
	enter := func(owner, name string) func() {
		return c.enter(owner, func() { closed = append(closed, name) })
	}
	want := func(names ...string) {
		t.Helper()
		if !slices.Equal(closed, names) {
			t.Errorf("closed: %v, want %v", closed, names)
		}
		closed = nil
	}
	enter("a", "a1")
	leave := enter("a", "a2")
	enter("a", "a3")
	want()
	enter("a", "a4") // beyond a's share
	want("a1")
	enter("b", "b1")
	want()
	enter("b", "b2") // beyond all: a has most
	want("a2")
	leave() // it left before
	leave()
	if c.open != 4 {
		t.Errorf("%d open, want 4", c.open)
	}
	enter("c", "c1")()
}

// A connection is counted where it is, and nowhere once it is closed, whoever
// closes it.
func TestGuardedConn(t *testing.T) {
	first, second := newCrowd(10, 1), newCrowd(10, 1)
	conn := func() *guardedConn {
		a, b := net.Pipe()
		t.Cleanup(func() { _, _ = a.Close(), b.Close() })
		return &guardedConn{Conn: a}
	}
	one, two := conn(), conn()
	one.enter(first, "a")
	one.enter(second, "a")
	if first.open != 0 || second.open != 1 {
		t.Errorf("open: %d and %d", first.open, second.open)
	}
	two.enter(first, "a")
	two.enter(second, "a")
	if _, err := one.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the one that made room reads %v", err)
	}
	check.Nil(t, two.Close())
	two.enter(first, "a") // it was closed meanwhile
	if first.open != 0 || second.open != 0 {
		t.Errorf("at the end open: %d and %d", first.open, second.open)
	}
}

// Before it is known who a peer is, little of it is read.
func TestHandshakeIsShort(t *testing.T) {
	here, there := net.Pipe()
	t.Cleanup(func() { _, _ = here.Close(), there.Close() })
	g := &guardedConn{Conn: here, shaking: true, left: handshakeBytes}
	go func() { _, _ = there.Write(make([]byte, 2*handshakeBytes)) }()
	n, err := io.Copy(io.Discard, g)
	if n != handshakeBytes || !errors.Is(err, errHandshake) {
		t.Errorf("%d bytes, %v", n, err)
	}
}
