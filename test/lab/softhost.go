package lab

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/attestors/evidence"
	programs "github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// A SoftHost speaks the hosts' protocol from memory, with a TPM in software
// that the lab's CA certified: one of many in a fleet, or, where a test edits
// what it sends, an attacker that owns everything but a TPM's promises.
type SoftHost struct {
	More []*SoftTPM // whose endorsement keys its TPM has, too
	TPM  *SoftTPM
	ID   string
	Boot string
	Now  func() time.Time // its wall clock; nil: the machine's
	// Reads is the newest encoding of programs that the broker reads; 0: the newest there is.
	Reads int

	broker *Broker
	cert   *tls.Certificate
}

// NewSoftHost makes a host that has not joined; ca may be nil.
func NewSoftHost(b *Broker, ca *TPMCA) (*SoftHost, error) {
	t, err := NewSoftTPM(ca)
	if err != nil {
		return nil, err
	}
	return &SoftHost{TPM: t, broker: b, Boot: "00000000-0000-4000-8000-" + hex.EncodeToString([]byte(rand.Text()[:6]))}, nil
}

// SelfSigned is a certificate that key signs itself, as a joining host shows.
func SelfSigned(key *ecdsa.PrivateKey) (*tls.Certificate, error) {
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Dial opens a connection, with the host's certificate once it has one.
func (h *SoftHost) Dial(ctx context.Context) (*api.Session, error) {
	cert := h.cert
	if cert == nil {
		var err error
		if cert, err = SelfSigned(h.TPM.TLSKey); err != nil {
			return nil, err
		}
	}
	return h.DialWith(ctx, cert)
}

// DialWith opens a connection with another certificate.
func (h *SoftHost) DialWith(ctx context.Context, cert *tls.Certificate) (*api.Session, error) {
	return api.Dial(ctx, api.Peer{Addresses: []string{"https://" + h.broker.Addr}, CASHA256: h.broker.CASHA256, Certificate: cert, Now: h.Now})
}

// Certificate is the host's, nil before it joined.
func (h *SoftHost) Certificate() *tls.Certificate { return h.cert }

// ExtraData is what a quote for body on s has to commit to.
func (h *SoftHost) ExtraData(s *api.Session, call evidence.Call, nonce, body []byte) (evidence.Digest, error) {
	n, err := evidence.ParseNonce(nonce)
	if err != nil {
		return evidence.Digest{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(h.TPM.TLSKey.Public())
	if err != nil {
		return evidence.Digest{}, err
	}
	return evidence.Binding{Call: call, Nonce: n, KeySPKI: spki, Exporter: s.Exporter, Request: body}.ExtraData(), nil
}

// Application is what the host joins with.
func (h *SoftHost) Application(token string) *v1.JoinBody {
	body := &v1.JoinBody{AkPublic: h.TPM.AKPublic, TlsPublic: h.TPM.TLSPublic, Token: token, Hostname: "soft"}
	for _, chip := range append([]*SoftTPM{h.TPM}, h.More...) {
		body.EndorsementKeys = append(body.EndorsementKeys, &v1.EndorsementKey{Public: chip.EK.Public, Certificate: chip.EK.Certificate})
	}
	return body
}

// Join has the broker admit the host; it returns whether it stays pending.
func (h *SoftHost) Join(ctx context.Context, token string) (pending bool, err error) {
	h.cert = nil
	s, err := h.Dial(ctx)
	if err != nil {
		return false, err
	}
	defer func() { _ = s.Close() }()
	body, err := proto.Marshal(h.Application(token))
	if err != nil {
		return false, err
	}
	c, err := s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body}))
	if err != nil {
		return false, err
	}
	a, err := h.Answer(s, body, c.Msg)
	if err != nil {
		return false, err
	}
	r, err := s.Hosts.Activate(ctx, connect.NewRequest(a))
	if err != nil {
		return false, err
	}
	h.ID = r.Msg.GetHostId()
	if r.Msg.GetPending() {
		return true, nil
	}
	h.cert = &tls.Certificate{Certificate: r.Msg.GetCertificate(), PrivateKey: h.TPM.TLSKey}
	return false, nil
}

