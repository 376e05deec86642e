package server

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/canary"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// Operators handles OperatorService.
type Operators struct {
	Desk     *admin.Desk
	BrokerID string
	Version  string
	Alarms   func(context.Context) []string
	Vault    func() string // how the broker stands with Vault, in words
}

// actor is the operator on this connection.
func (s *Operators) actor(ctx context.Context) (admin.Actor, error) {
	c := connOf(ctx)
	switch c.kind {
	case localPeer:
		return admin.Actor{Name: "root", Role: admin.Admin, Request: requestID(ctx)}, nil
	case operatorPeer:
		a, err := s.Desk.ActorByKey(ctx, c.challenge.KeySPKI)
		if err != nil {
			return a, connect.NewError(connect.CodePermissionDenied, err)
		}
		a.Request = requestID(ctx)
		return a, nil
	case endedOperatorPeer:
		return admin.Actor{}, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("operator %s's certificate ended at %s by the broker's clock: %s",
			c.leaf.Subject.CommonName, c.leaf.NotAfter.UTC().Format(time.RFC3339), api.MendOperator(c.leaf.Subject.CommonName)))
	}
	return admin.Actor{}, connect.NewError(connect.CodePermissionDenied, errors.New("this call is for operators"))
}

func operatorError(err error) error {
	var bad *admin.InvalidError
	var c *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &c):
		return err
	case errors.Is(err, admin.ErrForbidden):
		return connect.NewError(connect.CodePermissionDenied, err)
	case errors.Is(err, store.ErrSlow):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.As(err, &bad):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, inventory.ErrUnknown), errors.Is(err, inventory.ErrNoReference), errors.Is(err, journal.ErrUnknown),
		errors.Is(err, findings.ErrUnknown), errors.Is(err, canary.ErrUnknown):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, findings.ErrFull):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, inventory.ErrTaken):
		return connect.NewError(connect.CodeAlreadyExists, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

// serve runs one call for the connection's operator.
func serve[Out any](ctx context.Context, s *Operators, call func(admin.Actor) (*Out, error)) (*connect.Response[Out], error) {
	a, err := s.actor(ctx)
	if err != nil {
		return nil, err
	}
	out, err := call(a)
	if err != nil {
		return nil, operatorError(err)
	}
	return connect.NewResponse(out), nil
}

// GetStatus counts hosts and leases.
func (s *Operators) GetStatus(ctx context.Context, _ *connect.Request[v1.GetStatusRequest]) (*connect.Response[v1.GetStatusResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.GetStatusResponse, error) {
		st, err := s.Desk.Status(ctx, a)
		return &v1.GetStatusResponse{BrokerId: s.BrokerID, Version: s.Version, PolicyVersion: uint64(st.Policy), Epoch: uint64(st.Epoch),
			Hosts: st.Hosts, Leases: st.Leases, Findings: st.Findings, Alarms: s.Alarms(ctx), Vault: s.Vault()}, err
	})
}

func hostMessage(h inventory.Host) *v1.Host {
	m := &v1.Host{Id: h.ID, Name: h.Name, State: string(h.State), StateReason: h.Reason, Tier: h.Tier, Labels: h.Labels, Reference: h.Reference,
		Address: h.Address, Created: stamp(h.Created), LastProved: stamp(h.LastProved), Reenrolling: h.Reenrolling}
	if len(h.AKPublic) > 0 {
		m.AkName = evidence.Sum(h.AKPublic).String()
	}
	for _, ek := range h.EKs {
		m.EkHashes = append(m.EkHashes, ek.String())
	}
	if h.Unreadable != nil {
		m.StateReason = h.Unreadable.Error()
	}
	return m
}

// Pages of lists: the rows of one answer, unless a request asks for fewer.
const (
	hostPage      = 500
	leasePage     = 500
	referencePage = 100
	findingPage   = 200 // each may have 80 KiB
)

