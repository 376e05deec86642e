package attest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/secret"
)

// An Order is a request for a credential.
type Order struct {
	Scope       string
	Program     process.Program
	CSR         []byte
	Replaces    string
	DeliveryID  string
	BeforeStart bool
	HandOver    bool
}

// An Issued credential, not yet acknowledged.
type Issued struct {
	Lease         string
	Fields        map[string]secret.Bytes
	Expires       time.Time // unless acknowledged
	ReplaceAt     time.Time
	AcknowledgeBy time.Time
	Ticket        []byte
	Observe       bool // the scope only observes
}

// Issue asks for a credential. Errors are *api.Error, or local ones, which
// count as faults.
func (c *Client) Issue(ctx context.Context, o Order) (Issued, error) {
	body := func(reads int) (proto.Message, error) {
		program, err := o.Program.EncodeAs(reads)
		return &v1.IssueBody{
			Scope: o.Scope, Program: program, Host: c.facts(), Csr: o.CSR, Replaces: o.Replaces,
			DeliveryId: o.DeliveryID, BeforeStart: o.BeforeStart, HandOver: o.HandOver,
		}, err
	}
	var out Issued
	err := c.attested(ctx, evidence.CallIssue, body, func(s *api.Session, a *v1.Attested) error {
		r, err := s.Hosts.Issue(ctx, request(&v1.IssueRequest{Attested: a}))
		if err != nil {
			return err
		}
		m := r.Msg
		local := c.local(m.GetNow())
		out = Issued{Lease: m.GetLeaseId(), Fields: map[string]secret.Bytes{}, Expires: local(m.GetExpires()), ReplaceAt: local(m.GetReplaceAt()),
			AcknowledgeBy: local(m.GetAcknowledgeBy()), Ticket: m.GetTicket(), Observe: m.GetObserve()}
		for _, f := range m.GetFields() {
			out.Fields[f.GetName()] = secret.New(f.GetValue())
		}
		return nil
	})
	return out, err
}

// local turns a broker's times into this host's: what counts is how far they
// lie from the broker's now, not what either clock says.
func (c *Client) local(now *timestamppb.Timestamp) func(*timestamppb.Timestamp) time.Time {
	offset := c.now().Sub(now.AsTime())
	return func(t *timestamppb.Timestamp) time.Time {
		if t == nil {
			return time.Time{}
		}
		return t.AsTime().Add(offset)
	}
}

// Acknowledge says that a credential is delivered; it returns until when it
// lives.
func (c *Client) Acknowledge(ctx context.Context, lease, delivery string) (time.Time, error) {
	var expires time.Time
	err := c.plain(ctx, func(s *api.Session) error {
		r, err := s.Hosts.Acknowledge(ctx, request(&v1.AcknowledgeRequest{LeaseId: lease, DeliveryId: delivery}))
		if err == nil {
			expires = c.local(r.Msg.GetNow())(r.Msg.GetExpires())
		}
		return err
	})
	return expires, err
}

// Release gives leases back; it returns those whose end is confirmed.
func (c *Client) Release(ctx context.Context, leases []string, reason string) (confirmed []string, err error) {
	err = c.plain(ctx, func(s *api.Session) error {
		r, err := s.Hosts.Release(ctx, request(&v1.ReleaseRequest{LeaseIds: leases, Reason: reason}))
		if err == nil {
			confirmed = r.Msg.GetConfirmed()
		}
		return err
	})
	return confirmed, err
}

// A FileOpen is that another program opened a credential's file.
type FileOpen struct {
	Lease, Path string
	Time        time.Time
	PID         int
	Exe, User   string
	Unit        string // empty: of none
}

// Witness tells of programs that opened credentials' files, at most 16 a call.
func (c *Client) Witness(ctx context.Context, opens []FileOpen) error {
	m := &v1.WitnessRequest{}
	for _, o := range opens {
		m.Opens = append(m.Opens, &v1.FileOpen{LeaseId: o.Lease, Path: o.Path, Time: timestamppb.New(o.Time), Pid: uint32(o.PID), Exe: o.Exe, User: o.User, Unit: o.Unit})
	}
	return c.plain(ctx, func(s *api.Session) error {
		_, err := s.Hosts.Witness(ctx, request(m))
		return err
	})
}

