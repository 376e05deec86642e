package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/store"
)

func (r *rig) leases() *lease.Manager {
	return lease.New(r.store, map[string]issue.Issuer{Kind.Name: r.Issuer}, r.Log, r.now)
}

func request(delivery string, csr []byte) lease.Request {
	return lease.Request{DeliveryID: delivery, CSR: csr, ID: "r1", With: func(*store.Tx) error { return nil }}
}

// A certificate's whole life, as the broker leads it.
func TestLease(t *testing.T) {
	r := newRig(t)
	m := r.leases()
	key := newKey(t)
	g, c, err := m.Issue(t.Context(), decide(t, "billing-tls"), request("d1", newCSR(t, key, x509.CertificateRequest{})))
	check(t, err)
	leaf := parse(t, field(t, c, "certificate"))[0]
	if g.State != journal.Provisional || serialText(g.Ref) != leaf.SerialNumber.String() || !g.Expires.Equal(leaf.NotAfter) || g.Names["certificate_serial"] != serialText(g.Ref) {
		t.Errorf("lease %+v", g)
	}
	cause := lease.Cause{Actor: "test"}
	g = must(m.Event(t.Context(), g.ID, journal.Acknowledged{}, cause))(t)
	if g.State != journal.Live || !g.Expires.Equal(leaf.NotAfter) {
		t.Errorf("acknowledged: %s until %s", g.State, g.Expires)
	}
	g = must(m.Event(t.Context(), g.ID, journal.Revoke{Reason: "test"}, cause))(t)
	if g.State != journal.Gone {
		t.Errorf("revoked: %s, %s", g.State, g.LastError)
	}
	check(t, r.publish(t.Context()))
	if _, serials := r.listed(t); !slices.Equal(serials, []string{serialText(g.Ref)}) {
		t.Errorf("lists %v, want %s", serials, serialText(g.Ref))
	}
	// A bad request makes no lease.
	var wrong *issue.OrderError
	if g, _, err := m.Issue(t.Context(), decide(t, "billing-tls"), request("d2", []byte("bad"))); !errors.As(err, &wrong) || wrong.Part != "csr" || g.ID != "" {
		t.Errorf("a bad request: lease %q, %v", g.ID, err)
	}
	// What couldn't be signed ends its lease and is not on the CRL.
	r.ahead.Store(int64(lifetime))
	g, _, err = m.Issue(t.Context(), decide(t, "billing-tls"), request("d2", newCSR(t, key, x509.CertificateRequest{})))
	r.ahead.Store(0)
	fails(t, err, "billing-tls", "issuer's certificate ends")
	check(t, r.store.View(t.Context(), func(tx *store.Tx) (err error) { g, err = journal.Load(tx, g.ID); return err }))
	if g.State != journal.Gone {
		t.Errorf("of what was not signed: %s", g.State)
	}
	check(t, r.publish(t.Context()))
	if list, _ := r.listed(t); len(list.RevokedCertificateEntries) != 1 {
		t.Errorf("lists %d", len(list.RevokedCertificateEntries))
	}
}

// Intent, signature and outcome: two durable commits each, shared by those who
// wait at the same time.
func BenchmarkLease(b *testing.B) {
	r := newRig(b)
	m := r.leases()
	d, csr := decide(b, "billing-tls"), newCSR(b, newKey(b), x509.CertificateRequest{})
	var n atomic.Int64
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := m.Issue(b.Context(), d, request(fmt.Sprint(n.Add(1)), csr)); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certificates/s")
}
