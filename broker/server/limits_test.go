package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/broker/internal/front/challenge"
)

// Only hosts that are known on their connection, and operators, send much, only
// where much is taken, and few at the same time.
func TestBound(t *testing.T) {
	peer := func(kind peerKind, key string) *conn {
		return &conn{kind: kind, challenge: &challenge.Conn{KeySPKI: []byte(key)}}
	}
	host := func(key string) *conn {
		c := peer(hostPeer, key)
		c.known.Store(true)
		return c
	}
	known, stranger := host("known"), peer(hostPeer, "stranger")
	var inside func(*http.Request)
	handler := bound(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { inside(r) }))
	read := func(c *conn, path string, size int, meanwhile func()) error {
		var err error
		inside = func(r *http.Request) {
			if _, err = io.ReadAll(r.Body); meanwhile != nil {
				meanwhile()
			}
		}
		handler.ServeHTTP(httptest.NewRecorder(),
			httptest.NewRequest(http.MethodPost, path, bytes.NewReader(make([]byte, size))).WithContext(context.WithValue(t.Context(), connKey{}, c)))
		return err
	}
	const prove, join = countersignv1connect.HostServiceProveProcedure, countersignv1connect.HostServiceJoinProcedure
	for name, tt := range map[string]struct {
		c    *conn
		path string
		size int
		ok   bool
	}{
		"a known host's logs":       {known, prove, 20 << 20, true},
		"too long a log":            {known, prove, maxEvidence + 1, false},
		"a stranger's logs":         {stranger, prove, 2 << 20, false},
		"a stranger's short one":    {stranger, prove, maxBody, true},
		"a joining one's":           {peer(joiningPeer, "joining"), prove, 2 << 20, false},
		"a known host's long join":  {known, join, 2 << 20, false},
		"an operator's release":     {peer(operatorPeer, "operator"), countersignv1connect.OperatorServiceAddReleaseProcedure, 20 << 20, true},
		"an operator's long scopes": {peer(operatorPeer, "operator"), countersignv1connect.OperatorServiceApplyScopesProcedure, 2 << 20, false},
	} {
		if err := read(tt.c, tt.path, tt.size, nil); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	// While as many are being read as may be, one more hears that, and a short
	// one is served.
	var full func(depth int) error
	full = func(depth int) (inner error) {
		own := fmt.Sprint("host", depth)
		err := read(host(own), prove, 2<<20, func() {
			if again := read(host(own), prove, 2<<20, nil); again != errBusy {
				t.Errorf("the %d. on another connection: %v", depth, again)
			}
			if depth < largeAtOnce {
				inner = full(depth + 1)
				return
			}
			inner = read(known, prove, 2<<20, nil)
			if err := read(known, prove, 1000, nil); err != nil {
				t.Errorf("a short one: %v", err)
			}
		})
		if err != nil {
			t.Errorf("the %d.: %v", depth, err)
		}
		return inner
	}
	if err := full(1); err != errBusy {
		t.Errorf("one more than may be: %v", err)
	}
	if err := read(known, prove, 2<<20, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