// plain sends a request that needs no quote, once more if the connection was
// lost or the broker asks for a new certificate.
func (c *Client) plain(ctx context.Context, send func(*api.Session) error) error {
	var last error
	for range 2 {
		s, _, err := c.connect(ctx)
		if err != nil {
			return err
		}
		if last = send(s); last == nil {
			return nil
		}

		switch e := api.FromConnect(last); {
		case e.Check == api.CheckCertificate:
			if err := c.rejoin(ctx, s, e); err != nil {
				return err
			}
		case s.Err() != nil:
			c.forget(s)
		default:
			return e
		}
	}
	return api.FromConnect(last)
}

// A LeaseProof is a lease and the program that holds it.
type LeaseProof struct {
	Lease, Scope string
	Program      *process.Program // nil: it was not seen
	Ticket       []byte
}

// A Verdict is what a proof means for a lease.
type Verdict struct {
	Outcome string // "live", api.Refused, api.Rejected, api.Fault or api.CheckGone
	Reason  string
	Expires time.Time
}

// A Proven host knows its state and when to prove again.
type Proven struct {
	ProveBy  time.Time
	Verdicts map[string]Verdict // by lease
}

// Prove proves the host and all leases it holds. A lease left out is revoked.
func (c *Client) Prove(ctx context.Context, leases []LeaseProof) (Proven, error) {
	c.proving.Lock()
	defer c.proving.Unlock()
	c.mu.Lock()
	var shown, last []byte
	if c.member != nil {
		shown, last = c.member.Checkpoint, c.continues.value
	}
	c.mu.Unlock()

	body := func(reads int) (proto.Message, error) {
		return &v1.ProveBody{Host: c.facts(), Leases: c.leases(leases, reads), Continuation: last}, nil
	}
	out := Proven{Verdicts: map[string]Verdict{}}
	err := c.attested(ctx, evidence.CallProve, body, func(s *api.Session, a *v1.Attested) error {
		r, err := s.Hosts.Prove(ctx, request(&v1.ProveRequest{Attested: a, Checkpoint: shown}))
		if err != nil {
			return err
		}
		local := c.local(r.Msg.GetNow())
		out.ProveBy = local(r.Msg.GetProveBy())
		for _, v := range r.Msg.GetLeases() {
			out.Verdicts[v.GetLeaseId()] = Verdict{Outcome: v.GetOutcome(), Reason: v.GetReason(), Expires: local(v.GetExpires())}
		}
		return c.proven(r.Msg, shown)
	})
	return out, err
}

// leases are the proofs' messages, in an order of their own. A program that can't
// be told of is left out: its lease is named all the same.
func (c *Client) leases(proofs []LeaseProof, reads int) []*v1.LeaseProof {
	var out []*v1.LeaseProof
	for _, l := range proofs {
		m := &v1.LeaseProof{LeaseId: l.Lease, Scope: l.Scope, Ticket: l.Ticket}
		if l.Program != nil {
			var err error
			if m.Program, err = l.Program.EncodeAs(reads); err != nil {
				c.log.Error("the program can't be told of", "lease", l.Lease, "err", err)
			}
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *v1.LeaseProof) int { return strings.Compare(a.GetLeaseId(), b.GetLeaseId()) })
	return out
}

// proven keeps the checkpoint, what the next proof continues from, and the
// certificate where there is a new one.
func (c *Client) proven(m *v1.ProveResponse, shown []byte) error {
	if n := len(m.GetContinuation()); n > api.MaxContinuation {
		return api.NewError(api.Fault, "continuation", fmt.Sprintf("the broker's answer has %d bytes to continue from; at most %d are kept", n, api.MaxContinuation))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.reread(); err != nil {
		return err
	}
	if string(c.member.Checkpoint) == string(shown) {
		if err := c.follow(m.GetCheckpoint()); err != nil {
			// Somebody rewrote the log, or another broker speaks: nothing that
			// it says counts, and nothing that we have goes.
			return api.NewError(api.Fault, checkAuditLog, fmt.Sprintf("the broker's audit log: %v", err))
		}
	}
	if len(m.GetCertificate()) > 0 {
		c.member.Certificate = m.GetCertificate()
		c.drop() // the next session shows the new one
	}
	if err := c.continues.set(m.GetContinuation()); err != nil {
		c.log.Warn("what the next proof continues from is not kept over a restart", "err", err)
	}
	return writeJSON(c.dir, membershipFile, c.member)
}