// rows is how many rows an answer has at most.
func rows(asked uint32, page int) int {
	if asked == 0 || asked > uint32(page) {
		return page
	}
	return int(asked)
}

// placeError is for a page token that no answer gave.
func placeError(err error) error { return &admin.InvalidError{Reason: err.Error()} }

// ListHosts lists hosts in pages, or shows one.
func (s *Operators) ListHosts(ctx context.Context, req *connect.Request[v1.ListHostsRequest]) (*connect.Response[v1.ListHostsResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListHostsResponse, error) {
		m, out := req.Msg, &v1.ListHostsResponse{}
		if m.GetHost() != "" {
			h, err := s.Desk.Host(ctx, a, m.GetHost())
			out.Hosts = append(out.Hosts, hostMessage(h))
			return out, err
		}
		after, err := parsePlace[inventory.Cursor](m.GetAfter())
		if err != nil {
			return nil, placeError(err)
		}
		hosts, next, more, err := s.Desk.Hosts(ctx, a, admin.HostFilter{Selector: m.GetSelector(), State: m.GetState(), Sort: m.GetSort(), After: after, Limit: rows(m.GetLimit(), hostPage)})
		for _, h := range hosts {
			out.Hosts = append(out.Hosts, hostMessage(h))
		}
		if more {
			out.Next = place(next)
		}
		return out, err
	})
}

// place is a page token: where a list goes on, as JSON in base64.
func place(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // texts and numbers
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func parsePlace[T any](token string) (at T, err error) {
	if token == "" {
		return at, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		err = json.Unmarshal(b, &at)
	}
	if err != nil {
		return at, fmt.Errorf("%.80q is no place in this list: begin again without it", token)
	}
	return at, nil
}

// AddHosts registers hosts.
func (s *Operators) AddHosts(ctx context.Context, req *connect.Request[v1.AddHostsRequest]) (*connect.Response[v1.AddHostsResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.AddHostsResponse, error) {
		var hosts []admin.NewHost
		for _, h := range req.Msg.GetHosts() {
			hosts = append(hosts, admin.NewHost{Name: h.GetName(), EKs: h.GetEkHashes(), Labels: h.GetLabels(), Reference: h.GetReference()})
		}
		ids, problems, err := s.Desk.AddHosts(ctx, a, hosts, req.Msg.GetDryRun())
		return &v1.AddHostsResponse{Ids: ids, Problems: problems}, err
	})
}

// ChangeHost does one act on a host.
func (s *Operators) ChangeHost(ctx context.Context, req *connect.Request[v1.ChangeHostRequest]) (*connect.Response[v1.ChangeHostResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ChangeHostResponse, error) {
		m := req.Msg
		h, n, err := s.Desk.ChangeHost(ctx, a, m.GetHost(), admin.Change{Action: m.GetAction(), SetLabels: m.GetSetLabels(), DropLabels: m.GetDropLabels(),
			Reference: m.GetReference(), Reason: m.GetReason()})
		return &v1.ChangeHostResponse{Host: hostMessage(h), LeasesRevoked: uint32(n)}, err
	})
}

// CreateJoinToken makes a join token.
func (s *Operators) CreateJoinToken(ctx context.Context, req *connect.Request[v1.CreateJoinTokenRequest]) (*connect.Response[v1.CreateJoinTokenResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.CreateJoinTokenResponse, error) {
		m := req.Msg
		expires := m.GetExpires().AsTime()
		token, err := s.Desk.CreateToken(ctx, a, inventory.JoinToken{Name: m.GetName(), Labels: m.GetLabels(), Reference: m.GetReference(), Expires: expires})
		return &v1.CreateJoinTokenResponse{Token: string(token.Reveal()), Expires: stamp(expires)}, err
	})
}

