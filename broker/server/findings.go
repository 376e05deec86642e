package server

import (
	"context"
	"encoding/json"
	"math"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/state/findings"
)

func findingMessage(f findings.Finding) *v1.Finding {
	m := &v1.Finding{Id: f.ID, Cause: f.Cause, Detector: f.Detector, Severity: string(f.Severity), Nhi: f.NHI, Lease: f.Lease, Host: f.Host, Account: f.Account,
		Why: f.Why, First: stamp(f.First), Last: stamp(f.Last), Count: uint64(f.Count), Response: f.Response, Status: string(f.Status), Reason: f.Reason,
		Until: stamp(f.Until), ClosedBy: f.ClosedBy, Opened: uint64(f.Opened)}
	for _, e := range f.Evidence {
		m.Evidence = append(m.Evidence, e)
	}
	if f.Unreadable != nil {
		m.Why = f.Unreadable.Error()
	}
	return m
}

// reported is the watch's part of a finding.
func reported(m *v1.Finding) findings.Finding {
	f := findings.Finding{Detector: m.GetDetector(), Cause: m.GetCause(), Severity: findings.Severity(m.GetSeverity()), Lease: m.GetLease(), Host: m.GetHost(),
		Account: m.GetAccount(), NHI: m.GetNhi(), Why: m.GetWhy(), Response: m.GetResponse(),
		First: moment(valid(m.GetFirst())), Last: moment(valid(m.GetLast())), Count: int64(min(m.GetCount(), math.MaxInt64))}
	for _, e := range m.GetEvidence() {
		f.Evidence = append(f.Evidence, json.RawMessage(e))
	}
	return f
}

// valid is t, or none where it is out of the range of times.
func valid(t *timestamppb.Timestamp) *timestamppb.Timestamp {
	if !t.IsValid() {
		return nil
	}
	return t
}

// ReportFinding enters what the watch found.
func (s *Operators) ReportFinding(ctx context.Context, req *connect.Request[v1.ReportFindingRequest]) (*connect.Response[v1.ReportFindingResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ReportFindingResponse, error) {
		f, outcome, err := s.Desk.Report(ctx, a, reported(req.Msg.GetFinding()), req.Msg.GetOver())
		return &v1.ReportFindingResponse{Finding: findingMessage(f), Opened: outcome == findings.New, Reopened: outcome == findings.Reopened}, err
	})
}

// ListFindings lists findings in the order of opening, in pages.
func (s *Operators) ListFindings(ctx context.Context, req *connect.Request[v1.ListFindingsRequest]) (*connect.Response[v1.ListFindingsResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListFindingsResponse, error) {
		m := req.Msg
		if m.GetFinding() != "" {
			f, err := s.Desk.Finding(ctx, a, m.GetFinding())
			return &v1.ListFindingsResponse{Findings: []*v1.Finding{findingMessage(f)}}, err
		}
		limit := rows(m.GetLimit(), findingPage)
		list, err := s.Desk.Findings(ctx, a, findings.Filter{Status: findings.Status(m.GetStatus()), Detector: m.GetDetector(), Host: m.GetHost(),
			Severity: findings.Severity(m.GetSeverity()), After: int64(min(m.GetAfter(), math.MaxInt64)), Newest: m.GetNewest(), Limit: limit})
		out := &v1.ListFindingsResponse{Next: m.GetAfter(), More: len(list) == limit}
		for _, f := range list {
			out.Findings = append(out.Findings, findingMessage(f))
			out.Next = uint64(f.Opened)
		}
		return out, err
	})
}

// CloseFinding closes a finding.
func (s *Operators) CloseFinding(ctx context.Context, req *connect.Request[v1.CloseFindingRequest]) (*connect.Response[v1.CloseFindingResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.CloseFindingResponse, error) {
		m := req.Msg
		f, err := s.Desk.CloseFinding(ctx, a, m.GetFinding(), m.GetReason(), moment(m.GetUntil()))
		return &v1.CloseFindingResponse{Finding: findingMessage(f)}, err
	})
}
