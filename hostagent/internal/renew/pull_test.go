package renew

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/internal/secret"
)

// A hand is a pull way whose program a test plays.
type hand struct {
	mu      sync.Mutex
	program *process.Program // guarded by mu; that came
	asks    bool             // guarded by mu
	offers  []*handed        // guarded by mu; the newest is served
	changed chan struct{}
}

type handed struct {
	hand     *hand
	password string
	read     chan struct{}
}

func (h *hand) Find(context.Context, string) (process.Program, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.program == nil {
		return process.Program{}, program.ErrNotRunning
	}
	return *h.program, nil
}
func (h *hand) Watch(context.Context) <-chan struct{} { return h.changed }
func (h *hand) Asked() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asks && len(h.offers) == 0
}
func (h *hand) Offer(_ process.Program, fields map[string]secret.Bytes) (deliver.Offer, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o := &handed{h, string(fields["password"].Reveal()), make(chan struct{})}
	h.offers = append(h.offers, o)
	return o, nil
}
func (h *hand) Withdraw() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.offers = nil
	return nil
}
func (o *handed) Read() <-chan struct{} { return o.read }
func (o *handed) Keep()                 { o.hand.drop(func(other *handed) bool { return other != o }) }
func (o *handed) Retract()              { o.hand.drop(func(other *handed) bool { return other == o }) }

func (h *hand) drop(which func(*handed) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.offers = slices.DeleteFunc(h.offers, which)
}

// comes is the program's coming, or its end.
func (h *hand) comes(p *process.Program, asks bool) {
	h.mu.Lock()
	h.program, h.asks = p, asks
	h.mu.Unlock()
	h.changed <- struct{}{}
}

// served is what the program would read.
func (h *hand) served() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.offers) == 0 {
		return ""
	}
	return h.offers[len(h.offers)-1].password
}

// reads has the program read what is served.
func (h *hand) reads() string {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.offers) == 0 {
		return ""
	}
	o := h.offers[len(h.offers)-1]
	if !isClosed(o.read) {
		close(o.read)
	}
	h.asks = false
	return o.password
}

// handing is a broker that issues l1, l2 and so on, each with two minutes to be
// acknowledged, an hour to be replaced and two to expire, and keeps what happens.
type handing struct {
	mu      sync.Mutex
	refuses error    // guarded by mu; Acknowledge
	events  []string // guarded by mu
}

func (b *handing) Issue(_ context.Context, o attest.Order) (attest.Issued, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 1
	for _, e := range b.events {
		if strings.HasPrefix(e, "issue") {
			n++
		}
	}
	b.events = append(b.events, fmt.Sprint("issue l", n))
	now := time.Now()
	return attest.Issued{Lease: fmt.Sprint("l", n), Fields: map[string]secret.Bytes{"password": secret.New(fmt.Append(nil, "p", n))},
		Expires: now.Add(2 * time.Minute), ReplaceAt: now.Add(time.Hour), AcknowledgeBy: now.Add(2 * time.Minute)}, nil
}
func (b *handing) Acknowledge(_ context.Context, lease, _ string) (time.Time, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, "acknowledge "+lease)
	return time.Now().Add(2 * time.Hour), b.refuses
}
func (b *handing) Release(_ context.Context, leases []string, _ string) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, "release "+strings.Join(leases, " "))
	return leases, nil
}

// pulling runs a Runner of a hand through a play.
func pulling(t *testing.T, play func(t *testing.T, r *Runner, h *hand, b *handing)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b, h := &handing{}, &hand{changed: make(chan struct{}, 8)}
		r := pullRunner(t, t.TempDir(), b, h)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx); close(done) }()
		synctest.Wait()
		play(t, r, h, b)
		cancel()
		<-done
	})
}