// AddOperator certifies an operator's key.
func (s *Operators) AddOperator(ctx context.Context, req *connect.Request[v1.AddOperatorRequest]) (*connect.Response[v1.AddOperatorResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.AddOperatorResponse, error) {
		role, err := admin.ParseRole(req.Msg.GetRole())
		if err != nil {
			return nil, &admin.InvalidError{Reason: err.Error()}
		}
		der, err := s.Desk.AddOperator(ctx, a, req.Msg.GetName(), role, req.Msg.GetCsr(), moment(req.Msg.GetExpires()))
		return &v1.AddOperatorResponse{Certificate: [][]byte{der, s.Desk.OperatorCA.Certificate.Raw}}, err
	})
}

// ListOperators lists who may call from outside.
func (s *Operators) ListOperators(ctx context.Context, _ *connect.Request[v1.ListOperatorsRequest]) (*connect.Response[v1.ListOperatorsResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListOperatorsResponse, error) {
		list, err := s.Desk.Operators(ctx, a)
		out := &v1.ListOperatorsResponse{}
		for _, o := range list {
			out.Operators = append(out.Operators, &v1.Operator{Name: o.Name, Role: o.Role, KeySha256: o.Key, Created: stamp(o.Created), Expires: stamp(o.Expires)})
		}
		return out, err
	})
}

// RemoveOperator revokes an operator's access at once.
func (s *Operators) RemoveOperator(ctx context.Context, req *connect.Request[v1.RemoveOperatorRequest]) (*connect.Response[v1.RemoveOperatorResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.RemoveOperatorResponse, error) {
		return &v1.RemoveOperatorResponse{}, s.Desk.RemoveOperator(ctx, a, req.Msg.GetName())
	})
}

// AcknowledgeRestore has an operator stand for the log's epoch, and the broker issue again.
func (s *Operators) AcknowledgeRestore(ctx context.Context, req *connect.Request[v1.AcknowledgeRestoreRequest]) (*connect.Response[v1.AcknowledgeRestoreResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.AcknowledgeRestoreResponse, error) {
		held, epoch, err := s.Desk.AcknowledgeRestore(ctx, a, req.Msg.GetReason())
		return &v1.AcknowledgeRestoreResponse{Held: held, Epoch: epoch}, err
	})
}

// RenewOperator gives who calls a new certificate.
func (s *Operators) RenewOperator(ctx context.Context, req *connect.Request[v1.RenewOperatorRequest]) (*connect.Response[v1.RenewOperatorResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.RenewOperatorResponse, error) {
		c := connOf(ctx)
		if c.kind != operatorPeer {
			return nil, &admin.InvalidError{Reason: "root on the local socket has no certificate to renew"}
		}
		der, err := s.Desk.RenewOperator(ctx, a, c.challenge.KeySPKI, c.leaf, req.Msg.GetCsr())
		return &v1.RenewOperatorResponse{Certificate: [][]byte{der, s.Desk.OperatorCA.Certificate.Raw}}, err
	})
}

func (s *Operators) referenceMessage(r inventory.Reference) *v1.Reference {
	return &v1.Reference{Name: r.Name, Version: uint64(r.Version), Content: r.Content, LearnedFrom: r.LearnedFrom, Created: stamp(r.Created),
		State: r.State(s.Desk.Now()), Until: stamp(r.Ends)}
}

// AddReference takes a draft that was written by hand.
func (s *Operators) AddReference(ctx context.Context, req *connect.Request[v1.AddReferenceRequest]) (*connect.Response[v1.AddReferenceResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.AddReferenceResponse, error) {
		r, err := s.Desk.AddReference(ctx, a, req.Msg.GetName(), req.Msg.GetContent())
		return &v1.AddReferenceResponse{Reference: s.referenceMessage(r)}, err
	})
}

// ApproveReference puts a version in force.
func (s *Operators) ApproveReference(ctx context.Context, req *connect.Request[v1.ApproveReferenceRequest]) (*connect.Response[v1.ApproveReferenceResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ApproveReferenceResponse, error) {
		r, err := s.Desk.ApproveReference(ctx, a, req.Msg.GetName(), int64(req.Msg.GetVersion()), moment(req.Msg.GetOlderUntil()))
		return &v1.ApproveReferenceResponse{Reference: s.referenceMessage(r)}, err
	})
}

