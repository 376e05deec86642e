// Package fakebroker is a broker as the watch sees one: leases that are issued, canaries,
// and the findings that it is told. It checks nothing, and keeps everything in memory.
package fakebroker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

// A Broker serves until Close is called.
type Broker struct {
	countersignv1connect.UnimplementedOperatorServiceHandler

	// OnFinding is called with each finding that is told, before it is kept. An error is
	// the answer.
	OnFinding func(context.Context, *v1.Finding) error
	// OnCheckpoint is called when the size of the log is asked for.
	OnCheckpoint func(context.Context) error

	server *http.Server
	url    string

	mu       sync.Mutex
	leases   map[string]*v1.Lease
	records  [][]byte
	grew     chan struct{} // closed when records do
	findings map[string]*v1.Finding
}

// Start serves on a port of this machine.
func Start() (*Broker, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &Broker{url: "http://" + l.Addr().String(), leases: map[string]*v1.Lease{}, grew: make(chan struct{}), findings: map[string]*v1.Finding{}}
	mux := http.NewServeMux()
	mux.Handle(countersignv1connect.NewOperatorServiceHandler(b))
	b.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = b.server.Serve(l) }()
	return b, nil
}

// Close ends it, with all connections.
func (b *Broker) Close() { _ = b.server.Close() }

// Dial connects to it as the watch does.
func (b *Broker) Dial(context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
	t := &http.Transport{}
	return countersignv1connect.NewOperatorServiceClient(&http.Client{Transport: t}, b.url), t.CloseIdleConnections, nil
}

// Issue makes a lease known, as the broker's log does.
func (b *Broker) Issue(l *v1.Lease) error {
	if len(l.GetSubject()) == 0 {
		l.Subject = []byte("{}")
	}
	record, err := json.Marshal(map[string]any{"time": time.Now(), "kind": "lease.issued", "lease": l.GetId()})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leases[l.GetId()] = l
	b.records = append(b.records, record)
	close(b.grew)
	b.grew = make(chan struct{})
	return nil
}

// Findings are those that were told, by detector and account.
func (b *Broker) Findings() map[string]*v1.Finding {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := map[string]*v1.Finding{}
	for _, f := range b.findings {
		out[f.GetDetector()+" "+f.GetAccount()] = f
	}
	return out
}

// GetStatus says that nothing was ever restored.
func (b *Broker) GetStatus(context.Context, *connect.Request[v1.GetStatusRequest]) (*connect.Response[v1.GetStatusResponse], error) {
	return connect.NewResponse(&v1.GetStatusResponse{Epoch: 1}), nil
}

// AuditCheckpoint has the size of the log, and no signature.
func (b *Broker) AuditCheckpoint(ctx context.Context, _ *connect.Request[v1.AuditCheckpointRequest]) (*connect.Response[v1.AuditCheckpointResponse], error) {
	if b.OnCheckpoint != nil {
		if err := b.OnCheckpoint(ctx); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return connect.NewResponse(&v1.AuditCheckpointResponse{Checkpoint: fmt.Appendf(nil, "fake\n%d\n", len(b.records))}), nil
}

// ListLeases lists all leases, or one.
func (b *Broker) ListLeases(_ context.Context, r *connect.Request[v1.ListLeasesRequest]) (*connect.Response[v1.ListLeasesResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if id := r.Msg.GetLease(); id != "" {
		if b.leases[id] == nil {
			return nil, connect.NewError(connect.CodeNotFound, errors.New("no such lease"))
		}
		return connect.NewResponse(&v1.ListLeasesResponse{Leases: []*v1.Lease{b.leases[id]}}), nil
	}
	a := &v1.ListLeasesResponse{}
	for _, l := range b.leases {
		a.Leases = append(a.Leases, l)
	}
	return connect.NewResponse(a), nil
}

// ListCanaries lists none.
func (b *Broker) ListCanaries(context.Context, *connect.Request[v1.ListCanariesRequest]) (*connect.Response[v1.ListCanariesResponse], error) {
	return connect.NewResponse(&v1.ListCanariesResponse{}), nil
}

// ReadAudit sends the log, and what comes to it.
func (b *Broker) ReadAudit(ctx context.Context, r *connect.Request[v1.ReadAuditRequest], s *connect.ServerStream[v1.AuditRecord]) error {
	for next := r.Msg.GetFrom(); ; {
		b.mu.Lock()
		records, grew := slices.Clone(b.records[min(next, uint64(len(b.records))):]), b.grew
		b.mu.Unlock()
		for _, text := range records {
			if err := s.Send(&v1.AuditRecord{Index: next, Json: text}); err != nil {
				return err
			}
			next++
		}
		select {
		case <-grew:
		case <-ctx.Done():
			return nil
		}
	}
}

// ReportFinding keeps a finding, by its cause.
func (b *Broker) ReportFinding(ctx context.Context, r *connect.Request[v1.ReportFindingRequest]) (*connect.Response[v1.ReportFindingResponse], error) {
	f := r.Msg.GetFinding()
	if b.OnFinding != nil {
		if err := b.OnFinding(ctx, f); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.findings[f.GetDetector()+" "+f.GetCause()] = f
	return connect.NewResponse(&v1.ReportFindingResponse{}), nil
}

// Lease is a lease of a database account, for a day from issued.
func Lease(id, account, source string, issued time.Time) *v1.Lease {
	return &v1.Lease{Id: id, Host: "host", Scope: "billing", Kind: "vault", Names: map[string]string{"db_username": account, "vault_lease": "database/creds/billing/" + id},
		Sources: []string{source}, Issued: timestamppb.New(issued), Expires: timestamppb.New(issued.Add(24 * time.Hour))}
}