func pullRunner(t *testing.T, dir string, b Broker, h *hand) *Runner {
	t.Helper()
	r, err := New(options(t, dir, b, programs{err: errors.New("a pull way finds its program itself")}, h))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// so wants the broker to have seen just this.
func (b *handing) so(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Equal(b.events, want) {
		t.Errorf("the broker saw %q, want %q", b.events, want)
	}
}

// What is pulled is acknowledged when it is first read, and not before.
func TestAcknowledgedOnFirstRead(t *testing.T) {
	pulling(t, func(t *testing.T, r *Runner, h *hand, b *handing) {
		b.so(t)
		h.comes(&running, true)
		b.so(t, "issue l1")
		time.Sleep(time.Minute)
		if st := r.Status(); st.Lease != "" {
			t.Errorf("in force before it is read: %+v", st)
		}
		if got := h.reads(); got != "p1" {
			t.Errorf("read %q", got)
		}
		b.so(t, "issue l1", "acknowledge l1")
		h.reads()
		b.so(t, "issue l1", "acknowledge l1")

		time.Sleep(time.Hour)
		b.so(t, "issue l1", "acknowledge l1", "issue l2")
		if got := h.reads(); got != "p2" {
			t.Errorf("read %q", got)
		}
		b.so(t, "issue l1", "acknowledge l1", "issue l2", "acknowledge l2")
		if st := r.Status(); st.Lease != "l2" || st.Problem != "" {
			t.Errorf("%+v", st)
		}

		h.comes(nil, false)
		b.so(t, "issue l1", "acknowledge l1", "issue l2", "acknowledge l2", "release l2")
		if got := h.served(); got != "" {
			t.Errorf("the program ended, and %q is served", got)
		}
	})
}

// What is never read is never acknowledged, and the old credential is served again.
func TestNeverRead(t *testing.T) {
	pulling(t, func(t *testing.T, r *Runner, h *hand, b *handing) {
		h.comes(&running, true)
		h.reads()
		time.Sleep(time.Hour)
		b.so(t, "issue l1", "acknowledge l1", "issue l2")
		time.Sleep(2*time.Minute - time.Second)
		if got := h.served(); got != "p2" {
			t.Errorf("%q is served", got)
		}
		time.Sleep(1100 * time.Millisecond)
		b.so(t, "issue l1", "acknowledge l1", "issue l2")
		if got, st := h.served(), r.Status(); got != "p1" || st.Lease != "l1" || !strings.Contains(st.Problem, "not read in time") {
			t.Errorf("%q is served, %+v", got, st)
		}
		time.Sleep(time.Minute) // it is tried again, at a measured pace
		b.so(t, "issue l1", "acknowledge l1", "issue l2", "issue l3")
	})
}

// What ends an offer while it isn't read: nothing of it is served, and nothing is
// acknowledged.
func TestOfferThatEnds(t *testing.T) {
	other := running
	other.PID++
	for name, tt := range map[string]struct {
		ends func(r *Runner, h *hand)
		then []string
	}{
		"the program ended":      {func(_ *Runner, h *hand) { h.comes(nil, false) }, nil},
		"another program came":   {func(_ *Runner, h *hand) { h.comes(&other, true) }, []string{"issue l2"}},
		"the host is rejected":   {func(r *Runner, h *hand) { h.comes(nil, false); r.Rejected(context.Background(), "quarantined") }, nil},
		"the program is refused": {func(r *Runner, h *hand) { r.Judged(context.Background(), "l1", attest.Verdict{Outcome: "refused"}) }, []string{"issue l2"}},
	} {
		t.Run(name, func(t *testing.T) {
			pulling(t, func(t *testing.T, r *Runner, h *hand, b *handing) {
				h.comes(&running, true)
				b.so(t, "issue l1")
				tt.ends(r, h)
				time.Sleep(2 * time.Second) // the pause after a failure
				b.so(t, append([]string{"issue l1"}, tt.then...)...)
				if got := h.served(); got == "p1" || len(tt.then) == 0 && got != "" {
					t.Errorf("%q is served", got)
				}
			})
		})
	}
}

// Where the acknowledgement is refused, the old credential is served again.
func TestReadAndNotAcknowledged(t *testing.T) {
	pulling(t, func(t *testing.T, r *Runner, h *hand, b *handing) {
		h.comes(&running, true)
		h.reads()
		time.Sleep(time.Hour)
		b.mu.Lock()
		b.refuses = api.NewError(api.Refused, api.CheckGone, "too late")
		b.mu.Unlock()
		h.reads()
		b.so(t, "issue l1", "acknowledge l1", "issue l2", "acknowledge l2", "release l2")
		if got, st := h.served(), r.Status(); got != "p1" || st.Lease != "l1" || st.Failures == 0 {
			t.Errorf("%q is served, %+v", got, st)
		}
	})
}

// A rejected host's programs read nothing more, neither what they had nor what
// was offered beside it.
func TestRejectedWhileOffering(t *testing.T) {
	pulling(t, func(t *testing.T, r *Runner, h *hand, b *handing) {
		h.comes(&running, true)
		h.reads()
		time.Sleep(time.Hour)
		b.so(t, "issue l1", "acknowledge l1", "issue l2")
		h.mu.Lock()
		h.program = nil
		h.mu.Unlock()
		r.Rejected(t.Context(), "quarantined")
		if got := h.served(); got != "" {
			t.Errorf("%q is served", got)
		}
		b.so(t, "issue l1", "acknowledge l1", "issue l2", "release l1")
	})
}

// An agent that dies while it offers gives the lease back, as the secret was in
// its memory; and one that has nothing to serve any more replaces the lease of a
// program that comes again.
func TestAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, b, h := t.TempDir(), &handing{}, &hand{changed: make(chan struct{}, 8)}
		during := func(play func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			r := pullRunner(t, dir, b, h)
			go func() { r.Run(ctx); close(done) }()
			synctest.Wait()
			play()
			synctest.Wait()
			cancel()
			<-done
			_ = h.Withdraw()
		}
		during(func() { h.comes(&running, true) })
		b.so(t, "issue l1")
		during(func() { b.so(t, "issue l1", "release l1", "issue l2"); h.reads() })
		b.so(t, "issue l1", "release l1", "issue l2", "acknowledge l2")
		during(func() {
			b.so(t, "issue l1", "release l1", "issue l2", "acknowledge l2")
			h.comes(&running, true)
			h.reads()
		})
		b.so(t, "issue l1", "release l1", "issue l2", "acknowledge l2", "issue l3", "acknowledge l3")
	})
}