// MaintainReference lets be what a set's file rules don't allow.
func (s *Operators) MaintainReference(ctx context.Context, req *connect.Request[v1.MaintainReferenceRequest]) (*connect.Response[v1.MaintainReferenceResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.MaintainReferenceResponse, error) {
		return &v1.MaintainReferenceResponse{}, s.Desk.Maintain(ctx, a, req.Msg.GetName(), moment(req.Msg.GetUntil()))
	})
}

// AddRelease expects what a build announced.
func (s *Operators) AddRelease(ctx context.Context, req *connect.Request[v1.AddReleaseRequest]) (*connect.Response[v1.AddReleaseResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.AddReleaseResponse, error) {
		r := inventory.Release{Name: req.Msg.GetName(), Source: req.Msg.GetSource()}
		for _, f := range req.Msg.GetFiles() {
			r.Files = append(r.Files, inventory.ReleaseFile{Path: f.GetPath(), Digest: f.GetDigest()})
		}
		r, err := s.Desk.AddRelease(ctx, a, r, moment(req.Msg.GetOlderUntil()))
		return &v1.AddReleaseResponse{Release: releaseMessage(r.Size())}, err
	})
}

// ListReleases lists versions of releases.
func (s *Operators) ListReleases(ctx context.Context, req *connect.Request[v1.ListReleasesRequest]) (*connect.Response[v1.ListReleasesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListReleasesResponse, error) {
		list, err := s.Desk.Releases(ctx, a, req.Msg.GetName())
		out := &v1.ListReleasesResponse{}
		for _, r := range list {
			out.Releases = append(out.Releases, releaseMessage(r))
		}
		return out, err
	})
}

func releaseMessage(r inventory.ReleaseSize) *v1.Release {
	return &v1.Release{Name: r.Name, Version: uint64(r.Version), Source: r.Source, Files: uint32(r.Files), Added: stamp(r.Added), Until: stamp(r.Ends)}
}

// moment is a time that was sent; zero: none was.
func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// LearnReference makes a reference set of what a host last quoted.
func (s *Operators) LearnReference(ctx context.Context, req *connect.Request[v1.LearnReferenceRequest]) (*connect.Response[v1.LearnReferenceResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.LearnReferenceResponse, error) {
		var pcrs []int
		for _, i := range req.Msg.GetPcrs() {
			pcrs = append(pcrs, int(i))
		}
		r, err := s.Desk.LearnReference(ctx, a, req.Msg.GetName(), req.Msg.GetHost(), pcrs)
		return &v1.LearnReferenceResponse{Reference: s.referenceMessage(r)}, err
	})
}

// ListReferences lists versions of reference sets in pages.
func (s *Operators) ListReferences(ctx context.Context, req *connect.Request[v1.ListReferencesRequest]) (*connect.Response[v1.ListReferencesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListReferencesResponse, error) {
		m, out := req.Msg, &v1.ListReferencesResponse{}
		after, err := parsePlace[inventory.ReferencePlace](m.GetAfter())
		if err != nil {
			return nil, placeError(err)
		}
		list, more, err := s.Desk.References(ctx, a, inventory.ReferenceFilter{Name: m.GetName(), Version: int64(min(m.GetVersion(), math.MaxInt64)), After: after,
			Limit: rows(m.GetLimit(), referencePage)})
		for _, r := range list {
			out.References = append(out.References, s.referenceMessage(r))
		}
		if more {
			last := list[len(list)-1]
			out.Next = place(inventory.ReferencePlace{Name: last.Name, Version: last.Version})
		}
		return out, err
	})
}

