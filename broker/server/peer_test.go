package server

import (
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type closable struct {
	net.Conn
	closed atomic.Bool
}

func (c *closable) Close() error { c.closed.Store(true); return nil }

// A connection that the broker doesn't recognise is closed in time, and one that
// ended by itself is not kept until then.
func TestStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Door{}
		stranger, known, ended := &closable{}, &closable{}, &closable{}
		for _, c := range []*closable{stranger, known, ended} {
			state := connOf(d.ConnContext(t.Context(), c))
			state.known.Store(c == known)
		}
		d.ConnState(stranger, http.StateActive)
		d.ConnState(ended, http.StateClosed)
		if _, kept := d.strangers.Load(ended); kept {
			t.Error("a connection that ended is kept")
		}
		time.Sleep(strangerTime + time.Second)
		if !stranger.closed.Load() || known.closed.Load() || ended.closed.Load() {
			t.Errorf("closed: the stranger %v, the known one %v, the ended one %v", stranger.closed.Load(), known.closed.Load(), ended.closed.Load())
		}
	})
}
