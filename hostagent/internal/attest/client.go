package attest

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// A Client is one host towards its brokers. It is safe for concurrent use.
type Client struct {
	device *collect.Device
	dir    string
	peer   api.Peer
	alg    tpm.KeyAlgorithm
	facts  func() *v1.HostFacts
	logs   LogPaths
	log    *slog.Logger
	now    func() time.Time
	wall   func() time.Time

	proving sync.Mutex // one proof at a time: each continues from the answer before it

	mu      sync.Mutex   // guards what follows
	keys    *keys        // nil before the first join
	member  *membership  // nil before a join succeeded
	session *api.Session // nil while there is none

	continues continuation // guarded by mu
}

// Options make a Client.
type Options struct {
	Device   *collect.Device
	StateDir string
	RunDir   string // in memory, and lost with the boot
	Peer     api.Peer
	AK       tpm.KeyAlgorithm
	Facts    func() *v1.HostFacts // read anew for each request
	Logs     LogPaths
	Log      *slog.Logger
	Now      func() time.Time // of leases
	Wall     func() time.Time // of certificates
}

// Open reads the host's state; a host that never joined has none.
func Open(o Options) (*Client, error) {
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		return nil, err
	}
	c := &Client{device: o.Device, dir: o.StateDir, peer: o.Peer, alg: o.AK, facts: o.Facts, logs: o.Logs, log: o.Log, now: o.Now, wall: o.Wall}
	c.peer.Now = o.Wall
	var err error
	if c.keys, err = loadKeys(o.StateDir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if c.continues, err = openContinuation(o.RunDir); err != nil {
		return nil, err
	}
	c.member, err = loadMembership(o.StateDir)
	return c, err
}

// ErrNotJoined says that the host is not admitted yet.
var ErrNotJoined = errors.New("this host has not joined; `countersign-agent join` asks a broker to admit it")

// Host is the host's id, empty before it joined.
func (c *Client) Host() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member == nil {
		return ""
	}
	return c.member.HostID
}

// Close ends the connection.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
}

// drop forgets the session; c.mu is held.
func (c *Client) drop() {
	if c.session != nil {
		_ = c.session.Close()
		c.session = nil
	}
}

// certificate is the host's for TLS: the broker's, or before joining one that
// the key signs itself. c.mu is held.
func (c *Client) certificate(joining bool) (*tls.Certificate, error) {
	signer, err := c.device.Signer(c.keys.tls)
	if err != nil {
		return nil, err
	}
	if !joining && c.member != nil && len(c.member.Certificate) > 0 {
		return &tls.Certificate{Certificate: c.member.Certificate, PrivateKey: signer}, nil
	}
	now := c.wall()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "joining"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: signer}, nil
}

// connect is the session to use, a new one where the old is lost.
func (c *Client) connect(ctx context.Context) (*api.Session, *keys, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member == nil || c.keys == nil {
		return nil, nil, ErrNotJoined
	}
	if c.session != nil && c.session.Err() == nil {
		return c.session, c.keys, nil
	}
	c.drop()
	cert, err := c.certificate(false)
	if err != nil {
		return nil, nil, err
	}
	peer := c.peer
	peer.Certificate = cert
	s, err := api.Dial(ctx, peer)
	if err != nil {
		return nil, nil, fmt.Errorf("no broker: %w", err)
	}
	c.session = s
	if s.CA != nil && c.wall().After(s.CA.NotAfter) {
		c.log.Warn(attentionCA(s.CA.NotAfter, c.wall()))
	}
	return s, c.keys, nil
}

// binding is what a quote for a request on s commits to.
func binding(call evidence.Call, s *api.Session, nonce evidence.Nonce, request []byte, signer crypto.Signer) (evidence.Digest, error) {
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return evidence.Digest{}, err
	}
	return evidence.Binding{Call: call, Nonce: nonce, KeySPKI: spki, Exporter: s.Exporter, Request: request}.ExtraData(), nil
}

// tries is how often a request is made anew after Retry or a lost connection.
const tries = 3

// joinAgain reports whether the broker asks for a join: it doesn't know the
// host's key, an operator allowed other keys, or the certificate has ended.
func joinAgain(e *api.Error) bool {
	return e.Check == api.CheckUnknownHost || e.Check == api.CheckReenrol || e.Check == api.CheckCertificate
}

