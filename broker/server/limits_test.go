package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/test/check"
)

const (
	proveCall   = countersignv1connect.HostServiceProveProcedure
	joinCall    = countersignv1connect.HostServiceJoinProcedure
	witnessCall = countersignv1connect.HostServiceWitnessProcedure
	releaseCall = countersignv1connect.OperatorServiceAddReleaseProcedure
	scopesCall  = countersignv1connect.OperatorServiceApplyScopesProcedure
)

func peerOf(of class, key, address string) *conn {
	return &conn{class: of, registered: of == member, challenge: &challenge.Conn{KeySPKI: []byte(key), Address: address}}
}

// A broker's intake with a clock that stands.
type reading struct {
	t       *testing.T
	in      *intake
	now     time.Time
	refused []string
	body    []byte // of the last request
	logs    longLogs
	inside  func() // called while a request is served
}

func newReading(t *testing.T) *reading {
	r := &reading{t: t, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r.in = newIntake(func() time.Time { return r.now }, func(check string) { r.refused = append(r.refused, check) })
	return r
}

// send sends a body, and returns why it wasn't read; "": it was.
func (r *reading) send(c *conn, path string, body io.Reader, length int64, kind string) string {
	r.t.Helper()
	served := false
	h := r.in.read(http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		served = true
		r.body, r.logs = check.Must(io.ReadAll(q.Body))(r.t), longLogsOf(q.Context())
		if r.inside != nil {
			inside := r.inside
			r.inside = nil
			inside()
		}
	}))
	q := httptest.NewRequest(http.MethodPost, path, body).WithContext(context.WithValue(r.t.Context(), connKey{}, c))
	q.ContentLength = length
	q.Header.Set("Content-Type", kind)
	r.refused = nil
	w := httptest.NewRecorder()
	h.ServeHTTP(w, q)
	if served {
		return ""
	}
	if w.Code == http.StatusNotFound {
		return "404"
	}
	if len(r.refused) != 1 {
		r.t.Fatalf("neither served nor refused once: %v", r.refused)
	}
	return r.refused[0]
}

func (r *reading) sendBytes(c *conn, path string, body []byte) string {
	return r.send(c, path, bytes.NewReader(body), int64(len(body)), "application/proto")
}

// field is a message of one field.
func field(number protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
}

// withLogs is a ProveRequest with an IMA list of a size.
func withLogs(size int) []byte {
	b, err := proto.Marshal(&v1.ProveRequest{Checkpoint: []byte("c"), Attested: &v1.Attested{Body: []byte("b"), Nonce: []byte("n"),
		Logs: &v1.Logs{EventLog: []byte("event"), UserspaceLog: []byte("user"), Ima: make([]byte, size), ImaOffset: 7, ImaPresent: true}}})
	if err != nil {
		panic(err)
	}
	return b
}

// Each class has its size, and only known hosts and operators send much, where
// much is taken.
func TestBound(t *testing.T) {
	r := newReading(t)
	host, other, someone, boss := peerOf(member, "h", "192.0.2.1"), peerOf(operator, "o", "192.0.2.1"), peerOf(stranger, "s", "192.0.2.1"), peerOf(local, "", "")
	for name, tt := range map[string]struct {
		c    *conn
		path string
		body []byte
		want string
	}{
		"a known host's logs":         {host, proveCall, withLogs(20 << 20), ""},
		"too long a log":              {host, proveCall, withLogs(maxLogs + 1), "request-size"},
		"much beside the logs":        {host, proveCall, append(withLogs(1), protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), make([]byte, 2<<20))...), "request"},
		"a stranger's logs":           {someone, proveCall, withLogs(2 << 20), "request-size"},
		"a stranger's short one":      {someone, proveCall, withLogs(60 << 10), ""},
		"a stranger's, one byte more": {someone, joinCall, make([]byte, 64<<10+1), "request-size"},
		"a known host's long join":    {host, joinCall, make([]byte, 2<<20), "request-size"},
		"an operator's release":       {other, releaseCall, field(1, make([]byte, 20<<20)), ""},
		"an operator's long scopes":   {other, scopesCall, make([]byte, 2<<20), "request-size"},
		"root's scopes":               {boss, scopesCall, field(9, make([]byte, 1<<19)), ""},
	} {
		if got := r.sendBytes(tt.c, tt.path, tt.body); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
		if got := r.send(tt.c, tt.path, bytes.NewReader(tt.body), int64(len(tt.body)), "application/json"); (got == "") != (tt.c == boss) {
			t.Errorf("%s, as text: %q", name, got)
		}
	}
	stream := countersignv1connect.OperatorServiceReadAuditProcedure
	for kind, want := range map[string]string{"application/connect+proto": "", "application/proto": "request-encoding", "application/connect+json": "request-encoding"} {
		if got := r.send(other, stream, bytes.NewReader(make([]byte, 9)), 9, kind); got != want {
			t.Errorf("a stream as %s: %q, want %q", kind, got, want)
		}
	}
	if got := r.send(other, stream, bytes.NewReader(make([]byte, streamBody+1)), -1, "application/connect+proto"); got != "request" {
		t.Errorf("a long request for a stream: %q", got)
	}
	// A length that isn't said, or isn't true, gives no more.
	if got := r.send(someone, joinCall, bytes.NewReader(make([]byte, 64<<10+1)), -1, "application/proto"); got != "request" {
		t.Errorf("a length that isn't said: %q", got)
	}
	if got := r.send(someone, joinCall, bytes.NewReader(field(1, nil)), -1, "application/proto"); got != "" {
		t.Errorf("a short one whose length isn't said: %q", got)
	}
	if got := r.send(host, joinCall, bytes.NewReader(make([]byte, 10)), 11, "application/proto"); got != "request" {
		t.Errorf("less than was said: %q", got)
	}
}

