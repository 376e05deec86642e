package server

import (
	"context"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/state/canary"
)

func canaryMessage(c canary.Canary) *v1.Canary {
	return &v1.Canary{Id: c.ID, Scope: c.Scope, Username: c.Username, Audience: c.Audience, Issued: stamp(c.Issued), IssuedBy: c.By}
}

// IssueCanary makes a canary.
func (s *Operators) IssueCanary(ctx context.Context, req *connect.Request[v1.IssueCanaryRequest]) (*connect.Response[v1.IssueCanaryResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.IssueCanaryResponse, error) {
		c, err := s.Desk.IssueCanary(ctx, a, req.Msg.GetScope(), req.Msg.GetUsername())
		return &v1.IssueCanaryResponse{Canary: canaryMessage(c)}, err
	})
}

// ListCanaries lists canaries.
func (s *Operators) ListCanaries(ctx context.Context, req *connect.Request[v1.ListCanariesRequest]) (*connect.Response[v1.ListCanariesResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.ListCanariesResponse, error) {
		list, err := s.Desk.Canaries(ctx, a, req.Msg.GetScope())
		out := &v1.ListCanariesResponse{}
		for _, c := range list {
			out.Canaries = append(out.Canaries, canaryMessage(c))
		}
		return out, err
	})
}

// RemoveCanary removes a canary.
func (s *Operators) RemoveCanary(ctx context.Context, req *connect.Request[v1.RemoveCanaryRequest]) (*connect.Response[v1.RemoveCanaryResponse], error) {
	return serve(ctx, s, func(a admin.Actor) (*v1.RemoveCanaryResponse, error) {
		return &v1.RemoveCanaryResponse{}, s.Desk.RemoveCanary(ctx, a, req.Msg.GetCanary())
	})
}