// ApplyScopes applies or plans a whole set.
func (s *Operators) ApplyScopes(ctx context.Context, req *connect.Request[v1.ApplyScopesRequest]) (*connect.Response[v1.ApplyScopesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ApplyScopesResponse, error) {
		var files []policy.File
		for _, f := range req.Msg.GetFiles() {
			files = append(files, policy.File{Name: f.GetName(), Content: f.GetContent()})
		}
		p, err := s.Desk.Apply(ctx, a, files, req.Msg.GetPlanOnly())
		if err != nil {
			return nil, err
		}
		out := &v1.ApplyScopesResponse{Version: uint64(p.Version), Keeps: p.Keeps, Loses: p.Loses}
		for _, c := range p.Scopes {
			out.Changes = append(out.Changes, &v1.ScopeChange{Scope: c.Scope, Change: c.Change})
		}
		for _, l := range p.Losses {
			out.Leases = append(out.Leases, &v1.LeaseChange{Host: l.Host, Scope: l.Scope, LeaseId: l.Lease, Change: "loses", Reason: l.Reason})
		}
		return out, nil
	})
}

// Facts shows what was last appraised of a host.
func (s *Operators) Facts(ctx context.Context, req *connect.Request[v1.FactsRequest]) (*connect.Response[v1.FactsResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.FactsResponse, error) {
		facts, err := s.Desk.Facts(ctx, a, req.Msg.GetHost(), req.Msg.GetScope())
		return &v1.FactsResponse{Json: facts}, err
	})
}

// Why explains a decision.
func (s *Operators) Why(ctx context.Context, req *connect.Request[v1.WhyRequest]) (*connect.Response[v1.WhyResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.WhyResponse, error) {
		r, err := s.Desk.Why(ctx, a, req.Msg.GetHost(), req.Msg.GetScope())
		out := &v1.WhyResponse{Allowed: r.Outcome == policy.Allowed, Outcome: string(r.Outcome), PolicyVersion: uint64(r.Policy), At: stamp(r.At), Reason: r.Reason}
		for _, sel := range r.Selectors {
			out.Selectors = append(out.Selectors, &v1.Selector{Name: sel.Name, Wanted: sel.Wanted, Saw: sel.Saw, Result: sel.Result})
		}
		for _, p := range r.PCRs {
			out.Pcrs = append(out.Pcrs, pcrMessage(p))
		}
		return out, err
	})
}

func pcrMessage(p boot.PCR) *v1.PCR {
	m := &v1.PCR{Index: uint32(p.Index), Events: uint64(p.Events), Proven: p.Proven, Understood: p.Understood, NotUnderstood: uint64(p.NotUnderstood), Facts: p.Facts}
	if l := p.Limit; l != nil {
		m.Limit = &v1.PCRLimit{Event: uint64(l.Event), Type: l.Type, Why: l.Why}
	}
	return m
}

func leaseMessage(g journal.Lease, hostName string) *v1.Lease {
	if g.Unreadable != nil {
		g.Reason = g.Unreadable.Error()
	}
	return &v1.Lease{Id: g.ID, Host: g.Host, HostName: hostName, Scope: g.Scope, Kind: g.Kind, State: string(g.State), Reason: g.Reason, Subject: g.Subject,
		Names: g.Names, Sources: g.Sources, Audience: g.Audience, Issued: stamp(g.Issued), Expires: stamp(g.Expires), Revoked: stamp(g.Ended), ProveBy: stamp(g.ProveBy),
		LastError: g.LastError, Attempts: uint32(g.Attempts), Release: g.Release,
		Machine: &v1.Machine{SecureBoot: g.Machine.SecureBoot, KernelCommandLine: g.Machine.CommandLine, Reference: g.Machine.Reference}}
}

