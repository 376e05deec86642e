package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

const (
	maxFact = 256 // bytes of a host's word about itself; it is kept with each decision
	// shortBody is a size that almost all requests have: longer ones don't hold them up.
	shortBody = 64 << 10
	// streamBody bounds a request whose answers are many.
	streamBody = 4 << 10
	// slowest is how fast a large request has to come, in bytes a second, beyond the
	// first bodyTime.
	slowest = 4 << 20
	// waitTime is how long a request waits while others fill the memory.
	waitTime = 10 * time.Second
	// patience is how long a request may be read while others wait for its memory.
	patience = time.Second
)

// RequestHeader carries a correlation id from agent to Vault's audit log. The
// broker makes one where a request has none that it can use.
const RequestHeader = "X-Correlation-Id"

type requestKey struct{}

// identified gives each request its id.
func identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get(RequestHeader)
		if !usableID(id) {
			var b [8]byte
			_, _ = rand.Read(b[:]) // never fails
			id = hex.EncodeToString(b[:])
		}
		w.Header().Set(RequestHeader, id)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, id)))
	})
}

// takesMuch are the calls that carry logs, reference sets or releases.
var takesMuch = map[string]bool{
	countersignv1connect.HostServiceProveProcedure: true, countersignv1connect.HostServiceIssueProcedure: true,
	countersignv1connect.OperatorServiceAddReferenceProcedure: true, countersignv1connect.OperatorServiceAddReleaseProcedure: true,
}

// An intake reads requests: none is decoded, or begun to be read, before its
// peer's rate, its size and the memory that all take allow it.
type intake struct {
	limits *limits
	short  map[class]*flight // of requests of at most shortBody
	flight map[class]*flight
	large  *flight // of requests beyond a class's body, of all classes
	errors *connect.ErrorWriter
	// refused is told of each request that wasn't read.
	refused func(check string)
}

func newIntake(now func() time.Time, refused func(check string)) *intake {
	i := &intake{limits: newLimits(now), short: map[class]*flight{}, flight: map[class]*flight{},
		large: newFlight(maxLogs, maxLogs, 1, 0), errors: connect.NewErrorWriter(), refused: refused}
	for of, b := range classes {
		i.short[of] = newFlight(b.inFlight, b.inFlightOf, math.MaxInt, patience)
		i.flight[of] = newFlight(b.inFlight, b.inFlightOf, math.MaxInt, patience)
	}
	return i
}

type logsKey struct{}

// read wraps a handler that gets requests read.
func (i *intake) read(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := connOf(r.Context())
		b := classes[c.class]
		refuse := func(e *api.Error) {
			e.Request = requestID(r.Context())
			i.refused(e.Check)
			_ = i.errors.Write(w, r, e.Connect())
		}
		if e := i.limits.allow(c, r.URL.Path); e != nil {
			refuse(e)
			return
		}

		call := calls[r.URL.Path]
		if call == nil {
			http.NotFound(w, r)
			return
		}
		encoding, most := "application/proto", b.body
		switch {
		case call.IsStreamingServer():
			// Its answers take as long as they take, and its request, which is in an
			// envelope, is short.
			encoding, most = "application/connect+proto", streamBody
			_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
		case takesMuch[r.URL.Path]:
			most = b.large
		}
		if packed := r.Header.Get("Content-Encoding"); packed != "" && packed != "identity" {
			refuse(api.NewError(api.Fault, "request-encoding", fmt.Sprintf("unknown compression %q: requests are sent as they are", packed)))
			return
		}
		binary := r.Header.Get("Content-Type") == encoding
		if !binary && c.class != local {
			// The parts of other encodings can't be counted before they are decoded.
			refuse(api.NewError(api.Fault, "request-encoding", "this request is sent as "+encoding))
			return
		}
		size := int(min(r.ContentLength, int64(most)+1))
		if size < 0 {
			size = min(most, b.body) // it isn't said; logs say it
		}
		if size > most {
			refuse(api.NewError(api.Fault, "request-size", fmt.Sprintf("the request has more than %d bytes", most)))
			return
		}
		in := i.flight[c.class]
		switch {
		case size <= shortBody:
			in = i.short[c.class]
		case size > b.body:
			in = i.large
			if c.class == member && !i.limits.log.allow(c.owner(), size, i.limits.now()) {
				refuse(api.NewError(api.Fault, "log-rate", "this host shows long logs too often; try again in a while"))
				return
			}
		}
		deadline := http.NewResponseController(w).SetReadDeadline
		mine := &held{owner: c.owner(), size: size, stop: func() { _ = deadline(time.Now()) }}
		if err := in.enter(r.Context(), mine); err != nil {
			refuse(api.NewError(api.Fault, "busy", err.Error()))
			return
		}
		defer in.leave(mine)

		_ = deadline(time.Now().Add(b.bodyTime + time.Duration(size/slowest)*time.Second))
		body, err := readBody(r, size)
		in.read(mine)
		if err != nil {
			refuse(api.NewError(api.Fault, "request", "the request did not come whole: "+err.Error()))
			return
		}
		if c.class == member && size > b.body {
			var logs longLogs
			if body, logs, err = takeLogs(body, b.body); err != nil {
				refuse(malformed(err))
				return
			}
			r = r.WithContext(context.WithValue(r.Context(), logsKey{}, logs))
		}
		if binary && !call.IsStreamingServer() {
			if err := checkParts(body, call.Input(), b.partBytes); err != nil {
				refuse(malformed(err))
				return
			}
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		next.ServeHTTP(w, r)
	})
}

// readBody reads a request of at most size bytes, into no more memory than that.
func readBody(r *http.Request, size int) ([]byte, error) {
	if r.ContentLength >= 0 {
		body := make([]byte, size)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, int64(size)+1))
	if err == nil && len(body) > size {
		err = fmt.Errorf("it has more than %d bytes and doesn't say how many", size)
	}
	return body, err
}

func longLogsOf(ctx context.Context) longLogs {
	l, _ := ctx.Value(logsKey{}).(longLogs)
	return l
}

func usableID(id string) bool {
	if len(id) < 8 || len(id) > 64 {
		return false
	}
	return !strings.ContainsFunc(id, func(c rune) bool {
		return (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-'
	})
}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestKey{}).(string)
	return id
}