// rejoin joins because the broker asked for it, by e, on session s. Where
// another request has left s meanwhile, there is nothing to do but to try again.
func (c *Client) rejoin(ctx context.Context, s *api.Session, e *api.Error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s {
		return nil
	}
	c.log.Warn("the broker asks this host to join again", "reason", e.Message)

	r, err := c.join(ctx, "", false)
	var answer *api.Error
	switch {
	case err == nil && !r.Pending:
		c.log.Info("joined again", "host", r.HostID)
		return nil
	case err == nil:
		return &api.Error{Outcome: e.Outcome, Check: e.Check, Request: e.Request,
			Message: fmt.Sprintf("%s; joining again waits for an operator: `countersign host show %s` says why, `countersign host approve %s` or `countersign host reenrol %s` lets it in", e.Message, r.HostID, r.HostID, r.HostID)}
	case errors.As(err, &answer) && answer.Check == checkAuditLog:
		return answer // and what such a broker said doesn't count
	case errors.As(err, &answer) && answer.Outcome == api.Rejected && (answer.Check == "host-removed" || answer.Check == "host-quarantined"):
		return answer // what a proof would have been told
	}
	return &api.Error{Outcome: e.Outcome, Check: e.Check, Request: e.Request, Message: fmt.Sprintf("%s; joining again failed, and is tried again: %v", e.Message, err)}
}

// A body makes what is to be attested, for a broker that reads programs' evidence
// up to this version.
type body func(reads int) (proto.Message, error)

// attested makes a body's evidence and sends it. A lost connection rebuilds
// body, nonce and quote on the next; a host that the broker asks to join again does,
// once.
func (c *Client) attested(ctx context.Context, call evidence.Call, b body, send func(*api.Session, *v1.Attested) error) error {
	var last error
	rejoined := false
	for range tries {
		s, k, err := c.connect(ctx)
		if err != nil {
			return err
		}
		a, err := c.attest(ctx, s, k, call, b)
		if err == nil {
			err = send(s, a)
		}
		if err == nil {
			return nil
		}
		last = err
		e := api.FromConnect(err)
		switch {
		case e.Check == api.CheckResync: // the next challenge names nothing as known
		case e.Outcome == api.Retry, s.Err() != nil:
			c.forget(s)
		case joinAgain(e) && !rejoined:
			rejoined = true
			if err := c.rejoin(ctx, s, e); err != nil {
				return err
			}
		default:
			return e
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return api.FromConnect(last)
}

// forget drops s, unless another request has replaced it already.
func (c *Client) forget(s *api.Session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session == s {
		c.drop()
	}
}

// attest fetches a nonce and quotes over a body.
func (c *Client) attest(ctx context.Context, s *api.Session, k *keys, call evidence.Call, b body) (*v1.Attested, error) {
	r, err := s.Hosts.Challenge(ctx, request(&v1.ChallengeRequest{Count: 1}))
	if err != nil {
		return nil, err
	}
	if len(r.Msg.GetNonces()) == 0 {
		return nil, api.NewError(api.Fault, "nonce", "the broker gave no nonce")
	}
	nonce, err := evidence.ParseNonce(r.Msg.GetNonces()[0])
	if err != nil {
		return nil, api.NewError(api.Fault, "nonce", err.Error())
	}
	signer, err := c.device.Signer(k.tls)
	if err != nil {
		return nil, err
	}
	msg, err := b(int(r.Msg.GetProgramVersion()))
	if err != nil {
		return nil, err
	}
	encoded, err := proto.Marshal(msg)
	if err != nil {
		return nil, err
	}
	extra, err := binding(call, s, nonce, encoded, signer)
	if err != nil {
		return nil, err
	}
	q, err := c.device.Quote(ctx, k.ak, extra, tpm.DefaultPCRs())
	if err != nil {
		return nil, fmt.Errorf("TPM: %w", err)
	}
	logs, err := c.logs.read(c.facts().GetBootId(), r.Msg.GetKnown())
	if err != nil {
		return nil, err
	}
	return &v1.Attested{Body: encoded, Nonce: nonce[:], Quote: quoteMessage(q), Logs: logs}, nil
}

func quoteMessage(q tpm.Quote) *v1.Quote {
	m := &v1.Quote{Attest: q.Attest, Signature: q.Signature}
	for _, p := range q.PCRs {
		m.Pcrs = append(m.Pcrs, &v1.Pcr{Index: uint32(p.Index), Sha256: p.SHA256[:]})
	}
	return m
}

// request gives a message its correlation id.
func request[T any](m *T) *connect.Request[T] {
	r := connect.NewRequest(m)
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	r.Header().Set("X-Correlation-Id", hex.EncodeToString(id[:]))
	return r
}
