package main

import (
	"context"
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/ops/expiry"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// ends gathers what of a running broker ends by itself.
type ends struct {
	store   *store.Store
	hostCA  *x509.Certificate
	ekRoots []*x509.Certificate
	issuers []issue.Service
}

func (e ends) list(ctx context.Context, now time.Time) ([]expiry.End, error) {
	k := expiry.Known{HostCA: e.hostCA, EKRoots: e.ekRoots}
	for _, i := range e.issuers {
		k.Issuers = append(k.Issuers, i.Ends()...)
	}

	desk := admin.Desk{Store: e.store}
	operators, err := desk.Operators(ctx, admin.Actor{Name: "root", Role: admin.Viewer})
	if err != nil {
		return nil, err
	}
	for _, o := range operators {
		k.Operators = append(k.Operators, expiry.OperatorKey{Name: o.Name, Role: o.Role, Program: o.Role == admin.Responder.String(), Created: o.Created, Expires: o.Expires})
	}
	return expiry.List(k, now), nil
}

// lookTime bounds one look into the store.
const lookTime = 5 * time.Second

func (e ends) alarms(log *slog.Logger, now time.Time) []string {
	ctx, cancel := context.WithTimeout(context.Background(), lookTime)
	defer cancel()
	list, err := e.list(ctx, now)
	if err != nil {
		log.Error("what ends by itself is not known", "err", err)
		return []string{"what ends by itself is not known: " + err.Error()}
	}
	return expiry.Alarms(list, now)
}
