package api

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/internal/lifetime"
)

// MaxContinuation bounds ProveResponse.continuation, in bytes.
const MaxContinuation = 64

const (
	dialTimeout = 15 * time.Second
	keepAlive   = 30 * time.Second
	// maxAnswer bounds what is read of an answer.
	maxAnswer = 4 << 20
)

// A Session is one TLS 1.3 connection to one broker. It never redials: the
// exporter that evidence is bound to is this connection's, so when it is lost,
// nonces and quotes are made anew on another Session.
type Session struct {
	Hosts     countersignv1connect.HostServiceClient
	Operators countersignv1connect.OperatorServiceClient
	Address   string // of the broker, as configured
	Exporter  [evidence.ExporterSize]byte
	CA        *x509.Certificate // the pinned one, as the broker showed it

	conn *http.ClientConn
}

// A Peer says how to recognise brokers and what to show them.
type Peer struct {
	Addresses   []string         // https://host:port, tried in order
	CASHA256    string           // lowercase hex SHA-256 of the host CA's certificate
	Certificate *tls.Certificate // its key may be in a TPM
	Now         func() time.Time
}

// Dial connects to the first address that answers.
func Dial(ctx context.Context, p Peer) (*Session, error) {
	var errs []error
	for _, address := range p.Addresses {
		s, err := dialOne(ctx, p, address)
		if err == nil {
			return s, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no broker address is configured"))
	}
	return nil, errors.Join(errs...)
}

func dialOne(ctx context.Context, p Peer, address string) (*Session, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Port() == "" {
		return nil, errors.New("a broker's address is https://HOST:PORT")
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	s := &Session{Address: address}
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         u.Hostname(),
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, // the pinned CA is checked in VerifyConnection, at every handshake
		VerifyConnection:   func(state tls.ConnectionState) error { return verifyBroker(state, p, u.Hostname()) },
		Time:               p.Now,
	}
	if p.Certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.Certificate, nil }
	}
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: keepAlive, PingTimeout: dialTimeout},
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := (&tls.Dialer{Config: config}).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			state := c.(*tls.Conn).ConnectionState()
			exported, err := state.ExportKeyingMaterial(evidence.ExporterLabel, nil, evidence.ExporterSize)
			if err != nil {
				return nil, errors.Join(err, c.Close())
			}
			s.Exporter = [evidence.ExporterSize]byte(exported)
			s.CA = pinned(state.PeerCertificates, p.CASHA256)
			return c, nil
		},
	}
	if s.conn, err = transport.NewClientConn(ctx, "https", u.Host); err != nil {
		return nil, err
	}
	client := &http.Client{Transport: s.conn, CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("a broker doesn't redirect") }}
	s.Hosts = countersignv1connect.NewHostServiceClient(client, address, connect.WithReadMaxBytes(maxAnswer), connect.WithInterceptors(Codes()))
	s.Operators = countersignv1connect.NewOperatorServiceClient(client, address, connect.WithInterceptors(Codes()))
	return s, nil
}

// A MiddleboxError says that somebody between host and broker ends TLS.
type MiddleboxError struct{ Issuer string }

func (e *MiddleboxError) Error() string {
	return fmt.Sprintf("the certificate was issued by %q, not by the broker's pinned CA: a proxy that intercepts TLS stands in between, or ca_sha256 is not this broker's", e.Issuer)
}

// A ClockError is returned when the broker's certificate isn't valid by this
// machine's clock. The broker renews it by itself, so one of the clocks is
// wrong.
type ClockError struct{ Begins, Ends, Now time.Time }

func (e *ClockError) Error() string {
	return fmt.Sprintf("the broker's certificate is valid from %s to %s, and this machine's clock says %s: set the clock that is wrong; the broker makes itself a new certificate when its clock is right",
		stamp(e.Begins), stamp(e.Ends), stamp(e.Now))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// pinned returns the certificate with the given digest, or nil.
func pinned(certs []*x509.Certificate, digest string) *x509.Certificate {
	i := slices.IndexFunc(certs, func(c *x509.Certificate) bool {
		sum := sha256.Sum256(c.Raw)
		return hex.EncodeToString(sum[:]) == digest
	})
	if i < 0 {
		return nil
	}
	return certs[i]
}

// verifyBroker accepts a server certificate that the pinned CA issued for name.
// The broker sends the CA's certificate along. The CA's own dates don't count:
// the pin is what trusts it.
func verifyBroker(state tls.ConnectionState, p Peer, name string) error {
	certs := state.PeerCertificates
	ca := pinned(certs, p.CASHA256)
	if ca == nil {
		issuer := "nobody"
		if len(certs) > 0 {
			issuer = certs[0].Issuer.String()
		}
		return &MiddleboxError{issuer}
	}

	now := time.Now()
	if p.Now != nil {
		now = p.Now()
	}
	_, err := certs[0].Verify(x509.VerifyOptions{Roots: lifetime.Anchor(ca), DNSName: name, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})

	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return &ClockError{certs[0].NotBefore, certs[0].NotAfter, now}
	}
	return err
}

// Err is why the session is over, nil while it can be used.
func (s *Session) Err() error { return s.conn.Err() }

// Close ends the session.
func (s *Session) Close() error { return s.conn.Close() }
