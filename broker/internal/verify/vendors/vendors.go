// Package vendors reads the certificates of TPM vendors: the roots and
// intermediates that the certificates of endorsement keys lead to.
//
// The files that ek_roots names are the operator's word, and trusted. What
// vendors hand out is read with care: each certificate is judged by itself, and
// one that can't be used is left out with the reason. A Microsoft cabinet of
// such certificates has to be signed by Microsoft.
package vendors

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
)

// A Set is the certificates that EK certificates may lead to.
type Set struct {
	All []*x509.Certificate // in the order of the files

	// Roots and Intermediates are nil for an empty Set, which certifies nothing.
	Roots, Intermediates *x509.CertPool
}

// Load reads PEM files, as ek_roots names them. Certificates that sign
// themselves are roots. Anything that can't be read is an error: the broker
// must not start with fewer roots than its config names.
func Load(files []string) (Set, error) {
	var all []*x509.Certificate
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return Set{}, fmt.Errorf("ek_roots: %w", err)
		}
		certs, err := parsePEM(data)
		if err != nil {
			return Set{}, fmt.Errorf("ek_roots: %s: %w (`countersign ek-roots import` writes a file of the certificates that can be used)", file, err)
		}
		all = append(all, certs...)
	}
	return NewSet(all), nil
}

// NewSet sorts certificates into roots and intermediates.
func NewSet(all []*x509.Certificate) Set {
	if len(all) == 0 {
		return Set{}
	}

	s := Set{All: all, Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool()}
	for _, cert := range all {
		if selfSigned(cert) {
			s.Roots.AddCert(cert)
		} else {
			s.Intermediates.AddCert(cert)
		}
	}
	return s
}

// With returns the set with certificates that may lead to its roots: none of them
// is a root.
func (s Set) With(issuers []*x509.Certificate) Set {
	s.All = slices.Concat(s.All, issuers)
	if s.Intermediates == nil {
		s.Intermediates = x509.NewCertPool()
	} else {
		s.Intermediates = s.Intermediates.Clone()
	}
	for _, cert := range issuers {
		s.Intermediates.AddCert(cert)
	}
	return s
}

// Issuers reads a file of certificates that lead from an EK certificate upward:
// PEM, or DER one after another, as a TPM's NV memory holds them.
func Issuers(data []byte) ([]*x509.Certificate, error) {
	if bytes.Contains(data, []byte("-----BEGIN ")) {
		return parsePEM(data)
	}
	certs, rest := tpm.SplitCertificates(data)
	if len(certs) == 0 {
		return nil, errors.New("it holds no certificates in PEM or DER")
	}
	if slices.ContainsFunc(rest, func(b byte) bool { return b != 0 && b != 0xff }) {
		return nil, fmt.Errorf("something that isn't a certificate follows the first %d", len(certs))
	}
	return certs, nil
}

// parsePEM reads every certificate of a PEM file.
func parsePEM(data []byte) (all []*x509.Certificate, err error) {
	blocks, damaged := pemBlocks(data)
	for i, block := range blocks {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", i+1, err)
		}
		all = append(all, cert)
	}

	switch {
	case damaged > 0:
		return nil, fmt.Errorf("%d PEM blocks are damaged", damaged)
	case len(all) == 0:
		return nil, errors.New("no certificate in PEM")
	}
	return all, nil
}

// pemBlocks returns the PEM blocks of a file, and how many are damaged: the
// decoder passes over those without an error.
func pemBlocks(data []byte) (blocks []*pem.Block, damaged int) {
	begun := bytes.Count(data, []byte("-----BEGIN "))
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return blocks, max(0, begun-len(blocks))
		}
		blocks = append(blocks, block)
	}
}

// selfSigned reports whether a CA's certificate is signed by its own key. The
// digest may be SHA-1, as old vendors' roots have it: a root is trusted because
// an operator named it, and its own signature proves nothing.
func selfSigned(cert *x509.Certificate) bool {
	return isCA(cert) && bytes.Equal(cert.RawSubject, cert.RawIssuer) &&
		cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil
}

// isCA reports whether a certificate may issue others. Version 1 has no field
// that says so.
func isCA(cert *x509.Certificate) bool {
	return cert.Version < 3 || cert.BasicConstraintsValid && cert.IsCA
}

// flaw returns why no chain can rest on a certificate, or "".
func flaw(cert *x509.Certificate, now time.Time) string {
	const day = "2006-01-02"
	switch {
	case !isCA(cert):
		return "it isn't a CA's certificate"
	case now.After(cert.NotAfter):
		return "it expired on " + cert.NotAfter.UTC().Format(day)
	case now.Before(cert.NotBefore):
		return "it is valid from " + cert.NotBefore.UTC().Format(day) + " on only"
	case selfSigned(cert):
		return ""
	case cert.SignatureAlgorithm == x509.SHA1WithRSA, cert.SignatureAlgorithm == x509.ECDSAWithSHA1,
		cert.SignatureAlgorithm == x509.MD5WithRSA, cert.SignatureAlgorithm == x509.MD2WithRSA, cert.SignatureAlgorithm == x509.DSAWithSHA1,
		cert.SignatureAlgorithm == x509.DSAWithSHA256, cert.SignatureAlgorithm == x509.UnknownSignatureAlgorithm:
		return fmt.Sprintf("its issuer signed it with %s, which no chain may rest on", cert.SignatureAlgorithm)
	}
	return ""
}