// ListLeases lists leases by the time of issue, in pages.
func (s *Operators) ListLeases(ctx context.Context, req *connect.Request[v1.ListLeasesRequest]) (*connect.Response[v1.ListLeasesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListLeasesResponse, error) {
		m := req.Msg
		out := &v1.ListLeasesResponse{}
		if m.GetLease() != "" {
			g, err := s.Desk.Lease(ctx, a, m.GetLease())
			out.Leases = append(out.Leases, leaseMessage(g, ""))
			return out, err
		}
		after, err := journal.ParseCursor(m.GetAfter())
		if err != nil {
			return nil, placeError(err)
		}
		f := journal.Filter{Host: m.GetHost(), Scope: m.GetScope(), After: after, Newest: m.GetNewest(), Limit: rows(m.GetLimit(), leasePage)}
		switch {
		case m.GetState() != "":
			f.States = []journal.State{journal.State(m.GetState())}
		case !m.GetEnded():
			f.States = journal.Unended
		}
		list, names, err := s.Desk.List(ctx, a, f)
		for _, g := range list {
			out.Leases = append(out.Leases, leaseMessage(g, names[g.Host]))
		}
		if len(list) == f.Limit {
			out.Next = list[len(list)-1].Cursor().String()
		}
		return out, err
	})
}

// RevokeLeases ends leases.
func (s *Operators) RevokeLeases(ctx context.Context, req *connect.Request[v1.RevokeLeasesRequest]) (*connect.Response[v1.RevokeLeasesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.RevokeLeasesResponse, error) {
		m := req.Msg
		ids, err := s.Desk.Revoke(ctx, a, m.GetLeases(), m.GetHost(), m.GetScope(), m.GetReason())
		return &v1.RevokeLeasesResponse{Revoking: ids}, err
	})
}

// followEvery is how often a followed log is looked at.
const followEvery = 500 * time.Millisecond

// ReadAudit streams records, and goes on with new ones where asked to.
func (s *Operators) ReadAudit(ctx context.Context, req *connect.Request[v1.ReadAuditRequest], out *connect.ServerStream[v1.AuditRecord]) error {
	a, err := s.actor(ctx)
	if err != nil {
		return err
	}
	if a.Role < admin.Viewer {
		return operatorError(admin.ErrForbidden)
	}
	next := int64(req.Msg.GetFrom())
	const page = 500
	for {
		var records []*v1.AuditRecord
		err := s.Desk.Store.Report(ctx, func(tx *store.Tx) error {
			return audit.Read(tx, next, page, func(index int64, body []byte) error {
				records = append(records, &v1.AuditRecord{Index: uint64(index), Json: json.RawMessage(body)})
				return nil
			})
		})
		if err != nil {
			return operatorError(err)
		}
		for _, r := range records {
			if err := out.Send(r); err != nil {
				return err
			}
		}
		next += int64(len(records))
		if len(records) == page {
			continue
		}
		if !req.Msg.GetFollow() {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}

// AuditReceipt proves one record.
func (s *Operators) AuditReceipt(ctx context.Context, req *connect.Request[v1.AuditReceiptRequest]) (*connect.Response[v1.AuditReceiptResponse], error) {
	return serve(ctx, s, func(admin.Actor) (*v1.AuditReceiptResponse, error) {
		record, signed, proof, err := s.Desk.Audit.Receipt(ctx, int64(req.Msg.GetIndex()))
		if err != nil {
			err = &admin.InvalidError{Reason: err.Error()}
		}
		return &v1.AuditReceiptResponse{Record: record, Checkpoint: signed, Proof: proof}, err
	})
}

// AuditCheckpoint shows the signed head of the log.
func (s *Operators) AuditCheckpoint(ctx context.Context, req *connect.Request[v1.AuditCheckpointRequest]) (*connect.Response[v1.AuditCheckpointResponse], error) {
	return serve(ctx, s, func(admin.Actor) (*v1.AuditCheckpointResponse, error) {
		signed, proof, err := s.Desk.Audit.Head(ctx, int64(req.Msg.GetConsistentWith()))
		return &v1.AuditCheckpointResponse{Checkpoint: signed, Consistency: proof, VerifierKey: s.Desk.Audit.VerifierKey()}, err
	})
}
