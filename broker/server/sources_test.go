package server

import (
	"io"
	"net"
	"testing"
	"time"

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

// A source that has its share is turned away until it gives a connection back.
func TestFairListener(t *testing.T) {
	inner := check.Must(net.Listen("tcp", "127.0.0.1:0"))(t)
	l := newFairListener(inner, 2)
	t.Cleanup(func() { _ = l.Close() })
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c := check.Must(net.Dial("tcp", inner.Addr().String()))(t)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	<-accepted
	third := dial()
	_ = third.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := third.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the third connection reads %v, want EOF", err)
	}
	check.Nil(t, first.Close())
	_ = first.Close() // twice gives nothing twice
	dial()
	<-accepted
	if n := l.open.has["127.0.0.1"]; n != 2 {
		t.Errorf("%d counted as open, want 2", n)
	}
}
