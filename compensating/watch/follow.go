package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// A Dial connects to the broker. The second result ends the connection.
type Dial func(context.Context) (countersignv1connect.OperatorServiceClient, func(), error)

// An update is what the broker's log says is new.
type update struct {
	entries  []ledger.Entry
	opens    []sightings.Sighting
	canaries bool      // the entries are all of the broker's canaries
	next     int64     // the record to go on from
	epoch    uint64    // of the log that it is in
	synced   time.Time // what was issued before is in the ledger
}

// A follower reads the broker's audit log and fetches the leases that it speaks of.
type follower struct {
	dial  Dial
	log   *slog.Logger
	now   func() time.Time
	next  int64
	epoch uint64 // of the broker's log
	empty bool   // the ledger is: all leases are fetched first
	out   chan update
}

const (
	again = 2 * time.Second // after the connection was lost
	batch = 200 * time.Millisecond
	// batchSize is how many leases are fetched for one update, or opens told.
	batchSize = 256
	// confirmEvery is how often the broker is asked how long its log is.
	confirmEvery = time.Second
	// stuck is how long what is in the broker's log may not come.
	stuck = 20 * time.Second
	// answer is how long a call may take whose result the follower can't do without.
	answer = 30 * time.Second
)

// A confirmation is what tells that the ledger is no older than a time: the length that
// the broker's log had then. That the stream is open tells nothing; the broker may have
// gone without a word.
type confirmation struct {
	asked time.Time
	size  int64
	moved time.Time // when the stream came to next
	next  int64
}

// confirm returns a time before which the broker recorded nothing that isn't before next.
func (c *confirmation) confirm(ctx context.Context, f *follower, client countersignv1connect.OperatorServiceClient, next int64) (time.Time, error) {
	now := f.now()
	if next != c.next || c.moved.IsZero() {
		c.next, c.moved = next, now
	}
	if next < c.size {
		if now.Sub(c.moved) > stuck {
			return time.Time{}, fmt.Errorf("the broker's audit log has %d records, and none came after %d", c.size, next)
		}
		return time.Time{}, nil
	}
	if since := now.Sub(c.asked); since < 0 || since >= confirmEvery {
		size, err := logSize(ctx, client)
		if err != nil {
			return time.Time{}, err
		}
		c.asked, c.size, c.moved = now, size, now
	}
	if next < c.size {
		return time.Time{}, nil
	}
	return c.asked, nil
}

func (f *follower) run(ctx context.Context) {
	said := ""
	for ctx.Err() == nil {
		err := f.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			f.log.Warn("the broker can't be followed; unmatched logins wait", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
}

// follow follows one connection's log until it ends.
func (f *follower) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, hangUp, err := f.dial(ctx)
	if err != nil {
		return err
	}
	defer hangUp()

	if err := f.start(ctx, client); err != nil {
		return err
	}
	records, ended := f.records(ctx, client)
	p := passage{follower: f, client: client, next: f.next, leases: map[string]bool{}}
	tick := time.NewTicker(batch)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			return err
		case r := <-records:
			if err := p.take(r); err != nil {
				return err
			}
		case <-tick.C:
			if err := p.takeAll(records); err != nil {
				return err
			}
			if err := p.tell(ctx); err != nil {
				return err
			}
		}
	}
}

// start brings the ledger to where the log can be followed from: with all leases, if it
// has none or the log is another one, and with the canaries.
func (f *follower) start(ctx context.Context, client countersignv1connect.OperatorServiceClient) error {
	// A broker that was restored has another log under the same numbers.
	status, err := within(ctx, client.GetStatus, &v1.GetStatusRequest{})
	if err != nil {
		return err
	}
	size, err := logSize(ctx, client)
	if err != nil {
		return err
	}
	if epoch := status.Msg.GetEpoch(); f.empty || epoch != f.epoch || f.next > size {
		if err := f.all(ctx, client, epoch); err != nil {
			return err
		}
	}
	return f.canaries(ctx, client)
}

// records streams the log's records from f.next on; ended says why they end.
func (f *follower) records(ctx context.Context, client countersignv1connect.OperatorServiceClient) (records chan event.Record, ended chan error) {
	records, ended = make(chan event.Record), make(chan error, 1)
	from := uint64(f.next)
	go func() {
		stream, err := client.ReadAudit(ctx, connect.NewRequest(&v1.ReadAuditRequest{From: from, Follow: true}))
		if err != nil {
			ended <- err
			return
		}
		defer func() { _ = stream.Close() }()
		for stream.Receive() {
			r, err := event.Parse(stream.Msg().GetJson())
			if err != nil {
				ended <- fmt.Errorf("record %d: %w", stream.Msg().GetIndex(), err)
				return
			}
			r.Index = int64(stream.Msg().GetIndex())
			select {
			case records <- r:
			case <-ctx.Done():
				return
			}
		}
		ended <- errors.Join(errors.New("the broker's audit log ended"), stream.Err())
	}()
	return records, ended
}

