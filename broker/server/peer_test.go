package server

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/test/check"
)

// A stranger's connection is closed in time, and one that ended by itself is not
// kept until then.
func TestStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := func() *guardedConn {
			a, b := net.Pipe()
			t.Cleanup(func() { _, _ = a.Close(), b.Close() })
			return &guardedConn{Conn: a}
		}
		stays, ends := conn(), conn()
		stays.endAfter(strangerTime)
		ends.endAfter(strangerTime)
		check.Nil(t, ends.Close())
		if ends.end.Stop() {
			t.Error("a connection that ended is kept by its timer")
		}
		closed := func() bool {
			synctest.Wait()
			stays.mu.Lock()
			defer stays.mu.Unlock()
			return stays.closed
		}
		time.Sleep(strangerTime - time.Second)
		if closed() {
			t.Error("a stranger has no time to join")
		}
		time.Sleep(2 * time.Second)
		if !closed() {
			t.Error("a stranger stays")
		}
	})
}
