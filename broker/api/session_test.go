package api

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
)

// The pin trusts the CA, whatever its dates; the broker's own certificate is
// judged by the clock, and an error says which clock said what.
func TestVerifyBrokerAndTime(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now, NotAfter: now.Add(20 * 365 * day),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER := check.Must(x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key))(t)
	ca = check.Must(x509.ParseCertificate(caDER))(t)
	pin := sha256.Sum256(caDER)

	for _, c := range []struct {
		what       string
		made, at   time.Duration // the certificate, and the clock
		wrongClock bool
	}{
		{"as usual", 0, 0, false},
		{"made a month ahead", 30 * day, 0, true},
		{"ended", 0, 91 * day, true},
		{"after the CA's end", 21 * 365 * day, 21 * 365 * day, false},
		{"before the CA's begin", -30 * day, -30 * day, false},
	} {
		leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"broker"}, NotBefore: now.Add(c.made - 25*time.Hour), NotAfter: now.Add(c.made + 90*day),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		leaf = check.Must(x509.ParseCertificate(check.Must(x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key))(t)))(t)
		state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf, ca}}
		peer := Peer{CASHA256: hex.EncodeToString(pin[:]), Now: func() time.Time { return now.Add(c.at) }}

		err := verifyBroker(state, peer, "broker")
		var clock *ClockError
		if wrong := errors.As(err, &clock); wrong != c.wrongClock || !wrong && err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		if c.wrongClock && (!strings.Contains(err.Error(), "this machine's clock says 2026-") || !strings.Contains(err.Error(), "set the clock that is wrong")) {
			t.Errorf("%s: %v", c.what, err)
		}
		var name x509.HostnameError
		if err := verifyBroker(state, peer, "other"); !c.wrongClock && !errors.As(err, &name) {
			t.Errorf("%s: another name: %v", c.what, err)
		}
		peer.CASHA256 = strings.Repeat("0", 64)
		var middlebox *MiddleboxError
		if err := verifyBroker(state, peer, "broker"); !errors.As(err, &middlebox) {
			t.Errorf("%s: another pin: %v", c.what, err)
		}
	}
}
