package e2e_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const softScope = `
scope "soft" {
  host    { labels = { role = "billing" } }
  process {
    exe  = "/opt/billing/bin/billingd"
    user = "billing"
  }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

const softExe = "/opt/billing/bin/billingd"

// outcome fails unless err is of this outcome and check.
func outcome(t *testing.T, err error, want api.Outcome, check string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted; want %s (%s)", want, check)
	}
	if e := api.FromConnect(err); e.Outcome != want || e.Check != check {
		t.Fatalf("%s (%s): %s; want %s (%s)", e.Outcome, e.Check, e.Message, want, check)
	}
}

func joined(t *testing.T, b *bench, ca *lab.TPMCA) *lab.SoftHost {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	h := check.Must(lab.NewSoftHost(b.broker, ca))(t)
	token := check.Must(b.broker.JoinToken(ctx, "role=billing"))(t)
	if pending := check.Must(h.Join(ctx, token))(t); pending {
		t.Fatal("pending with a token")
	}
	return h
}

func dial(t *testing.T, h *lab.SoftHost) *api.Session {
	t.Helper()
	s := check.Must(h.Dial(check.Within(t, time.Minute)))(t)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (b *bench) hostState(t *testing.T, id string) string {
	t.Helper()
	var h struct {
		State string `json:"state"`
	}
	check.Nil(t, b.broker.JSON(check.Within(t, time.Minute), &h, "host", "show", id))
	return h.State
}

// Every attack on a session starts from a request that is accepted, changes
// one thing, and is refused for the reason that it should be.
func TestAttacksOnSessions(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	order := func(h *lab.SoftHost, edits ...func(*process.Program)) *v1.IssueBody {
		return h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 400, edits...))(t))
	}
	send := func(s *api.Session, a *v1.Attested) error {
		_, err := s.Hosts.Issue(ctx, connect.NewRequest(&v1.IssueRequest{Attested: a}))
		return err
	}
	t.Run("the honest twin", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		r := check.Must(h.Issue(ctx, s, order(h)))(t)
		if len(r.GetFields()) != 2 {
			t.Errorf("fields: %d, want username and password", len(r.GetFields()))
		}
	})
	t.Run("replayed on the same connection", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		check.Nil(t, send(s, a))
		outcome(t, send(s, a), api.Retry, "nonce")
		if state := b.hostState(t, h.ID); state != "trusted" {
			t.Errorf("a retry made the host %s", state)
		}
	})
	t.Run("replayed on another connection", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		outcome(t, send(dial(t, h), a), api.Retry, "nonce")
		check.Nil(t, send(s, a))
	})
	t.Run("re-bound to another connection's nonce", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s, other := dial(t, h), dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		a.Nonce = check.Must(h.Nonce(ctx, other))(t)
		outcome(t, send(other, a), api.Retry, "extra-data")
	})
	t.Run("stale", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		time.Sleep(31 * time.Second)
		outcome(t, send(s, a), api.Retry, "nonce")
	})
	t.Run("request spliced in", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		a.Body = check.Must(proto.Marshal(order(h, func(p *process.Program) { p.PID = 401 })))(t)
		outcome(t, send(s, a), api.Retry, "extra-data")
	})
	t.Run("evidence of another call", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallProve, order(h)))(t)
		outcome(t, send(s, a), api.Retry, "extra-data")
	})
	t.Run("quote by another host's AK", func(t *testing.T) {
		h, thief := joined(t, b, services.TPMCA), joined(t, b, services.TPMCA)
		s := dial(t, thief)
		body := order(thief)
		raw := check.Must(proto.Marshal(body))(t)
		nonce := check.Must(thief.Nonce(ctx, s))(t)
		extra := check.Must(thief.ExtraData(s, evidence.CallIssue, nonce, raw))(t)
		q := check.Must(h.TPM.Quote(extra, pcrs()))(t)
		outcome(t, send(s, &v1.Attested{Body: raw, Nonce: nonce, Quote: lab.QuoteMessage(q)}), api.Rejected, "signature")
		if state := b.hostState(t, thief.ID); state != "failed" {
			t.Errorf("the thief is %s", state)
		}
	})
	t.Run("a PCR reported twice", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		a.Quote.Pcrs = append(a.Quote.Pcrs, a.Quote.Pcrs[4])
		outcome(t, send(s, a), api.Rejected, "pcr-duplicate")
	})
	t.Run("a PCR left out", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		a.Quote.Pcrs = a.Quote.Pcrs[1:]
		outcome(t, send(s, a), api.Rejected, "pcr-selection")
	})
	t.Run("counters that went back", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		h.TPM.ResetCount = 5
		r := check.Must(h.Issue(ctx, s, order(h)))(t)
		h.TPM.ResetCount = 4
		_, err := h.Issue(ctx, s, order(h))
		outcome(t, err, api.Rejected, "tpm-counters")
		if state := b.hostState(t, h.ID); state != "quarantined" {
			t.Errorf("the host is %s, want quarantined", state)
		}
		b.ended(t, r.GetLeaseId())
		// An operator's word, and a new join, bring it back.
		_, err = b.broker.CLI(ctx, "host", "reenrol", h.ID)
		check.Nil(t, err)
		if pending := check.Must(h.Join(ctx, ""))(t); pending {
			t.Error("still pending after reenrol")
		}
		check.Must(h.Issue(ctx, dial(t, h), order(h)))(t)
	})
	t.Run("counters that went back at a join", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		h.TPM.ResetCount = 5
		lease := check.Must(h.Issue(ctx, dial(t, h), order(h)))(t).GetLeaseId()
		h.TPM.ResetCount = 4
		if pending := check.Must(h.Join(ctx, ""))(t); !pending {
			t.Error("a reverted snapshot joined")
		}
		if state := b.hostState(t, h.ID); state != "quarantined" {
			t.Errorf("the host is %s, want quarantined", state)
		}
		b.ended(t, lease)
	})
	t.Run("another program", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		check.Must(h.Issue(ctx, s, order(h)))(t)
		_, err := h.Issue(ctx, s, h.IssueBody("soft", check.Must(h.Program("/usr/bin/python3", "billing", 402))(t)))
		outcome(t, err, api.Refused, "process.exe")
		if strings.Contains(err.Error(), softExe) {
			t.Errorf("the refusal tells the host what was wanted: %v", err)
		}
		out, err := b.broker.CLI(ctx, "why", h.ID, "soft")
		if err == nil || !bytes.Contains(out, []byte("/usr/bin/python3")) || !bytes.Contains(out, []byte(softExe)) {
			t.Errorf("why: %v\n%s", err, out)
		}
		if live := b.leases(t, "--host", h.ID, "--state", "live"); len(live) != 1 {
			t.Errorf("the honest program has %d leases, want its one", len(live))
		}
	})
	t.Run("a scope of another host", func(t *testing.T) {
		h := check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t)
		check.Must(h.Join(ctx, check.Must(b.broker.JoinToken(ctx, "role=web"))(t)))(t)
		_, err := h.Issue(ctx, dial(t, h), order(h))
		outcome(t, err, api.Refused, "host.labels.role")
	})
	t.Run("a lease of another host", func(t *testing.T) {
		h, thief := joined(t, b, services.TPMCA), joined(t, b, services.TPMCA)
		lease := check.Must(h.Issue(ctx, dial(t, h), order(h)))(t).GetLeaseId()
		s := dial(t, thief)
		body := order(thief)
		body.Replaces = lease
		_, err := thief.Issue(ctx, s, body)
		outcome(t, err, api.Fault, "gone")
		check.Must(s.Hosts.Release(ctx, connect.NewRequest(&v1.ReleaseRequest{LeaseIds: []string{lease}})))(t)
		p := check.Must(thief.Prove(ctx, s, nil, &v1.LeaseProof{LeaseId: lease, Scope: "soft", Program: check.Must(thief.Program(softExe, "billing", 400))(t)}))(t)
		if got := p.GetLeases()[0].GetOutcome(); got != "gone" {
			t.Errorf("another's lease is %s", got)
		}
		if live := b.leases(t, "--host", h.ID, "--state", "live"); len(live) != 1 {
			t.Error("a host ended another's lease")
		}
	})
	t.Run("a repeated delivery", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		body := order(h)
		first := check.Must(h.Issue(ctx, s, body))(t).GetLeaseId()
		second := check.Must(h.Issue(ctx, s, body))(t).GetLeaseId()
		b.ended(t, first)
		if live := b.leases(t, "--host", h.ID); len(live) != 1 || live[0].ID != second {
			t.Errorf("leases %+v, want %s alone", live, second)
		}
	})
	t.Run("credentials without end", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		until := func(most int, next func(i int) *v1.IssueBody) {
			t.Helper()
			var err error
			n := 0
			for ; n <= most && err == nil; n++ {
				var a *v1.Attested
				if a, err = h.Attest(ctx, s, evidence.CallIssue, next(n)); err == nil {
					err = send(s, a)
				}
			}
			outcome(t, err, api.Fault, "too-many")
			if n < most {
				t.Errorf("turned away after %d, want some %d", n, most)
			}
		}
		until(8, func(int) *v1.IssueBody { return order(h) })
		until(504, func(i int) *v1.IssueBody { return order(h, func(p *process.Program) { p.PID = 1000 + i }) })
		_, err := b.broker.CLI(ctx, "lease", "revoke", "--host", h.ID)
		check.Nil(t, err)
	})
	t.Run("never acknowledged", func(t *testing.T) {
		h := joined(t, b, services.TPMCA)
		s := dial(t, h)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, order(h)))(t)
		r := check.Must(s.Hosts.Issue(ctx, connect.NewRequest(&v1.IssueRequest{Attested: a})))(t)
		if until := r.Msg.GetExpires().AsTime(); time.Until(until) > 3*time.Minute {
			t.Errorf("an unacknowledged credential lives until %v", until)
		}
	})
}

// ended waits until a lease is gone, in the broker's words and Vault's.
func (b *bench) ended(t *testing.T, id string) {
	t.Helper()
	b.endedWithin(t, 10*time.Second, id)
}

func (b *bench) endedWithin(t *testing.T, d time.Duration, id string) {
	t.Helper()
	check.Eventually(t, d, "lease "+id+" is gone", func() (bool, string) {
		var l lease
		check.Nil(t, b.broker.JSON(check.Within(t, time.Minute), &l, "lease", "show", id))
		if name := l.Names["db_username"]; name != "" && roleExists(t, name) {
			return false, "role " + name + " exists"
		}
		return l.State == "gone", l.State
	})
}

func pcrs() []int {
	list := make([]int, 16)
	for i := range list {
		list[i] = i
	}
	return list
}

func TestAttacksOnTheDoor(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	h := joined(t, b, services.TPMCA)
	host := check.Must(x509.ParseCertificate(h.Certificate().Certificate[0]))(t)

	t.Run("the honest twin", func(t *testing.T) {
		s := dial(t, h)
		check.Must(h.Nonce(ctx, s))(t)
	})
	t.Run("a certificate of another CA", func(t *testing.T) {
		key := check.Must(lab.NewECDSA())(t)
		other := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: host.Issuer, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		workload := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: host.Subject, NotBefore: other.NotBefore, NotAfter: other.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		der := check.Must(x509.CreateCertificate(rand.Reader, workload, other, h.TPM.TLSKey.Public(), key))(t)
		if s, err := h.DialWith(ctx, &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: h.TPM.TLSKey}); err == nil {
			if _, err := h.Nonce(ctx, s); err == nil {
				t.Error("a certificate of another CA opened the door")
			}
		}
	})
	t.Run("another host's certificate", func(t *testing.T) {
		key := check.Must(lab.NewECDSA())(t)
		if s, err := h.DialWith(ctx, &tls.Certificate{Certificate: h.Certificate().Certificate, PrivateKey: key}); err == nil {
			if _, err := h.Nonce(ctx, s); err == nil {
				t.Error("a certificate without its key opened the door")
			}
		}
	})
	t.Run("a bare key that never joined", func(t *testing.T) {
		stranger := check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t)
		_, err := stranger.Nonce(ctx, dial(t, stranger))
		outcome(t, err, api.Fault, api.CheckCertificate)
	})
	t.Run("a host at the operators' window", func(t *testing.T) {
		s := dial(t, h)
		_, err := s.Operators.ListHosts(ctx, connect.NewRequest(&v1.ListHostsRequest{}))
		if connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("a host lists hosts: %v", err)
		}
	})
	t.Run("a resumed session", func(t *testing.T) {
		// The client asks for tickets; the broker has none to give.
		config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*h.Certificate()}, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
		for i := range 2 {
			c := check.Must(tls.Dial("tcp", b.broker.Addr, config))(t)
			_, _ = fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			_, _ = io.ReadAll(c)
			if c.ConnectionState().DidResume {
				t.Errorf("connection %d was resumed", i)
			}
			_ = c.Close()
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		config := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*h.Certificate()}}
		if c, err := tls.Dial("tcp", b.broker.Addr, config); err == nil {
			_ = c.Close()
			t.Error("the door speaks TLS 1.2")
		}
	})
	t.Run("an oversized body", func(t *testing.T) {
		client, url := rawClient(t, b, h)
		res, err := client.Post(url+"/countersign.v1.HostService/Join", "application/proto", bytes.NewReader(make([]byte, 2<<20)))
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				t.Error("2 MiB were taken")
			}
		}
		check.Must(h.Nonce(ctx, dial(t, h)))(t)
	})
	t.Run("a small body that unpacks to much", func(t *testing.T) {
		client, url := rawClient(t, b, h)
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		check.Must(z.Write(make([]byte, 60<<20)))(t)
		check.Nil(t, z.Close())
		req := check.Must(http.NewRequestWithContext(ctx, http.MethodPost, url+"/countersign.v1.HostService/Join", &packed))(t)
		req.Header.Set("Content-Type", "application/proto")
		req.Header.Set("Content-Encoding", "gzip")
		res := check.Must(client.Do(req))(t)
		said := check.Must(io.ReadAll(res.Body))(t)
		_ = res.Body.Close()
		if !bytes.Contains(said, []byte("unknown compression")) {
			t.Errorf("%s: %s", res.Status, said)
		}
	})
	t.Run("slow bodies", func(t *testing.T) {
		// Many peers that send nothing; an honest one is served meanwhile.
		for range 50 {
			client, url := rawClient(t, b, h)
			r, w := io.Pipe()
			t.Cleanup(func() { _ = w.Close() })
			go func() {
				res, err := client.Post(url+"/countersign.v1.HostService/Challenge", "application/proto", r)
				if err == nil {
					_ = res.Body.Close()
				}
			}()
		}
		check.Must(h.Nonce(ctx, dial(t, h)))(t)
	})
}

func rawClient(t *testing.T, b *bench, h *lab.SoftHost) (*http.Client, string) {
	t.Helper()
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*h.Certificate()}}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}, "https://" + b.broker.Addr
}

func TestAttacksOnJoining(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	token := func(t *testing.T) string { return check.Must(b.broker.JoinToken(ctx, "role=billing"))(t) }
	fresh := func(t *testing.T) *lab.SoftHost { return check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t) }

	t.Run("a token is used once", func(t *testing.T) {
		once := token(t)
		check.Must(fresh(t).Join(ctx, once))(t)
		_, err := fresh(t).Join(ctx, once)
		outcome(t, err, api.Refused, "join-token")
	})
	t.Run("an invented token", func(t *testing.T) {
		_, err := fresh(t).Join(ctx, "cs-00000000000000000000000000000000")
		outcome(t, err, api.Refused, "join-token")
	})
	t.Run("a vendor's certificate alone admits nobody", func(t *testing.T) {
		h := fresh(t)
		if pending := check.Must(h.Join(ctx, ""))(t); !pending {
			t.Fatal("admitted without a word from an operator")
		}
		if state := b.hostState(t, h.ID); state != "pending" {
			t.Errorf("state %s", state)
		}
		_, err := b.broker.CLI(ctx, "host", "approve", h.ID, "role=billing")
		check.Nil(t, err)
		if pending := check.Must(h.Join(ctx, ""))(t); pending {
			t.Error("still pending after approval")
		}
	})
	t.Run("a registered EK admits", func(t *testing.T) {
		h := fresh(t)
		_, err := b.broker.CLI(ctx, "host", "add", "web-1", "--ek-hash", h.TPM.EK.Hash().String())
		check.Nil(t, err)
		if pending := check.Must(h.Join(ctx, ""))(t); pending {
			t.Error("pending, though its EK is registered")
		}
	})
	t.Run("an EK of an unknown root", func(t *testing.T) {
		other := check.Must(lab.NewTPMCA(filepath.Join(folder(t), "ca")))(t)
		h := check.Must(lab.NewSoftHost(b.broker, other))(t)
		_, err := h.Join(ctx, token(t))
		outcome(t, err, api.Rejected, "ek-chain")
	})
	t.Run("the certificate of another EK", func(t *testing.T) {
		h := fresh(t)
		h.TPM.EK.Certificate = fresh(t).TPM.EK.Certificate
		_, err := h.Join(ctx, token(t))
		outcome(t, err, api.Rejected, "ek-certificate")
	})
	t.Run("an EK that the TPM doesn't have", func(t *testing.T) {
		h, victim := fresh(t), fresh(t)
		s := dial(t, h)
		app := h.Application(token(t))
		app.EndorsementKeys = victim.Application("").GetEndorsementKeys()
		body := check.Must(proto.Marshal(app))(t)
		check.Must(s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body})))(t)
		// The attacker can't open the challenge; a guess is all it has.
		own := h.Application(app.GetToken())
		honest := check.Must(proto.Marshal(own))(t)
		cc := check.Must(s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: honest})))(t)
		answer := check.Must(h.Answer(s, honest, cc.Msg))(t)
		answer.Secret = bytes.Repeat([]byte{7}, len(answer.GetSecret()))
		_, err := s.Hosts.Activate(ctx, connect.NewRequest(answer))
		outcome(t, err, api.Rejected, "activation")
		// And the challenge is spent.
		_, err = s.Hosts.Activate(ctx, connect.NewRequest(answer))
		if err == nil {
			t.Error("a second guess was taken")
		}
	})
	t.Run("a TLS key that another connection has", func(t *testing.T) {
		h := fresh(t)
		key := check.Must(lab.NewECDSA())(t)
		s := check.Must(h.DialWith(ctx, check.Must(lab.SelfSigned(key))(t)))(t)
		defer func() { _ = s.Close() }()
		body := check.Must(proto.Marshal(h.Application(token(t))))(t)
		c := check.Must(s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body})))(t)
		// Signed for this connection's key, as an attacker would have it signed.
		answer := check.Must(answerAs(h, key, s, body, c.Msg))(t)
		_, err := s.Hosts.Activate(ctx, connect.NewRequest(answer))
		outcome(t, err, api.Rejected, "name")
	})
	t.Run("a new AK of a known EK waits", func(t *testing.T) {
		h := fresh(t)
		check.Must(h.Join(ctx, token(t)))(t)
		old := dial(t, h)
		lease := check.Must(h.Issue(ctx, old, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t).GetLeaseId()
		imaged := check.Must(reimaged(h, b))(t)
		if pending := check.Must(imaged.Join(ctx, token(t)))(t); !pending {
			t.Fatal("another AK took the host over")
		}
		if imaged.ID != h.ID {
			t.Errorf("host %s became %s", h.ID, imaged.ID)
		}
		check.Must(h.Issue(ctx, old, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 8))(t))))(t) // the old AK is good meanwhile
		_, err := b.broker.CLI(ctx, "host", "reenrol", h.ID)
		check.Nil(t, err)
		if pending := check.Must(imaged.Join(ctx, ""))(t); pending {
			t.Fatal("pending after reenrol")
		}
		b.ended(t, lease)
		_, err = h.Nonce(ctx, old)
		outcome(t, err, api.Fault, api.CheckUnknownHost)
	})
	t.Run("a removed host", func(t *testing.T) {
		h := fresh(t)
		check.Must(h.Join(ctx, token(t)))(t)
		s := dial(t, h)
		lease := check.Must(h.Issue(ctx, s, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t).GetLeaseId()
		_, err := b.broker.CLI(ctx, "host", "remove", h.ID)
		check.Nil(t, err)
		b.ended(t, lease)
		_, err = h.Nonce(ctx, s)
		outcome(t, err, api.Rejected, "host-removed")
		_, err = h.Join(ctx, token(t))
		outcome(t, err, api.Rejected, "host-removed")
	})
	t.Run("ten thousand joins from one source", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		attacker := fresh(t)
		body := check.Must(proto.Marshal(attacker.Application("")))(t)
		var taken, turned int
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				s, err := attacker.Dial(ctx)
				if err != nil {
					return
				}
				defer func() { _ = s.Close() }()
				for range 1250 {
					_, err := s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body}))
					mu.Lock()
					if err == nil {
						taken++
					} else if api.FromConnect(err).Check == "join-rate" {
						turned++
					}
					mu.Unlock()
				}
			})
		}
		// Honest hosts that joined before are served; one that joins comes from
		// another address.
		h := joinFrom(t, b, "127.0.0.2")
		s := dial(t, h)
		check.Must(h.Issue(ctx, s, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t)
		wg.Wait()
		cancel()
		if taken+turned < 9000 || turned < 8000 {
			t.Errorf("%d joins were looked at, %d turned away", taken, turned)
		}
		var hosts struct{ Hosts []json.RawMessage }
		check.Nil(t, b.broker.JSON(check.Within(t, time.Minute), &hosts, "host", "list", "--state", "pending"))
		if len(hosts.Hosts) > 1 {
			t.Errorf("%d hosts are pending: talk alone left something behind", len(hosts.Hosts))
		}
	})
}

// answerAs answers a challenge on a connection of key.
func answerAs(h *lab.SoftHost, key *ecdsa.PrivateKey, s *api.Session, body []byte, c *v1.JoinResponse) (*v1.ActivateRequest, error) {
	own := h.TPM.TLSKey
	h.TPM.TLSKey = key // what the binding hashes
	defer func() { h.TPM.TLSKey = own }()
	return h.Answer(s, body, c)
}

// reimaged is the same TPM after its operating system was installed anew.
func reimaged(h *lab.SoftHost, b *bench) (*lab.SoftHost, error) {
	fresh, err := lab.NewSoftHost(b.broker, nil)
	if err != nil {
		return nil, err
	}
	fresh.TPM.TakeEK(h.TPM)
	return fresh, nil
}

// joinFrom joins a host whose connections come from another loopback address.
func joinFrom(t *testing.T, b *bench, address string) *lab.SoftHost {
	t.Helper()
	proxy := forward(t, address, b.broker.Addr)
	moved := *b.broker
	moved.Addr = proxy
	h := check.Must(lab.NewSoftHost(&moved, services.TPMCA))(t)
	token := check.Must(b.broker.JoinToken(check.Within(t, time.Minute), "role=billing"))(t)
	check.Must(h.Join(check.Within(t, time.Minute), token))(t)
	return h
}

// forward is a layer-4 pass-through that dials from another address.
func forward(t *testing.T, from, to string) string {
	t.Helper()
	l := check.Must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
	}()
	return l.Addr().String()
}

// A user manager's unit of the same name, and a program that execs the trusted
// one, are not the unit.
func TestInspectTellsUnitsApart(t *testing.T) {
	m := newMachine(t, unitScope, fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	m.sh(t, "systemctl start billing.service && loginctl enable-linger billing")
	uid := strings.TrimSpace(m.sh(t, "id -u billing"))
	m.sh(t, "mkdir -p /var/lib/billing-home/.config/systemd/user && chown -R billing /var/lib/billing-home && usermod -d /var/lib/billing-home billing || true")
	inspect := func(pid string) (p process.Program) {
		check.Nil(t, json.Unmarshal([]byte(m.sh(t, "countersign-agent inspect "+pid+" -o json")), &p))
		return p
	}
	main := strings.TrimSpace(m.sh(t, "systemctl show -P MainPID billing.service"))
	if p := inspect(main); p.Unit() != "billing.service" {
		t.Errorf("the unit's own process: %+v", p)
	}
	// The trusted program, started by somebody else with a lying environment.
	pid := strings.TrimSpace(m.sh(t, "INVOCATION_ID="+strings.TrimSpace(m.sh(t, "systemctl show -P InvocationID billing.service"))+
		" setsid /opt/billing/bin/billingd -file /nowhere -database x -status /dev/null >/dev/null 2>&1 & sleep 0.5; echo $!"))
	if p := inspect(pid); p.Unit() != "" || p.Main().Path != "/opt/billing/bin/billingd" {
		t.Errorf("an impostor: %+v", p)
	}
	if out, err := m.try(t, "systemd-run --user -M billing@.host --unit=billing.service --collect /opt/billing/bin/billingd -file /nowhere -database x -status /dev/null; "+
		"sleep 1; systemctl --user -M billing@.host show -P MainPID billing.service"); err == nil {
		lines := strings.Fields(out)
		if user := lines[len(lines)-1]; user != "0" {
			if p := inspect(user); p.Unit() != "" || !strings.Contains(p.Linux.Cgroup, "user@"+uid) {
				t.Errorf("a user manager's unit: %+v", p)
			}
		} else {
			t.Errorf("the user manager's unit didn't start: %s", out)
		}
	} else {
		t.Errorf("no user manager: %v", err)
	}
	// LD_PRELOAD shows.
	m.sh(t, "cp $(ls /lib/x86_64-linux-gnu/libz.so.1* | head -1) /tmp/evil.so")
	pid = strings.TrimSpace(m.sh(t, "LD_PRELOAD=/tmp/evil.so setsid sleep 60 >/dev/null 2>&1 & echo $!"))
	time.Sleep(200 * time.Millisecond)
	if out := m.sh(t, "countersign-agent inspect "+pid); !strings.Contains(out, "/tmp/evil.so") {
		t.Errorf("a preloaded library does not show:\n%s", out)
	}
}

func TestFsckNamesWhatIsPlanted(t *testing.T) {
	b := newBroker(t, softScope, false)
	h := joined(t, b, services.TPMCA)
	ctx := check.Within(t, time.Minute)
	check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t)
	fsck := func() (string, error) {
		out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config()).CombinedOutput()
		return string(out), err
	}
	if out, err := fsck(); err != nil {
		t.Fatalf("the honest twin: %v\n%s", err, out)
	}
	check.Nil(t, b.broker.Stop())
	store := filepath.Join(b.broker.State(), "store.db")
	whole := check.Must(os.ReadFile(store))(t)
	for _, tt := range []struct{ name, sql, want string }{
		{"a record changed", `UPDATE audit_records SET body = replace(body, '"host.admitted"', '"host.admitteD"')`, "audit-intact"},
		{"a grant without an allow", `UPDATE grants SET id = 'forged'`, "allow-first"},
		{"a grant nobody looks at", `UPDATE grants SET due = 0`, "nothing-lost"},
		{"an end that was not recorded", `UPDATE grants SET state = 'gone'`, "ends-recorded"},
		{"a token in the log", `UPDATE audit_records SET body = replace(body, '"actor"', '"x":"hvs.CAESIJ","actor"') WHERE idx = 2`, "silent-secrets"},
		{"a trusted host nobody admitted", `UPDATE hosts SET admitted = 0`, "hosts-admitted"},
		{"a lease of a failed host", `UPDATE hosts SET state = 'failed'`, "revoked-on-no"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check.Nil(t, os.WriteFile(store, whole, 0o600))
			plant(t, store, tt.sql)
			if out, err := fsck(); err == nil || !strings.Contains(out, tt.want) {
				t.Errorf("fsck: %v, want it to name %s:\n%s", err, tt.want, out)
			}
		})
	}
}
