package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/countersign/countersign/attestors/ima"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

const (
	maxBody     = 1 << 20             // of one request without logs
	maxEvidence = ima.MaxList + 4<<20 // of one with event log and IMA list, or with a reference set or release
	largeAtOnce = 3                   // such requests that are read at the same time, each another peer's
	bodyTime    = 20 * time.Second    // in which a request has to be sent
	joinsPerSec = 2                   // from one source, after joinBurst
	joinBurst   = 20
	againPerSec = 1.0 / 30 // joins of a host that the broker knows, after againBurst: each is kept
	againBurst  = 10
	asksPerSec  = 10 // for credentials and proofs, by one host, after askBurst: what comes of them is kept
	askBurst    = 1000
	opensPerSec = 1.0 / 300 // that one host tells of files that were opened, after opensBurst: it stands in the audit log
	opensBurst  = 10
	maxFact     = 256   // bytes of a host's word about itself; it is kept with each decision
	maxSources  = 65536 // sources that the join limit remembers
)

// RequestHeader carries a correlation id from agent to Vault's audit log. The
// broker makes one where a request has none that it can use.
const RequestHeader = "X-Correlation-Id"

type requestKey struct{}

// limit bounds each request in time and gives it its id.
func limit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get(RequestHeader)
		if !usableID(id) {
			var b [8]byte
			_, _ = rand.Read(b[:]) // never fails
			id = hex.EncodeToString(b[:])
		}
		w.Header().Set(RequestHeader, id)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime))
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, id)))
	})
}

// bound bounds each request in size, by what it is for and by who sends it:
// only hosts that are known on this connection, and operators, send much.
func bound(next http.Handler) http.Handler {
	large, senders := make(chan struct{}, largeAtOnce), newShares(1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		most := int64(maxBody)
		if c := connOf(r.Context()); takesMuch[r.URL.Path] && (c.kind == localPeer || c.kind == operatorPeer || c.kind == hostPeer && c.known.Load()) {
			most = maxEvidence
			body := &largeBody{ReadCloser: r.Body, slots: large, senders: senders}
			if c.kind != localPeer {
				body.from = c.challenge.Key().String()
			}
			defer body.done()
			r.Body = body
		}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		next.ServeHTTP(w, r)
	})
}

// takesMuch are the calls that carry logs, reference sets or releases.
var takesMuch = map[string]bool{
	countersignv1connect.HostServiceProveProcedure: true, countersignv1connect.HostServiceIssueProcedure: true,
	countersignv1connect.OperatorServiceAddReferenceProcedure: true, countersignv1connect.OperatorServiceAddReleaseProcedure: true,
}

// A largeBody takes a slot once it is larger than requests without logs are: few
// are read at the same time, so that hosts that show much don't take the memory
// of all others, and one of a peer, so that a slow one doesn't take all slots.
type largeBody struct {
	io.ReadCloser
	slots   chan struct{}
	senders *shares
	from    string
	read    int
	held    bool
}

var errBusy = errors.New("too many long logs are sent at the same time, or two by this host; try again")

func (b *largeBody) Read(p []byte) (int, error) {
	if b.read > maxBody && !b.held {
		if !b.senders.enter(b.from) {
			return 0, errBusy
		}
		select {
		case b.slots <- struct{}{}:
			b.held = true
		default:
			b.senders.leave(b.from)
			return 0, errBusy
		}
	}
	n, err := b.ReadCloser.Read(p)
	b.read += n
	return n, err
}

func (b *largeBody) done() {
	if b.held {
		<-b.slots
		b.senders.leave(b.from)
	}
}

func usableID(id string) bool {
	if len(id) < 8 || len(id) > 64 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' {
			return false
		}
	}
	return true
}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestKey{}).(string)
	return id
}

// A sourceLimit holds what one source asks for to a rate, so that it can't take
// the time, or the disk, of all others.
type sourceLimit struct {
	perSecond rate.Limit
	burst     int

	mu      sync.Mutex
	sources map[string]*rate.Limiter // guarded by mu
	now     func() time.Time
}

func newSourceLimit(perSecond rate.Limit, burst int, now func() time.Time) *sourceLimit {
	return &sourceLimit{perSecond: perSecond, burst: burst, sources: map[string]*rate.Limiter{}, now: now}
}

func (l *sourceLimit) allow(from string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if len(l.sources) >= maxSources {
		for a, s := range l.sources {
			if s.TokensAt(now) >= float64(l.burst) {
				delete(l.sources, a)
			}
		}
		if len(l.sources) >= maxSources {
			return false
		}
	}
	s, ok := l.sources[from]
	if !ok {
		s = rate.NewLimiter(l.perSecond, l.burst)
		l.sources[from] = s
	}
	return s.AllowN(now, 1)
}
