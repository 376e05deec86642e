package server

import (
	"context"
	"net/http"
	"time"

	"github.com/countersign/countersign/attestors/ima"
)

// A class is how much of the broker a peer may take. It is known when the
// handshake is over, by the peer's key, and doesn't change.
type class int

const (
	stranger class = iota // who has neither an admitted host's key nor an operator's
	member                // an admitted host
	operator
	local // root, on the local socket
)

// maxLogs bounds a request with event log and IMA list.
const maxLogs = ima.MaxList + 4<<20

// maxLarge bounds a request with a reference set or a release.
const maxLarge = 32 << 20

// bounds are what one class may take.
type bounds struct {
	connections int // open at a time
	share       int // of them, of one owner: a stranger's source, another's key
	streams     int // requests of one connection at a time
	window      int // bytes of one connection that are taken before they are asked for
	body        int // bytes of a request
	large       int // bytes of one of the takesMuch
	inFlight    int // bytes of requests that are read or answered, of all: short ones, and as much again of others
	inFlightOf  int // and of one owner
	partBytes   int // of a request, for each of its parts beyond some
	bodyTime    time.Duration
	answerTime  time.Duration // from a request's first byte to its answer's last
	idleTime    time.Duration
}

var classes = map[class]bounds{
	stranger: {
		connections: 256, share: 64, streams: 2, window: 64 << 10,
		body: 64 << 10, large: 64 << 10, inFlight: 8 << 20, inFlightOf: 4 << 20,
		partBytes: partBytes, bodyTime: 10 * time.Second, answerTime: 30 * time.Second, idleTime: 30 * time.Second,
	},
	member: {
		connections: 20000, share: 16, streams: 32, window: 256 << 10,
		body: 1 << 20, large: maxLogs, inFlight: 8 << 20, inFlightOf: 1 << 20,
		partBytes: partBytes, bodyTime: 20 * time.Second, answerTime: 3 * time.Minute, idleTime: 2 * time.Hour,
	},
	operator: {
		connections: 256, share: 16, streams: 32, window: 256 << 10,
		body: 1 << 20, large: maxLarge, inFlight: 8 << 20, inFlightOf: 4 << 20,
		partBytes: operatorBytes, bodyTime: 20 * time.Second, answerTime: 3 * time.Minute, idleTime: 2 * time.Hour,
	},
	local: {
		streams: 250, window: 1 << 20,
		body: 1 << 20, large: maxLarge, inFlight: 64 << 20, inFlightOf: 64 << 20,
		partBytes: operatorBytes, bodyTime: 20 * time.Second, answerTime: 3 * time.Minute, idleTime: 2 * time.Hour,
	},
}

const (
	// maxFrame is HTTP/2's least: what a connection keeps to read into.
	maxFrame  = 16 << 10
	maxHeader = 8 << 10
	// maxTable bounds HPACK's memory of headers.
	maxTable = 4 << 10
	// writeTime is how long a peer may take nothing of what is sent to it.
	writeTime = 20 * time.Second
)

// server is one class's HTTP server.
func (b bounds) server(s *Server, h http.Handler) *http.Server {
	out := s.httpServer(h)
	out.ConnContext, out.WriteTimeout, out.IdleTimeout = connContext, b.answerTime, b.idleTime
	out.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams: b.streams, MaxReadFrameSize: maxFrame, MaxDecoderHeaderTableSize: maxTable, MaxEncoderHeaderTableSize: maxTable,
		MaxReceiveBufferPerConnection: b.window, MaxReceiveBufferPerStream: b.window, WriteByteTimeout: writeTime,
	}
	return out
}

// owner is whom what this connection takes is counted for.
func (c *conn) owner() string {
	switch c.class {
	case local:
		return "root"
	case stranger:
		return source(c.challenge.Address)
	}
	return c.challenge.Key().String()
}

func connOf(ctx context.Context) *conn {
	c, _ := ctx.Value(connKey{}).(*conn)
	return c
}
