package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/test/check"
)

// Whatever the clock says, nobody is turned away without an answer: who shows a
// certificate that has ended may join, or hears what to do, and no more. A CA's
// own end doesn't count at the door of the broker that has its key.
func TestTheDoorAndTime(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	password := []byte("test password")
	hosts := check.Must(pki.Create(dir, pki.HostCA, "hosts", password, now))(t)
	operators := check.Must(pki.Create(dir, pki.OperatorCA, "operators", password, now))(t)
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	csr := check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
	operator, _, err := operators.Operator(csr, "alice", now, now.Add(90*24*time.Hour))
	check.Nil(t, err)
	self := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "joining"}, NotBefore: now, NotAfter: now.Add(time.Hour)}
	leaves := map[string][]byte{
		"host":     check.Must(hosts.Host(key.Public(), "h", now, 30*24*time.Hour))(t),
		"operator": operator,
		"self":     check.Must(x509.CreateCertificate(rand.Reader, self, self, key.Public(), key))(t),
		"listener": check.Must(hosts.Server(key.Public(), []string{"broker"}, now, 90*24*time.Hour))(t),
	}

	const day = 24 * time.Hour
	for _, c := range []struct {
		at                   time.Duration
		host, operator, self peerKind
	}{
		{-365 * day, hostPeer, operatorPeer, joiningPeer}, // made by a clock that was ahead
		{-30 * day, hostPeer, operatorPeer, joiningPeer},
		{0, hostPeer, operatorPeer, joiningPeer},
		{29 * day, hostPeer, operatorPeer, joiningPeer},
		{31 * day, joiningPeer, operatorPeer, joiningPeer},
		{91 * day, joiningPeer, endedOperatorPeer, joiningPeer},
		{21 * 365 * day, joiningPeer, endedOperatorPeer, joiningPeer},
	} {
		d := &Door{HostCA: hosts.Certificate, OperatorCA: operators.Certificate, Now: func() time.Time { return now.Add(c.at) }}
		for name, want := range map[string]peerKind{"host": c.host, "operator": c.operator, "self": c.self, "listener": unknownPeer} {
			leaf := check.Must(x509.ParseCertificate(leaves[name]))(t)
			got, err := d.classify(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}})
			if got != want || (err == nil) != (want != unknownPeer) {
				t.Errorf("%s, at %s: %d, %v; want %d", name, c.at, got, err, want)
			}
		}
	}

	// A certificate that is made in the year 2047 by the same, ended CA.
	late := now.Add(21 * 365 * day)
	d := &Door{HostCA: hosts.Certificate, OperatorCA: operators.Certificate, Now: func() time.Time { return late }}
	leaf := check.Must(x509.ParseCertificate(check.Must(hosts.Host(key.Public(), "h", late, 30*day))(t)))(t)
	if got, err := d.classify(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}); got != hostPeer {
		t.Errorf("after the CA's end: %d, %v", got, err)
	}
}