// Logs come beside the request, whole and not copied.
func TestTakeLogs(t *testing.T) {
	r := newReading(t)
	sent := withLogs(3 << 20)
	if got := r.sendBytes(peerOf(member, "h", "192.0.2.1"), proveCall, sent); got != "" {
		t.Fatal(got)
	}
	var m v1.ProveRequest
	check.Nil(t, unmarshal(r.body, &m))
	l := m.GetAttested().GetLogs()
	if string(m.GetCheckpoint()) != "c" || string(m.GetAttested().GetBody()) != "b" || l.GetImaOffset() != 7 || !l.GetImaPresent() || len(r.body) > 100 {
		t.Errorf("%d bytes: %v", len(r.body), &m)
	}
	got := logsOf(l, r.logs)
	if string(got.Event) != "event" || string(got.Userspace) != "user" || len(got.IMA) != 3<<20 || got.IMAOffset != 7 {
		t.Errorf("event %q, userspace %q, %d bytes of IMA", got.Event, got.Userspace, len(got.IMA))
	}
}

// A request of many small parts is not decoded, in whatever message they are.
func TestParts(t *testing.T) {
	r := newReading(t)
	many := func(number protowire.Number) []byte { return bytes.Repeat(field(number, nil), 100000) }
	host, boss := peerOf(member, "h", "192.0.2.1"), peerOf(operator, "o", "192.0.2.1")
	newHost := append(field(1, make([]byte, 12)), field(2, make([]byte, 64))...)
	for _, k := range []string{"role", "site", "env"} {
		newHost = append(newHost, field(3, append(field(1, []byte(k)), field(2, []byte("billing"))...))...)
	}
	for name, tt := range map[string]struct {
		c    *conn
		path string
		b    []byte
		want string
	}{
		"empty PCRs":               {host, proveCall, field(1, field(3, many(3))), "request"},
		"a quote many times":       {host, proveCall, field(1, many(3)), "request"},
		"PCRs beside logs":         {host, proveCall, append(withLogs(2<<20), field(1, field(3, many(3)))...), "request"},
		"names of leases":          {host, countersignv1connect.HostServiceReleaseProcedure, many(1), "request"},
		"some names":               {host, countersignv1connect.HostServiceReleaseProcedure, bytes.Repeat(field(1, make([]byte, 26)), 256), ""},
		"opens":                    {host, witnessCall, many(1), "request"},
		"packed PCRs":              {boss, countersignv1connect.OperatorServiceLearnReferenceProcedure, field(3, make([]byte, 100000)), "request"},
		"labels":                   {boss, countersignv1connect.OperatorServiceAddHostsProcedure, field(1, many(3)), "request"},
		"eight thousand hosts":     {boss, countersignv1connect.OperatorServiceAddHostsProcedure, bytes.Repeat(field(1, newHost), 7000), ""},
		"a release of many files":  {boss, releaseCall, bytes.Repeat(field(2, append(field(1, make([]byte, 20)), field(2, make([]byte, 64))...)), 100000), ""},
		"half a message":           {host, proveCall, []byte{10, 200}, "request"},
		"what is no call, by name": {host, proveCall + "x", nil, "404"},
	} {
		if got := r.sendBytes(tt.c, tt.path, tt.b); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	for name, tt := range map[string]struct {
		b  []byte
		m  proto.Message
		ok bool
	}{
		"some leases":   {bytes.Repeat(field(2, append(field(1, make([]byte, 26)), field(2, make([]byte, 2000))...)), 256), &v1.ProveBody{}, true},
		"empty leases":  {many(2), &v1.ProveBody{}, false},
		"empty keys":    {many(1), &v1.JoinBody{}, false},
		"empty issuers": {many(6), &v1.JoinBody{}, false},
		"some issuers":  {bytes.Repeat(field(6, make([]byte, 1000)), 16), &v1.JoinBody{}, true},
	} {
		if err := unmarshal(tt.b, tt.m); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is read at the same time is bounded, for all and for each: the others are served.
func TestInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReading(t)
		a, b, c := peerOf(member, "a", "192.0.2.1"), peerOf(member, "b", "192.0.2.1"), peerOf(member, "c", "192.0.2.1")
		long := withLogs(40 << 20)
		r.inside = func() {
			if got := r.sendBytes(a, proveCall, withLogs(2<<20)); got != "busy" {
				t.Errorf("a second long one of a host: %q", got)
			}
			began := time.Now()
			if got := r.sendBytes(b, proveCall, long); got != "busy" || time.Since(began) != waitTime {
				t.Errorf("more than memory takes: %q after %v", got, time.Since(began))
			}
			if got := r.sendBytes(b, proveCall, withLogs(2<<20)); got != "" {
				t.Errorf("one that has room beside it: %q", got)
			}
			if got := r.sendBytes(a, proveCall, withLogs(1000)); got != "" {
				t.Errorf("a short one: %q", got)
			}
		}
		if got := r.sendBytes(a, proveCall, long); got != "" {
			t.Fatalf("alone: %q", got)
		}
		if got := r.sendBytes(b, proveCall, long); got != "" {
			t.Errorf("afterwards: %q", got)
		}
		// Not as long ones: one host has its share, others theirs.
		r.inside = func() {
			if got := r.sendBytes(c, joinCall, field(1, make([]byte, 100<<10))); got != "busy" {
				t.Errorf("beyond a share: %q", got)
			}
			if got := r.sendBytes(c, joinCall, field(1, make([]byte, shortBody-100))); got != "" {
				t.Errorf("a short one beside it: %q", got)
			}
			if got := r.sendBytes(a, proveCall, withLogs(1<<20-200)); got != "" {
				t.Errorf("another host's: %q", got)
			}
		}
		if got := r.sendBytes(c, joinCall, field(1, make([]byte, 1<<20-10))); got != "" {
			t.Errorf("a share: %q", got)
		}
	})
}

