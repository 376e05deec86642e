package vendors

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
)

// maxChain bounds a walk from certificate to issuer.
const maxChain = 8

// A Chain is the way from an EK certificate up, as far as it was found.
type Chain struct {
	Verdict  string   `json:"verdict"` // "certified", or "not certified"
	Reason   string   `json:"reason,omitempty"`
	Links    []Link   `json:"chain"` // the EK's certificate first
	Missing  string   `json:"missing_issuer,omitempty"`
	IssuerAt []string `json:"missing_issuer_urls,omitempty"` // where the last link says its issuer's certificate is
}

// A Link is one certificate of a chain.
type Link struct {
	Subject  string    `json:"subject"`
	Issuer   string    `json:"issuer"`
	NotAfter time.Time `json:"not_after"`
}

// Verdicts of a Chain.
const (
	Certified    = "certified"
	NotCertified = "not certified"
)

// Check builds the chain of an EK certificate in DER or PEM, and has the
// broker's own code judge it.
func (s Set) Check(certificate []byte, now time.Time) (Chain, error) {
	if block, _ := pem.Decode(certificate); block != nil {
		certificate = block.Bytes
	}
	cert, err := x509.ParseCertificate(certificate)
	if err != nil {
		return Chain{}, fmt.Errorf("it isn't a certificate in DER or PEM: %w", err)
	}
	public, err := tpm.CertifiedPublic(cert)
	if err != nil {
		return Chain{}, err
	}

	chain := Chain{Verdict: Certified}
	chain.walk(s, cert)
	if _, err := appraise.VerifyEK(tpm.EK{Public: public, Certificate: certificate}, s.Roots, s.Intermediates, now); err != nil {
		chain.Verdict, chain.Reason = NotCertified, err.Error()
	}
	return chain, nil
}

// walk follows issuers as far as the set has them.
func (c *Chain) walk(s Set, cert *x509.Certificate) {
	for range maxChain {
		c.Links = append(c.Links, Link{cert.Subject.String(), cert.Issuer.String(), cert.NotAfter.UTC()})
		if selfSigned(cert) {
			return
		}
		issuer := s.issuer(cert)
		if issuer == nil {
			c.Missing, c.IssuerAt = cert.Issuer.String(), cert.IssuingCertificateURL
			return
		}
		cert = issuer
	}
}

// issuer returns the certificate whose name and key made cert's signature. Names
// are compared byte for byte, as the verification does.
func (s Set) issuer(cert *x509.Certificate) *x509.Certificate {
	for _, candidate := range s.All {
		if !bytes.Equal(candidate.RawSubject, cert.RawIssuer) {
			continue
		}
		if candidate.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil {
			return candidate
		}
	}
	return nil
}