// A passage is what one connection's records said that isn't told yet.
type passage struct {
	*follower
	client    countersignv1connect.OperatorServiceClient
	next      int64 // behind the last record
	confirmed confirmation

	leases        map[string]bool // to fetch
	opens         []sightings.Sighting
	canariesMoved bool
}

// take reads one record.
func (p *passage) take(r event.Record) error {
	p.next = r.Index + 1
	if r.Lease != "" {
		p.leases[r.Lease] = true
	}
	switch r.Kind {
	case event.CanaryIssued, event.CanaryRemoved:
		p.canariesMoved = true
	case event.CredentialOpened:
		s, err := opened(r)
		p.opens = append(p.opens, s)
		return err
	}
	return nil
}

// takeAll takes what has come already, as much as one update holds.
func (p *passage) takeAll(records <-chan event.Record) error {
	for len(p.leases)+len(p.opens) < batchSize {
		select {
		case r := <-records:
			if err := p.take(r); err != nil {
				return err
			}
		default:
			return nil
		}
	}
	return nil
}

// tell gives an update of what was taken, with the leases as they stand now.
func (p *passage) tell(ctx context.Context) (err error) {
	u := update{next: p.next, epoch: p.epoch, opens: p.opens}
	p.opens = nil
	if u.synced, err = p.confirmed.confirm(ctx, p.follower, p.client, p.next); err != nil {
		return err
	}
	for id := range p.leases {
		a, err := within(ctx, p.client.ListLeases, &v1.ListLeasesRequest{Lease: id})
		if connect.CodeOf(err) == connect.CodeNotFound {
			continue
		}
		if err != nil {
			return err
		}
		for _, l := range a.Msg.GetLeases() {
			e, err := ledger.OfLease(l)
			if err != nil {
				return err
			}
			u.entries = append(u.entries, e)
		}
	}
	clear(p.leases)
	if p.canariesMoved {
		if err := p.canaries(ctx, p.client); err != nil {
			return err
		}
		p.canariesMoved = false
	}
	return p.give(ctx, u)
}

// within makes a call that may not take forever.
func within[In, Out any](ctx context.Context, call func(context.Context, *connect.Request[In]) (*connect.Response[Out], error), in *In) (*connect.Response[Out], error) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	return call(ctx, connect.NewRequest(in))
}

// opened is what an agent saw of a credential's file.
func opened(r event.Record) (sightings.Sighting, error) {
	e, err := r.Event()
	if err != nil {
		return sightings.Sighting{}, err
	}
	o := e.(*event.Opened) // by the record's kind
	who := "user " + o.User
	if o.Unit != "" {
		who += ", unit " + o.Unit
	}
	return sightings.Sighting{Time: o.Time.UTC(), Kind: sightings.Open, Source: "agent", Line: r.Index, Target: o.Path, Program: o.Exe, Lease: r.Lease, Actor: who}, nil
}

func (f *follower) give(ctx context.Context, u update) error {
	select {
	case f.out <- u:
		f.next, f.epoch = u.next, u.epoch
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// all fetches every lease, and goes on from what the log had before.
func (f *follower) all(ctx context.Context, client countersignv1connect.OperatorServiceClient, epoch uint64) error {
	size, err := logSize(ctx, client)
	if err != nil {
		return err
	}
	req := &v1.ListLeasesRequest{Ended: true}
	for {
		r, err := within(ctx, client.ListLeases, req)
		if err != nil {
			return err
		}
		u := update{next: f.next, epoch: f.epoch}
		for _, l := range r.Msg.GetLeases() {
			e, err := ledger.OfLease(l)
			if err != nil {
				return err
			}
			u.entries = append(u.entries, e)
		}
		req.After = r.Msg.GetNext()
		if req.After == "" {
			u.next, u.epoch = size, epoch
		}
		if err := f.give(ctx, u); err != nil {
			return err
		}
		if req.After == "" {
			f.empty = false
			return nil
		}
	}
}

// logSize is how many records the broker's log has: the second line of its signed
// note. Nothing is trusted to it but where to read on.
func logSize(ctx context.Context, client countersignv1connect.OperatorServiceClient) (int64, error) {
	c, err := within(ctx, client.AuditCheckpoint, &v1.AuditCheckpointRequest{})
	if err != nil {
		return 0, err
	}
	lines := strings.SplitN(string(c.Msg.GetCheckpoint()), "\n", 3)
	if len(lines) < 3 {
		return 0, errors.New("the broker's checkpoint is no note")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the broker's checkpoint: %w", err)
	}
	return size, nil
}

// canaries fetches the canaries of the broker.
func (f *follower) canaries(ctx context.Context, client countersignv1connect.OperatorServiceClient) error {
	r, err := within(ctx, client.ListCanaries, &v1.ListCanariesRequest{})
	if err != nil {
		return err
	}
	u := update{canaries: true, next: f.next, epoch: f.epoch}
	for _, c := range r.Msg.GetCanaries() {
		u.entries = append(u.entries, ledger.OfCanary(c))
	}
	return f.give(ctx, u)
}
