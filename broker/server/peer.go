// Package server is the broker's door: TLS, who stands before it, and handlers
// that translate between the wire and the rooms behind.
//
// A peer is one of three: a host, by a certificate of the host CA; a host that
// wants to join, by a certificate that its key signed itself, or by one of the
// host CA that has ended; an operator, by a certificate of the operator CA, or
// as root on the local socket. Every other certificate, a workload's among
// them, ends the handshake. Behind the handshake a certificate counts for
// nothing more: hosts and operators are looked up by their key.
//
// A certificate that has ended is turned away by an answer and not by the
// handshake, so that its owner learns what to do. One that hasn't begun counts:
// only this broker's own clock, when it was ahead, can have made it.
package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/internal/lifetime"
)

type peerKind int

const (
	unknownPeer peerKind = iota
	joiningPeer
	hostPeer
	operatorPeer
	endedOperatorPeer // by a certificate that has ended: it hears so, and nothing else
	localPeer         // root, on the local socket
)

// A conn is what the door knows of one connection.
type conn struct {
	kind       peerKind
	class      class
	registered bool // the inventory has a host with this key, admitted or not
	challenge  *challenge.Conn
	leaf       *x509.Certificate // the peer's
}

// strangerTime is how long a stranger's connection stays open: long enough to join.
const strangerTime = time.Minute

type connKey struct{}

// Door accepts connections of hosts and operators.
type Door struct {
	HostCA, OperatorCA *x509.Certificate
	Certificate        func() (*tls.Certificate, error)
	Now                func() time.Time
	// Host looks up a host's key, and Operator an operator's. They alone make of a
	// peer more than a stranger.
	Host     func(ctx context.Context, key evidence.Digest) (registered, admitted bool, err error)
	Operator func(ctx context.Context, spki []byte) (known bool, err error)
}

// TLS is the listener's configuration: TLS 1.3 alone, so that the exporter is
// bound to both ends' keys, and no session tickets, since a resumed session
// shows a certificate without a new signature.
func (d *Door) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2", "http/1.1"},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.Certificate() },
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := d.classify(state)
			return err
		},
		Time: d.Now,
	}
}

var errCertificate = errors.New("this certificate opens nothing here")

func (d *Door) classify(state tls.ConnectionState) (peerKind, error) {
	if state.DidResume || len(state.PeerCertificates) == 0 {
		return unknownPeer, errCertificate
	}
	leaf := state.PeerCertificates[0]

	for _, p := range []struct {
		ca          *x509.Certificate
		kind, ended peerKind
	}{
		{d.HostCA, hostPeer, joiningPeer},
		{d.OperatorCA, operatorPeer, endedOperatorPeer},
	} {
		if !issued(leaf, p.ca) {
			continue
		}
		if d.Now().After(leaf.NotAfter) {
			return p.ended, nil
		}
		return p.kind, nil
	}

	// A host without a good certificate joins by its bare key: the handshake
	// proved that it has it.
	if bytes.Equal(leaf.RawIssuer, leaf.RawSubject) && !leaf.IsCA && leaf.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
		return joiningPeer, nil
	}
	return unknownPeer, errCertificate
}

// issued reports whether ca signed leaf for a client, whatever the time is.
func issued(leaf, ca *x509.Certificate) bool {
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: lifetime.Anchor(ca), CurrentTime: leaf.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err == nil
}

// identify finds out who is at the other end of a finished handshake.
func (d *Door) identify(ctx context.Context, state tls.ConnectionState, remote string) (*conn, error) {
	kind, err := d.classify(state)
	if err != nil {
		return nil, err
	}
	exported, err := state.ExportKeyingMaterial(evidence.ExporterLabel, nil, evidence.ExporterSize)
	if err != nil {
		return nil, fmt.Errorf("TLS exporter: %w", err)
	}
	address, _, err := net.SplitHostPort(remote)
	if err != nil {
		return nil, err
	}
	leaf := state.PeerCertificates[0]
	// The key in its one DER encoding, whatever the certificate made of it.
	spki, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
	if err != nil {
		return nil, errCertificate
	}

	c := &conn{kind: kind, leaf: leaf,
		challenge: &challenge.Conn{KeySPKI: spki, Exporter: [evidence.ExporterSize]byte(exported), Address: address}}
	return c, d.rank(ctx, c)
}

// rank looks the key up. A certificate makes nobody more than a stranger, and a
// host whose certificate has ended is none.
func (d *Door) rank(ctx context.Context, c *conn) error {
	switch c.kind {
	case hostPeer, joiningPeer:
		registered, admitted, err := d.Host(ctx, c.challenge.Key())
		if c.registered = registered; admitted {
			c.class = member
		}
		return err
	case operatorPeer:
		known, err := d.Operator(ctx, c.challenge.KeySPKI)
		if known {
			c.class = operator
		}
		return err
	}
	return nil
}

// connContext gives the requests of a connection what is known of it.
func connContext(ctx context.Context, c net.Conn) context.Context {
	var peer *conn
	switch c := c.(type) {
	case *tls.Conn:
		peer = c.NetConn().(*guardedConn).peer
	default:
		peer = &conn{kind: localPeer, class: local}
	}
	return context.WithValue(ctx, connKey{}, peer)
}
