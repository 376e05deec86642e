package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"go.step.sm/crypto/pemutil"
)

// Names of the CA's files in the state folder, without ending.
const (
	rootName   = "workload-ca"
	issuerName = "workload-ca-issuer"
)

// lifetime of root and issuer: programs' configurations hold the root.
const lifetime = 20 * 365 * 24 * time.Hour

// trustDomain is SPIFFE's syntax of one.
var trustDomain = regexp.MustCompile(`^[a-z0-9._-]{1,255}$`)

// trustDomainID is the SPIFFE ID of the trust domain itself, which its CAs bear.
func trustDomainID(domain string) *url.URL { return &url.URL{Scheme: "spiffe", Host: domain} }

// Init makes the workload CA of a new broker: a root and the issuer under it,
// their keys encrypted under password.
func Init(dir, brokerID, domain string, password []byte, now time.Time) error {
	return create(dir, brokerID, domain, now, func(key *ecdsa.PrivateKey) (*pem.Block, error) {
		// PKCS #8 has PBKDF2; the older form's derivation is one MD5.
		return pemutil.Serialize(key, pemutil.WithPassword(password), pemutil.WithPKCS8(true))
	})
}

// A seal encrypts a key.
type seal func(*ecdsa.PrivateKey) (*pem.Block, error)

func create(dir, brokerID, domain string, now time.Time, seal seal) error {
	if !trustDomain.MatchString(domain) {
		return fmt.Errorf("trust_domain %q: lowercase letters, digits, dots, - and _ are what SPIFFE allows", domain)
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	root := caTemplate("countersign workloads "+brokerID, domain, now)
	root.MaxPathLen = 1
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		return err
	}
	if root, err = x509.ParseCertificate(rootDER); err != nil {
		return err
	}
	issuerKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	issuer := caTemplate("countersign workload issuer "+brokerID, domain, now)
	issuer.MaxPathLenZero = true
	issuerDER, err := x509.CreateCertificate(rand.Reader, issuer, root, issuerKey.Public(), rootKey)
	if err != nil {
		return err
	}
	if err := write(dir, rootName, rootDER, rootKey, seal); err != nil {
		return err
	}
	return write(dir, issuerName, issuerDER, issuerKey, seal)
}

func caTemplate(name, domain string, now time.Time) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		panic(err) // crypto/rand doesn't fail
	}
	return &x509.Certificate{
		SerialNumber: serial.SetBit(serial, 126, 1), Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{trustDomainID(domain)},
		// Long before: a clock that was ahead at init would make a CA that nobody
		// trusts yet.
		NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func write(dir, name string, der []byte, key *ecdsa.PrivateKey, seal seal) error {
	block, err := seal(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(block), 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".crt"), encode(der), 0o644)
}

// encode is the PEM of certificates.
func encode(ders ...[]byte) (out []byte) {
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}
