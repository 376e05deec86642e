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
	"net/http"
	"sync"
	"sync/atomic"
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
	once      sync.Once
	err       error
	kind      peerKind
	challenge *challenge.Conn
	leaf      *x509.Certificate // the peer's
	known     atomic.Bool
}

// strangerTime is how long a connection stays open whose key the broker hasn't
// recognised: long enough to join.
const strangerTime = time.Minute

type connKey struct{}

// Door accepts connections of hosts and operators.
type Door struct {
	HostCA, OperatorCA *x509.Certificate
	Certificate        func() (*tls.Certificate, error)
	Now                func() time.Time

	strangers sync.Map // of open connections, to what closes them after strangerTime
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

// ConnContext gives each connection its place for challenges.
func (d *Door) ConnContext(ctx context.Context, c net.Conn) context.Context {
	state := &conn{}
	if _, ok := c.(*net.UnixConn); ok {
		state.kind = localPeer
	} else {
		d.strangers.Store(c, time.AfterFunc(strangerTime, func() {
			if !state.known.Load() {
				_ = c.Close()
			}
		}))
	}
	return context.WithValue(ctx, connKey{}, state)
}

// ConnState lets go of a connection that is closed: many that come and go are
// not all kept for strangerTime.
func (d *Door) ConnState(c net.Conn, state http.ConnState) {
	if state != http.StateClosed {
		return
	}
	if timer, ok := d.strangers.LoadAndDelete(c); ok {
		timer.(*time.Timer).Stop()
	}
}

// identify completes a connection's state at its first request, when the
// handshake is over.
func (d *Door) identify(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*conn)
		if !ok {
			http.Error(w, "no connection", http.StatusInternalServerError)
			return
		}
		c.once.Do(func() {
			if c.kind == localPeer {
				return
			}
			c.err = d.complete(c, r)
		})
		if c.err != nil {
			http.Error(w, c.err.Error(), http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (d *Door) complete(c *conn, r *http.Request) error {
	if r.TLS == nil {
		return errCertificate
	}
	kind, err := d.classify(*r.TLS)
	if err != nil {
		return err
	}
	exported, err := r.TLS.ExportKeyingMaterial(evidence.ExporterLabel, nil, evidence.ExporterSize)
	if err != nil {
		return fmt.Errorf("TLS exporter: %w", err)
	}
	address, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return err
	}
	leaf := r.TLS.PeerCertificates[0]
	// The key in its one DER encoding, whatever the certificate made of it.
	spki, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
	if err != nil {
		return errCertificate
	}
	c.kind, c.leaf = kind, leaf
	c.challenge = &challenge.Conn{KeySPKI: spki, Exporter: [evidence.ExporterSize]byte(exported), Address: address}
	return nil
}

func connOf(ctx context.Context) *conn {
	c, _ := ctx.Value(connKey{}).(*conn)
	return c
}
