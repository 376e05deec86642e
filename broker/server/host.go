package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"time"
	"unicode"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/enroll"
	"github.com/countersign/countersign/broker/internal/front/hostapi"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// Hosts handles HostService.
type Hosts struct {
	Admission   *enroll.Desk
	Credentials *hostapi.Desk
	Audit       *audit.Log
	TrustDomain string
	CA          []byte // DER of the host CA
	Now         func() time.Time
}

// anyHost returns the connection of a host, admitted or joining, or a fault.
func anyHost(ctx context.Context) (*conn, error) {
	c := connOf(ctx)
	if c.kind != hostPeer && c.kind != joiningPeer {
		return nil, api.NewError(api.Fault, "peer", "this call is for hosts")
	}
	return c, nil
}

// hostConn returns the connection of a host with a certificate that counts, or
// a fault that asks the host to join again.
func hostConn(ctx context.Context) (*conn, error) {
	c, err := anyHost(ctx)
	if err != nil || c.kind == hostPeer {
		return c, err
	}

	e := api.NewError(api.Fault, api.CheckCertificate, "a certificate that its key signed itself is for joining alone: join first")
	if !bytes.Equal(c.leaf.RawIssuer, c.leaf.RawSubject) {
		e.Message = fmt.Sprintf("this host's certificate ended at %s by the broker's clock: join again", c.leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil, e
}

// Join answers an application with a challenge.
func (s *Hosts) Join(ctx context.Context, req *connect.Request[v1.JoinRequest]) (*connect.Response[v1.JoinResponse], error) {
	c, err := anyHost(ctx)
	if err != nil {
		return nil, err
	}
	var body v1.JoinBody
	if err := unmarshal(req.Msg.GetBody(), &body); err != nil {
		return nil, malformed(err)
	}
	a := enroll.Application{Body: req.Msg.GetBody(), AKPublic: body.GetAkPublic(), TLSPublic: body.GetTlsPublic(), Token: body.GetToken(), Hostname: body.GetHostname(), Issuers: body.GetIssuers()}
	for _, ek := range body.GetEndorsementKeys() {
		a.EKs = append(a.EKs, tpm.EK{Public: ek.GetPublic(), Certificate: ek.GetCertificate()})
	}
	ch, err := s.Admission.Begin(ctx, c.challenge, a)
	if err != nil {
		return nil, s.admissionError(ctx, err)
	}
	first := ch.Keys[0]
	out := &v1.JoinResponse{CredentialBlob: first.CredentialBlob, EncryptedSecret: first.EncryptedSecret, Nonce: ch.Nonce[:], EndorsementKey: uint32(first.EK)}
	for _, k := range ch.Keys[1:] {
		out.Others = append(out.Others, &v1.EndorsementChallenge{EndorsementKey: uint32(k.EK), CredentialBlob: k.CredentialBlob, EncryptedSecret: k.EncryptedSecret})
	}
	return connect.NewResponse(out), nil
}

// Activate finishes what Join began on the same connection.
func (s *Hosts) Activate(ctx context.Context, req *connect.Request[v1.ActivateRequest]) (*connect.Response[v1.ActivateResponse], error) {
	c, err := anyHost(ctx)
	if err != nil {
		return nil, err
	}
	quote, err := quoteOf(req.Msg.GetQuote())
	if err != nil {
		return nil, malformed(err)
	}
	r, err := s.Admission.Finish(ctx, c.challenge, enroll.Answer{
		Secrets:       append([][]byte{req.Msg.GetSecret()}, req.Msg.GetOtherSecrets()...),
		Certification: tpm.Certification{Attest: req.Msg.GetCertification().GetAttest(), Signature: req.Msg.GetCertification().GetSignature()},
		Quote:         quote,
	}, requestID(ctx))
	if err != nil {
		return nil, s.admissionError(ctx, err)
	}
	out := &v1.ActivateResponse{HostId: r.Host.ID, Pending: r.Pending, TrustDomain: s.TrustDomain, AuditKey: s.Audit.VerifierKey()}
	if !r.Pending {
		out.Certificate = [][]byte{r.Certificate, s.CA}
		if out.Checkpoint, err = s.checkpoint(ctx, nil, r.Host.ID); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(out), nil
}

// Challenge opens nonces.
func (s *Hosts) Challenge(ctx context.Context, req *connect.Request[v1.ChallengeRequest]) (*connect.Response[v1.ChallengeResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	nonces, known, err := s.Credentials.Challenge(ctx, c.challenge, int(min(req.Msg.GetCount(), 16)))
	if err != nil {
		return nil, err
	}
	boot, logs, offset := known.Resume()
	out := &v1.ChallengeResponse{Known: &v1.Known{BootId: boot, ImaOffset: uint64(offset)}, ProgramVersion: process.Version}
	if !logs.IsZero() {
		out.Known.EventLogSha256 = logs[:]
	}
	for _, n := range nonces {
		out.Nonces = append(out.Nonces, n[:])
	}
	return connect.NewResponse(out), nil
}

// Prove proves host and leases again.
func (s *Hosts) Prove(ctx context.Context, req *connect.Request[v1.ProveRequest]) (*connect.Response[v1.ProveResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	var body v1.ProveBody
	e, err := evidenceOf(ctx, req.Msg.GetAttested(), &body, func() *v1.HostFacts { return body.GetHost() })
	if err != nil {
		return nil, malformed(err)
	}
	if n := len(body.GetContinuation()); n > api.MaxContinuation {
		return nil, malformed(fmt.Errorf("continuation: %d bytes; at most %d are read", n, api.MaxContinuation))
	}
	p := hostapi.Proof{Evidence: e, Certificate: c.leaf, Continuation: body.GetContinuation()}
	for _, l := range body.GetLeases() {
		p.Leases = append(p.Leases, hostapi.LeaseProof{Lease: l.GetLeaseId(), Scope: l.GetScope(), Program: l.GetProgram(), Ticket: l.GetTicket()})
	}
	proven, err := s.Credentials.Prove(ctx, c.challenge, p, requestID(ctx))
	if err != nil {
		return nil, err
	}
	out := &v1.ProveResponse{HostState: string(inventory.Trusted), ProveBy: stamp(proven.ProveBy), Now: stamp(s.Now()), Continuation: proven.Continuation}
	for _, v := range proven.Verdicts {
		out.Leases = append(out.Leases, &v1.LeaseVerdict{LeaseId: v.Lease, Outcome: v.Outcome, Reason: v.Reason, ProveBy: stamp(v.ProveBy), Expires: stamp(v.Expires)})
	}
	if proven.Certificate != nil {
		out.Certificate = [][]byte{proven.Certificate, s.CA}
	}
	if out.Checkpoint, err = s.checkpoint(ctx, req.Msg.GetCheckpoint(), proven.Host.ID); err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// checkpoint answers with the log's head, proven to follow the one shown.
func (s *Hosts) checkpoint(ctx context.Context, shown []byte, host string) (*v1.Checkpoint, error) {
	var since int64
	if len(shown) > 0 {
		var err error
		since, err = s.Audit.Shown(ctx, shown, "host:"+host, s.Now())
		if err != nil && !errors.Is(err, audit.ErrNotOurs) {
			return nil, err
		}
	}
	signed, proof, err := s.Audit.Head(ctx, since)
	if err != nil {
		return nil, err
	}
	acknowledged, err := s.Audit.Acknowledged(ctx)
	return &v1.Checkpoint{Note: signed, Consistency: proof, Acknowledged: acknowledged}, err
}

// Issue asks for a credential.
func (s *Hosts) Issue(ctx context.Context, req *connect.Request[v1.IssueRequest]) (*connect.Response[v1.IssueResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	var body v1.IssueBody
	e, err := evidenceOf(ctx, req.Msg.GetAttested(), &body, func() *v1.HostFacts { return body.GetHost() })
	if err != nil {
		return nil, malformed(err)
	}
	issued, err := s.Credentials.Issue(ctx, c.challenge, hostapi.Order{
		Evidence: e, Scope: body.GetScope(), Program: body.GetProgram(), CSR: body.GetCsr(), Replaces: body.GetReplaces(),
		DeliveryID: body.GetDeliveryId(), BeforeStart: body.GetBeforeStart(), HandOver: body.GetHandOver(),
	}, requestID(ctx))
	if err != nil {
		return nil, err
	}
	if issued.Observe {
		return connect.NewResponse(&v1.IssueResponse{Observe: true, Now: stamp(s.Now())}), nil
	}
	g := issued.Lease
	out := &v1.IssueResponse{LeaseId: g.ID, Expires: stamp(g.Expires), ProveBy: stamp(g.ProveBy), ReplaceAt: stamp(issued.ReplaceAt),
		AcknowledgeBy: stamp(g.Issued.Add(issue.ProvisionalFor)), Ticket: issued.Ticket, Now: stamp(s.Now())}
	for _, f := range issued.Fields {
		out.Fields = append(out.Fields, &v1.SecretField{Name: f.Name, Value: f.Value.Reveal()})
	}
	return connect.NewResponse(out), nil
}

// Acknowledge makes a delivered credential live.
func (s *Hosts) Acknowledge(ctx context.Context, req *connect.Request[v1.AcknowledgeRequest]) (*connect.Response[v1.AcknowledgeResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	g, err := s.Credentials.Acknowledge(ctx, c.challenge, req.Msg.GetLeaseId(), req.Msg.GetDeliveryId(), requestID(ctx))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.AcknowledgeResponse{Expires: stamp(g.Expires), Now: stamp(s.Now())}), nil
}

// maxRelease bounds one call; the agent sends the rest in another.
const maxRelease = 256

// Release gives leases back.
func (s *Hosts) Release(ctx context.Context, req *connect.Request[v1.ReleaseRequest]) (*connect.Response[v1.ReleaseResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	ids := req.Msg.GetLeaseIds()
	confirmed, err := s.Credentials.Release(ctx, c.challenge, ids[:min(len(ids), maxRelease)], req.Msg.GetReason(), requestID(ctx))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ReleaseResponse{Confirmed: confirmed}), nil
}

// maxOpens bounds one call.
const maxOpens = 16

// Witness takes what a host saw of its credentials' files.
func (s *Hosts) Witness(ctx context.Context, req *connect.Request[v1.WitnessRequest]) (*connect.Response[v1.WitnessResponse], error) {
	c, err := hostConn(ctx)
	if err != nil {
		return nil, err
	}
	list := req.Msg.GetOpens()
	if len(list) > maxOpens {
		return nil, malformed(fmt.Errorf("%d opens; at most %d are taken", len(list), maxOpens))
	}
	opens := make([]hostapi.Open, len(list))
	for i, o := range list {
		opens[i] = hostapi.Open{Lease: o.GetLeaseId(), Opened: event.Opened{
			Time: moment(valid(o.GetTime())), Path: o.GetPath(), PID: o.GetPid(), Exe: o.GetExe(), User: o.GetUser(), Unit: o.GetUnit()}}
	}
	if err := s.Credentials.Witness(ctx, c.challenge, opens, requestID(ctx)); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.WitnessResponse{}), nil
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func quoteOf(q *v1.Quote) (tpm.Quote, error) {
	out := tpm.Quote{Attest: q.GetAttest(), Signature: q.GetSignature()}
	if len(q.GetPcrs()) > 64 {
		return out, errors.New("a quote has at most 24 PCRs")
	}
	for _, p := range q.GetPcrs() {
		if len(p.GetSha256()) != 32 {
			return out, errors.New("a PCR of the SHA-256 bank has 32 bytes")
		}
		out.PCRs = append(out.PCRs, tpm.PCR{Index: int(p.GetIndex()), SHA256: [32]byte(p.GetSha256())})
	}
	return out, nil
}

func evidenceOf(ctx context.Context, a *v1.Attested, body proto.Message, host func() *v1.HostFacts) (hostapi.Evidence, error) {
	if err := unmarshal(a.GetBody(), body); err != nil {
		return hostapi.Evidence{}, err
	}
	for what, text := range map[string]string{"os": host().GetOs(), "boot_id": host().GetBootId()} {
		if len(text) > maxFact || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return hostapi.Evidence{}, fmt.Errorf("%s: more than %d bytes, or not printable", what, maxFact)
		}
	}
	quote, err := quoteOf(a.GetQuote())
	return hostapi.Evidence{Body: a.GetBody(), Nonce: a.GetNonce(), Quote: quote, Boot: host().GetBootId(), OS: host().GetOs(), Logs: logsOf(a.GetLogs(), longLogsOf(ctx))}, err
}

// logsOf puts together what was decoded and what was too long for that.
func logsOf(l *v1.Logs, long longLogs) appraise.Logs {
	if len(l.GetEventLog())+len(l.GetUserspaceLog())+len(l.GetIma()) > 0 {
		long = longLogs{event: l.GetEventLog(), userspace: l.GetUserspaceLog(), ima: l.GetIma()} // they were short
	}
	return appraise.Logs{Event: long.event, Userspace: long.userspace, EventKnown: l.GetEventLogKnown(),
		IMA: long.ima, IMAOffset: int(min(l.GetImaOffset(), math.MaxInt32)), IMAPresent: l.GetImaPresent()}
}

func malformed(err error) *api.Error {
	return api.NewError(api.Fault, "request", "the request can't be read: "+err.Error())
}

// admissionError tells a joining host what it did wrong, which is nobody
// else's secret.
func (s *Hosts) admissionError(ctx context.Context, err error) error {
	e := api.NewError(api.Fault, "join", "")
	var rejected *evidence.Rejected
	switch {
	case errors.As(err, &rejected):
		e.Outcome, e.Check, e.Message = api.Rejected, string(rejected.Check), rejected.Detail
	case errors.Is(err, inventory.ErrToken):
		e.Outcome, e.Check, e.Message = api.Refused, "join-token", inventory.ErrToken.Error()
	case errors.Is(err, enroll.ErrRemoved):
		e.Outcome, e.Check, e.Message = api.Rejected, "host-removed", err.Error()
	case errors.Is(err, enroll.ErrQuarantined):
		e.Outcome, e.Check, e.Message = api.Rejected, "host-quarantined", err.Error()
	case errors.Is(err, enroll.ErrTwoHosts):
		e.Outcome, e.Check, e.Message = api.Refused, "two-hosts", err.Error()
	case errors.Is(err, enroll.ErrUncertified):
		e.Outcome, e.Check, e.Message = api.Refused, "ek-uncertified", err.Error()
	case errors.Is(err, denials.ErrHeld):
		e.Check, e.Message = api.CheckHeld, err.Error()
	case errors.Is(err, enroll.ErrOften):
		e.Check, e.Message = "host-budget", err.Error()
	case errors.Is(err, enroll.ErrPendingFull):
		e.Check, e.Message = "pending-full", err.Error()
	default:
		return err
	}
	s.Credentials.Log.Warn("join refused", "check", e.Check, "err", err, "address", addressOf(ctx), "request", requestID(ctx))
	return e
}

func addressOf(ctx context.Context) string {
	c := connOf(ctx)
	if c.challenge == nil {
		return net.IPv4zero.String()
	}
	return c.challenge.Address
}
