// Package pki holds the two CAs of the broker's own door: one certifies
// hosts and the brokers that they call, the other operators. Workloads'
// certificates come from a third CA, which this door never accepts.
//
// A certificate opens nothing by itself: every request is looked up by its
// key, a host's in the inventory, an operator's in the list of operators. The
// CAs' keys are encrypted on disk under the broker's key password; whoever has
// both can name itself a broker to agents.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/countersign/countersign/internal/lifetime"
)

// caLifetime is long because agents pin the host CA; docs say how to change it.
const caLifetime = 20 * 365 * 24 * time.Hour

// backdate forgives hosts whose clock is behind: what counts at this door is
// the key.
const backdate = lifetime.Backdate

// A CA signs certificates of one kind of peer.
type CA struct {
	Certificate *x509.Certificate
	key         crypto.Signer
}

// Names of the CAs' files in the state folder, without ending.
const (
	HostCA     = "host-ca"
	OperatorCA = "operator-ca"
)

// Create makes a CA and writes NAME.crt and NAME.key, encrypted, to dir.
func Create(dir, name, commonName string, password []byte, now time.Time) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: commonName}, NotBefore: now.Add(-backdate), NotAfter: now.Add(caLifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	block, err := pemutil.Serialize(key, pemutil.WithPKCS8(true), pemutil.WithPassword(password))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, name+".crt"), certPEM, 0o644); err != nil {
		return nil, err
	}
	return Load(dir, name, password)
}

// Load reads what Create wrote.
func Load(dir, name string, password []byte) (*CA, error) {
	cert, err := pemutil.ReadCertificate(filepath.Join(dir, name+".crt"))
	if err != nil {
		return nil, err
	}
	key, err := pemutil.Read(filepath.Join(dir, name+".key"), pemutil.WithPassword(password))
	if err != nil {
		return nil, fmt.Errorf("%s: %w; is key_password_file the one that `broker init` wrote?", name, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s.key is no private key", name)
	}
	return &CA{Certificate: cert, key: signer}, nil
}

// Fingerprint is what agents pin: lowercase hex SHA-256 of the certificate.
func (ca *CA) Fingerprint() string {
	sum := sha256.Sum256(ca.Certificate.Raw)
	return hex.EncodeToString(sum[:])
}

// Host certifies a host's TPM-resident TLS key.
func (ca *CA) Host(key crypto.PublicKey, id string, now time.Time, ttl time.Duration) ([]byte, error) {
	return ca.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: id}, NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key)
}

// Operator certifies the key of a CSR under the given name; the CSR's own
// names are not looked at.
func (ca *CA) Operator(csr []byte, name string, now, until time.Time) ([]byte, crypto.PublicKey, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, nil, fmt.Errorf("certificate request: %w", err)
	}
	if _, ok := req.PublicKey.(*ecdsa.PublicKey); !ok {
		return nil, nil, errors.New("certificate request: an operator's key is ECDSA")
	}
	der, err := ca.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-backdate), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, req.PublicKey)
	return der, req.PublicKey, err
}

// Server certifies a broker's listener for names, DNS names or IP addresses.
func (ca *CA) Server(key crypto.PublicKey, names []string, now time.Time, ttl time.Duration) ([]byte, error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "countersign broker"}, NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return ca.sign(template, key)
}

func (ca *CA) sign(template *x509.Certificate, key crypto.PublicKey) ([]byte, error) {
	template.SerialNumber = serial()
	template.BasicConstraintsValid = true
	return x509.CreateCertificate(rand.Reader, template, ca.Certificate, key, ca.key)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		panic(err) // crypto/rand doesn't fail
	}
	return n.SetBit(n, 125, 1)
}
