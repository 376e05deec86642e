// Package fleet is hosts in numbers: each speaks the hosts' protocol from one
// process, with a TPM in software that the lab's CA certified. The broker they
// join is the real program, by its front door.
//
// Their keys sign in microseconds where a TPM takes its tenth of a second, so a
// fleet says what a broker bears, and nothing of hosts.
package fleet

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/lab"
)

const (
	atOnce  = 16 // hosts that act at a time, in Each
	exe     = "/opt/fleet/bin/fleetd"
	account = "fleet"
)

// Scope is one that every host of a fleet may have: an X.509 certificate.
const Scope = `
scope "fleet" {
  reprove = "30s"
  grace   = "10m"
  host { labels = { role = "fleet" } }
  process {
    user = "` + account + `"
    exe  = "` + exe + `"
  }
  certificate {
    dns     = ["fleet.example.com"]
    ttl     = "1h"
    overlap = "10m"
  }
}
`

// A Host is one of a fleet. One goroutine uses it at a time.
type Host struct {
	*lab.SoftHost
	Session *api.Session
	Lease   string // the last one that was acknowledged

	csr, program, ticket, checkpoint []byte
	pid                              int // of the program
}

// Join makes n hosts, has an operator expect them all by one import, and joins
// each from an address that has its share of joins left.
func Join(ctx context.Context, b *lab.Broker, ca *lab.TPMCA, n int) ([]*Host, error) {
	hosts := make([]*Host, n)
	brokers := make([]lab.Broker, n) // as each host sees it
	for i := range hosts {
		brokers[i] = *b
		hosts[i] = &Host{}
	}
	if err := indexed(n, func(i int) error { return hosts[i].make(&brokers[i], ca, i) }); err != nil {
		return nil, err
	}
	list := filepath.Join(b.Dir, "fleet.csv")
	text := strings.Builder{}
	text.WriteString("name,ek_hash,labels,reference\n")
	for i, h := range hosts {
		fmt.Fprintf(&text, "soft-%04d,%s,role=fleet,\n", i, h.TPM.EK.Hash())
	}
	if err := os.WriteFile(list, []byte(text.String()), 0o600); err != nil {
		return nil, err
	}
	if _, err := b.CLI(ctx, "host", "import", "-f", list); err != nil {
		return nil, err
	}
	sources, err := newSources(b.Addr, n)
	if err != nil {
		return nil, err
	}
	defer sources.close()
	return hosts, indexed(n, func(i int) error {
		brokers[i].Addr = sources.address(i)
		defer func() { brokers[i].Addr = b.Addr }()
		pending, err := hosts[i].SoftHost.Join(ctx, "")
		if err == nil && pending {
			err = fmt.Errorf("the host waits for approval, though it was imported")
		}
		return err
	})
}

func (h *Host) make(b *lab.Broker, ca *lab.TPMCA, i int) (err error) {
	if h.SoftHost, err = lab.NewSoftHost(b, ca); err != nil {
		return err
	}
	key, err := lab.NewECDSA()
	if err != nil {
		return err
	}
	if h.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return err
	}
	h.pid = 1000 * (1 + i)
	h.program, err = h.Program(exe, account, h.pid)
	return err
}

// Connect opens the connection that the host keeps, and learns what evidence its broker
// reads, which may be an earlier one.
func (h *Host) Connect(ctx context.Context) (err error) {
	if h.Session, err = h.Dial(ctx); err != nil {
		return err
	}
	r, err := h.Session.Hosts.Challenge(ctx, connect.NewRequest(&v1.ChallengeRequest{Count: 1}))
	if err != nil {
		return err
	}
	h.Reads = max(1, int(r.Msg.GetProgramVersion()))
	return nil
}

// Order is an attested request for the fleet's credential, ready to be sent; it
// replaces the one that the host has.
func (h *Host) Order(ctx context.Context) (r *v1.IssueRequest, delivery string, err error) {
	// Each is for another process: one has few credentials whose end isn't confirmed.
	h.pid++
	if h.program, err = h.Program(exe, account, h.pid); err != nil {
		return nil, "", err
	}
	body := h.IssueBody("fleet", h.program)
	body.Csr, body.Replaces = h.csr, h.Lease
	a, err := h.Attest(ctx, h.Session, evidence.CallIssue, body)
	return &v1.IssueRequest{Attested: a}, body.GetDeliveryId(), err
}

// Delivered acknowledges what an Order was answered with.
func (h *Host) Delivered(ctx context.Context, r *v1.IssueResponse, delivery string) error {
	_, err := h.Session.Hosts.Acknowledge(ctx, connect.NewRequest(&v1.AcknowledgeRequest{LeaseId: r.GetLeaseId(), DeliveryId: delivery}))
	if err == nil {
		h.Lease, h.ticket = r.GetLeaseId(), r.GetTicket()
	}
	return err
}

// Obtain gets a credential, in the place of the one before.
func (h *Host) Obtain(ctx context.Context) error {
	order, delivery, err := h.Order(ctx)
	if err != nil {
		return err
	}
	r, err := h.Session.Hosts.Issue(ctx, connect.NewRequest(order))
	if err != nil {
		return err
	}
	return h.Delivered(ctx, r.Msg, delivery)
}

// Prove proves the host and its credential, which has to be live after it.
func (h *Host) Prove(ctx context.Context) error {
	r, err := h.SoftHost.Prove(ctx, h.Session, h.checkpoint, &v1.LeaseProof{LeaseId: h.Lease, Scope: "fleet", Program: h.program, Ticket: h.ticket})
	if err != nil {
		return err
	}
	h.checkpoint = r.GetCheckpoint().GetNote()
	for _, l := range r.GetLeases() {
		if l.GetLeaseId() == h.Lease && l.GetOutcome() == "live" {
			return nil
		}
	}
	return fmt.Errorf("lease %s came out of a proof as %v", h.Lease, r.GetLeases())
}

// Each has all hosts do something, some at a time; the error is the first
// host's that failed.
func Each(hosts []*Host, do func(*Host) error) error {
	return indexed(len(hosts), func(i int) error { return do(hosts[i]) })
}

func indexed(n int, do func(i int) error) error {
	var group errgroup.Group
	group.SetLimit(atOnce)
	for i := range n {
		group.Go(func() error {
			if err := do(i); err != nil {
				return fmt.Errorf("host %d: %w", i, err)
			}
			return nil
		})
	}
	return group.Wait()
}