// Who sends slowly is given up once others wait for its memory, and not before;
// what was read is not.
func TestSlowSendersMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlight(100, 60, 10, patience)
		stopped := map[string]bool{}
		enter := func(owner string, size int) *held {
			h := &held{owner: owner, size: size}
			h.stop = func() {
				stopped[owner] = true
				go f.leave(h) // as its reader does
			}
			check.Nil(t, f.enter(t.Context(), h))
			return h
		}
		slow, served := enter("slow", 60), enter("served", 40)
		f.read(served)
		time.Sleep(time.Hour)
		if len(stopped) > 0 {
			t.Fatalf("with nobody waiting: %v", stopped)
		}
		began := time.Now()
		honest := enter("honest", 30)
		if time.Since(began) > 0 || !stopped["slow"] || stopped["served"] {
			t.Errorf("after %v: %v", time.Since(began), stopped)
		}
		f.read(slow)
		again := enter("slow", 30) // all is taken, and this has just begun
		honest2 := enter("honest", 20)
		if time.Since(began) != patience {
			t.Errorf("after %v: %v", time.Since(began), stopped)
		}
		_, _, _ = again, honest2, honest
		if err := f.enter(t.Context(), &held{owner: "other", size: 60}); err != nil {
			t.Error(err)
		}
		f.leave(served)
	})
}