// Answer answers a join's challenge.
func (h *SoftHost) Answer(s *api.Session, body []byte, c *v1.JoinResponse) (*v1.ActivateRequest, error) {
	chips := append([]*SoftTPM{h.TPM}, h.More...)
	secret, err := h.TPM.ActivateBy(chips[c.GetEndorsementKey()], tpm.Challenge{CredentialBlob: c.GetCredentialBlob(), EncryptedSecret: c.GetEncryptedSecret()})
	if err != nil {
		return nil, err
	}
	var others [][]byte
	for _, o := range c.GetOthers() {
		other, err := h.TPM.ActivateBy(chips[o.GetEndorsementKey()], tpm.Challenge{CredentialBlob: o.GetCredentialBlob(), EncryptedSecret: o.GetEncryptedSecret()})
		if err != nil {
			return nil, err
		}
		others = append(others, other)
	}
	certify, err := h.ExtraData(s, evidence.CallCertify, c.GetNonce(), body)
	if err != nil {
		return nil, err
	}
	certification, err := h.TPM.Certify(certify)
	if err != nil {
		return nil, err
	}
	extra, err := h.ExtraData(s, evidence.CallJoin, c.GetNonce(), body)
	if err != nil {
		return nil, err
	}
	q, err := h.TPM.Quote(extra, tpm.DefaultPCRs())
	if err != nil {
		return nil, err
	}
	return &v1.ActivateRequest{Secret: secret, OtherSecrets: others, Quote: QuoteMessage(q),
		Certification: &v1.Certification{Attest: certification.Attest, Signature: certification.Signature}}, nil
}

// QuoteMessage is a quote for the wire.
func QuoteMessage(q tpm.Quote) *v1.Quote {
	m := &v1.Quote{Attest: q.Attest, Signature: q.Signature}
	for _, p := range q.PCRs {
		m.Pcrs = append(m.Pcrs, &v1.Pcr{Index: uint32(p.Index), Sha256: p.SHA256[:]})
	}
	return m
}

// Nonce asks for one.
func (h *SoftHost) Nonce(ctx context.Context, s *api.Session) ([]byte, error) {
	r, err := s.Hosts.Challenge(ctx, connect.NewRequest(&v1.ChallengeRequest{Count: 1}))
	if err != nil {
		return nil, err
	}
	if len(r.Msg.GetNonces()) != 1 {
		return nil, errors.New("no nonce")
	}
	return r.Msg.GetNonces()[0], nil
}

// Attest quotes over a request on s; edits change the statement before it is
// signed.
func (h *SoftHost) Attest(ctx context.Context, s *api.Session, call evidence.Call, request proto.Message, edits ...func(*tpm2.TPMSAttest)) (*v1.Attested, error) {
	body, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	nonce, err := h.Nonce(ctx, s)
	if err != nil {
		return nil, err
	}
	extra, err := h.ExtraData(s, call, nonce, body)
	if err != nil {
		return nil, err
	}
	q, err := h.TPM.Quote(extra, tpm.DefaultPCRs(), edits...)
	if err != nil {
		return nil, err
	}
	return &v1.Attested{Body: body, Nonce: nonce, Quote: QuoteMessage(q)}, nil
}

// Facts are the host's own word.
func (h *SoftHost) Facts() *v1.HostFacts { return &v1.HostFacts{BootId: h.Boot, Os: "linux"} }

// Program is evidence of a program on the host: exe, run by user, as a process
// of its own. Edits change it before it is encoded.
func (h *SoftHost) Program(exe, user string, pid int, edits ...func(*programs.Program)) ([]byte, error) {
	p := programs.Program{Boot: h.Boot, PID: pid, Start: uint64(pid) * 100, User: user,
		Executables: programs.OneFile(exe, sha256.Sum256([]byte(exe))), Linux: &programs.Linux{UID: 990, GID: 990}}
	for _, edit := range edits {
		edit(&p)
	}
	return p.EncodeAs(cmp.Or(h.Reads, programs.Version))
}

// IssueBody asks for a scope's credential for a program.
func (h *SoftHost) IssueBody(scope string, program []byte) *v1.IssueBody {
	return &v1.IssueBody{Scope: scope, Program: program, Host: h.Facts(), DeliveryId: rand.Text()}
}

// Issue asks for a credential and acknowledges it.
func (h *SoftHost) Issue(ctx context.Context, s *api.Session, body *v1.IssueBody) (*v1.IssueResponse, error) {
	a, err := h.Attest(ctx, s, evidence.CallIssue, body)
	if err != nil {
		return nil, err
	}
	r, err := s.Hosts.Issue(ctx, connect.NewRequest(&v1.IssueRequest{Attested: a}))
	if err != nil {
		return nil, err
	}
	if _, err := s.Hosts.Acknowledge(ctx, connect.NewRequest(&v1.AcknowledgeRequest{LeaseId: r.Msg.GetLeaseId(), DeliveryId: body.GetDeliveryId()})); err != nil {
		return nil, fmt.Errorf("acknowledge: %w", err)
	}
	return r.Msg, nil
}

// Prove proves the host and these leases.
func (h *SoftHost) Prove(ctx context.Context, s *api.Session, checkpoint []byte, leases ...*v1.LeaseProof) (*v1.ProveResponse, error) {
	a, err := h.Attest(ctx, s, evidence.CallProve, &v1.ProveBody{Host: h.Facts(), Leases: leases})
	if err != nil {
		return nil, err
	}
	r, err := s.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: a, Checkpoint: checkpoint}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// NewECDSA makes a P-256 key.
func NewECDSA() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }
