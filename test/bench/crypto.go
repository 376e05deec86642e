package main

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/test/lab"
)

const bareNames = "a quote's and a certificate request's signature verified, a certificate and a ticket signed; its share of the connections' handshakes (key exchange, two verifications, a signature)"

// leastCrypto does the cryptography of one certificate, and nothing else.
type leastCrypto struct {
	*floor
	csr    *x509.CertificateRequest
	ca     *x509.Certificate
	ticket ed25519.PrivateKey
	peer   *ecdh.PublicKey
}

func newLeastCrypto() (*leastCrypto, error) {
	b := &leastCrypto{floor: &floor{digest: sha256.Sum256([]byte("bare"))}, ca: &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare"}}}
	var err error
	if b.key, err = lab.NewECDSA(); err != nil {
		return nil, err
	}
	if b.sig, err = ecdsa.SignASN1(rand.Reader, b.key, b.digest[:]); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, b.key)
	if err != nil {
		return nil, err
	}
	if b.csr, err = x509.ParseCertificateRequest(der); err != nil {
		return nil, err
	}
	if _, b.ticket, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return nil, err
	}
	peer, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	b.peer = peer.PublicKey()
	return b, nil
}

// once is the processor time of one certificate's crypto, where as many certificates
// went over as many connections.
func (b *leastCrypto) once(certificates, connections int) (time.Duration, error) {
	const times = 200
	own, err := cpu(times, b.certificate)
	if err != nil {
		return 0, err
	}
	shared, err := cpu(times, b.handshake)
	return own + shared*time.Duration(connections)/time.Duration(certificates), err
}

func (b *leastCrypto) certificate() error {
	if err := b.verify(); err != nil {
		return err
	}
	if err := b.csr.CheckSignature(); err != nil {
		return err
	}
	now := time.Now()
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now, NotAfter: now.Add(time.Hour), DNSNames: []string{"fleet.example.com"}}
	if _, err := x509.CreateCertificate(rand.Reader, leaf, b.ca, b.csr.PublicKey, b.key); err != nil {
		return err
	}
	_ = ed25519.Sign(b.ticket, b.digest[:])
	return nil
}

// handshake is a server's part of one.
func (b *leastCrypto) handshake() error {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	if _, err := key.ECDH(b.peer); err != nil {
		return err
	}
	if err := errors.Join(b.verify(), b.verify()); err != nil {
		return err
	}
	_, err = ecdsa.SignASN1(rand.Reader, b.key, b.digest[:])
	return err
}

// cpu is the processor time of one call, in the mean of as many.
func cpu(times int, call func() error) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := threadTime()
	if err != nil {
		return 0, err
	}
	for range times {
		if err := call(); err != nil {
			return 0, err
		}
	}
	after, err := threadTime()
	return (after - before) / time.Duration(times), err
}

func threadTime() (time.Duration, error) {
	var t unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano()), err
}