// One host that shows long logs over and over is refused, before they are read;
// another is not.
func TestLogRate(t *testing.T) {
	r := newReading(t)
	a, b := peerOf(member, "a", "192.0.2.1"), peerOf(member, "b", "192.0.2.1")
	long := withLogs(60 << 20)
	for range 4 {
		if got := r.sendBytes(a, proveCall, long); got != "" {
			t.Fatal(got)
		}
	}
	if got := r.send(a, proveCall, neverRead{t}, int64(len(long)), "application/proto"); got != "log-rate" {
		t.Errorf("once more: %q", got)
	}
	if got := r.sendBytes(b, proveCall, long); got != "" {
		t.Errorf("another host's: %q", got)
	}
	r.now = r.now.Add(time.Hour)
	if got := r.sendBytes(a, proveCall, long); got != "" {
		t.Errorf("an hour later: %q", got)
	}
}

type neverRead struct{ t *testing.T }

func (n neverRead) Read([]byte) (int, error) {
	n.t.Error("it is read")
	return 0, io.EOF
}

// Strangers who make up keys and addresses take no rate of a host that is known,
// of whatever call, and a refusal comes before anything is read.
func TestStrangersTakeNoHostsRate(t *testing.T) {
	r := newReading(t)
	host := peerOf(member, "host", "192.0.2.1")
	pending := peerOf(stranger, "pending", "192.0.2.1")
	pending.registered = true
	calls := []string{joinCall, proveCall, countersignv1connect.HostServiceIssueProcedure, witnessCall}
	for _, path := range calls {
		if got := r.sendBytes(host, path, nil); got != "" {
			t.Errorf("%s before: %q", path, got)
		}
	}
	refused := map[string]int{}
	ask := func(i int, from string) {
		for _, path := range calls {
			if e := r.in.limits.allow(peerOf(stranger, fmt.Sprint("made up ", i), from), path); e != nil {
				refused[e.Check]++
			}
		}
	}
	for i := range maxStrangers + 1000 {
		ask(i, "192.0.2.1")
		ask(i, fmt.Sprintf("2001:db8:%x:%x::1", i>>16, i&0xffff))
	}
	if refused["call-rate"] < maxStrangers || refused["join-rate"] < maxStrangers {
		t.Errorf("strangers from one address: %v", refused)
	}
	for _, path := range calls {
		if got := r.sendBytes(host, path, nil); got != "" {
			t.Errorf("%s: a known host hears %q", path, got)
		}
	}
	if got := r.sendBytes(pending, joinCall, nil); got != "" {
		t.Errorf("a host that waits for approval hears %q", got)
	}
	if got := r.send(peerOf(stranger, "x", "192.0.2.1"), joinCall, neverRead{t}, 100, "application/proto"); got != "join-rate" {
		t.Errorf("a stranger: %q", got)
	}
	// From an address that wasn't seen for longest there is room.
	if got := r.send(peerOf(stranger, "x", "192.0.2.1"), proveCall, neverRead{t}, 100, "application/proto"); got != "call-rate" {
		t.Errorf("a stranger's proof: %q", got)
	}
	if got := r.sendBytes(peerOf(stranger, "y", "198.51.100.1"), joinCall, nil); got != "" {
		t.Errorf("a stranger from elsewhere: %q", got)
	}
}

// A host's own rates.
func TestRatesOfAHost(t *testing.T) {
	r := newReading(t)
	challenge := countersignv1connect.HostServiceChallengeProcedure
	for path, burst := range map[string]int{joinCall: againBurst, proveCall: askBurst, witnessCall: opensBurst, challenge: hostsBurst} {
		host := peerOf(member, "host of "+path, "192.0.2.1")
		for i := range burst {
			if got := r.sendBytes(host, path, nil); got != "" {
				t.Fatalf("%s, %d: %q", path, i, got)
			}
		}
		if got := r.send(host, path, neverRead{t}, 10, "application/proto"); got == "" {
			t.Errorf("%s: no end", path)
		}
		r.now = r.now.Add(10 * time.Minute)
		if got := r.sendBytes(host, path, nil); got != "" {
			t.Errorf("%s, later: %q", path, got)
		}
	}
}

// A slow sender's time is over, and its memory free.
func TestReadsEnd(t *testing.T) {
	r := newReading(t)
	in, _ := io.Pipe()
	check.Nil(t, in.CloseWithError(errors.New("deadline")))
	if got := r.send(peerOf(member, "a", "192.0.2.1"), proveCall, in, 60<<20, "application/proto"); got != "request" {
		t.Errorf("%q", got)
	}
	if got := r.sendBytes(peerOf(member, "a", "192.0.2.1"), proveCall, withLogs(60<<20)); got != "" {
		t.Errorf("the next: %q", got)
	}
}
