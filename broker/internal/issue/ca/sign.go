package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/secret"
)

// maxCommonName is X.520's limit.
const maxCommonName = 64

// content is what a certificate says. It goes to the authority in the token,
// and the template below makes the certificate of it.
type content struct {
	Serial     string    `json:"serial"`
	CommonName string    `json:"common_name"` // the first DNS name, for programs that look there; may be empty
	DNS        []string  `json:"dns"`
	IPs        []string  `json:"ips"`
	URI        string    `json:"uri"`
	NotBefore  time.Time `json:"not_before"`
	NotAfter   time.Time `json:"not_after"`
}

// template is smallstep's: JSON made by text/template. The default one would
// choose the serial, and knows no CRL.
const template = `{
	"serialNumber": {{ toJson .Token.certificate.serial }},
	"subject": { {{- with .Token.certificate.common_name }}"commonName": {{ toJson . }}{{ end -}} },
	"dnsNames": {{ toJson .Token.certificate.dns }},
	"ipAddresses": {{ toJson .Token.certificate.ips }},
	"uris": [{{ toJson .Token.certificate.uri }}],
	"notBefore": {{ toJson .Token.certificate.not_before }},
	"notAfter": {{ toJson .Token.certificate.not_after }},
	{{- with .CRLURL }}
	"crlDistributionPoints": [{{ toJson . }}],
	{{- end }}
	"basicConstraints": {"isCA": false},
	"keyUsage": ["digitalSignature"],
	"extKeyUsage": ["serverAuth", "clientAuth"]
}`

// Prepare checks the certificate request and chooses the serial, so that it is written
// down before anything is signed.
func (i *Issuer) Prepare(o issue.Order) (issue.Prepared, error) {
	if len(o.CSR) == 0 {
		return issue.Prepared{}, &issue.OrderError{Part: "csr", Err: errors.New("this scope issues a certificate: set key in the credential's block on the host")}
	}
	if _, err := parseCSR(o.CSR); err != nil {
		return issue.Prepared{}, &issue.OrderError{Part: "csr", Err: err}
	}
	serial := newSerial()
	r, err := encodeRef(serial)
	return issue.Prepared{Ref: r, Names: map[string]string{serialName: serial}}, err
}

// serialName is what logs and the ledger call a serial.
const serialName = "certificate_serial"

// newSerial is a positive serial of 127 random bits (RFC 5280, section 4.1.2.2).
func newSerial() string {
	limit := new(big.Int).Lsh(big.NewInt(1), 127)
	n, err := rand.Int(rand.Reader, limit)
	if err != nil {
		panic(err) // crypto/rand doesn't fail
	}
	return n.SetBit(n, 126, 1).String()
}

// Issue signs a certificate for the request's key, with the decision's names
// and the scope's full length.
func (i *Issuer) Issue(ctx context.Context, o issue.Order) (issue.Credential, error) {
	scope, facts := o.Decision.Scope(), o.Decision.Facts()
	if !o.Decision.Allows() {
		return issue.Credential{}, errors.New("workload CA: no allowing decision")
	}
	source, ok := scope.Source.(*Source)
	if !ok {
		return issue.Credential{}, fmt.Errorf("workload CA: scope %s is of another kind", scope.Name)
	}
	if facts.Host.ID == "" || facts.Host.ID != o.Host {
		return issue.Credential{}, errors.New("workload CA: the order is for another host than the decision")
	}
	serial, err := serialOf(o.Prepared.Ref)
	if err != nil {
		return issue.Credential{}, err
	}

	c := i.content(scope, source, o, serial)
	chain, err := i.sign(ctx, c, o.CSR)
	if err != nil {
		i.unsigned.Store(serial, nil)
		return issue.Credential{}, fmt.Errorf("workload CA: %w", err)
	}
	leaf := chain[0]
	if leaf.SerialNumber.String() != c.Serial || !leaf.NotAfter.Equal(c.NotAfter) || !slices.Equal(leaf.DNSNames, c.DNS) ||
		len(leaf.IPAddresses) != len(c.IPs) || len(leaf.URIs) != 1 || leaf.URIs[0].String() != c.URI {
		return issue.Credential{}, errors.New("workload CA: the authority signed another certificate than was ordered")
	}

	field := func(name string, ders ...[]byte) issue.Field {
		return issue.Field{Name: name, Value: secret.New(encode(ders...)), Public: true}
	}
	return issue.Credential{
		Handle: issue.Handle{Lease: o.Lease, Scope: scope.Name, Ref: o.Prepared.Ref, Expires: leaf.NotAfter, Issued: o.Now},
		Fields: []issue.Field{field("ca", i.root.Raw), field("certificate", leaf.Raw), field("chain", leaf.Raw, i.issuer.Raw)},
		Names:  map[string]string{serialName: c.Serial, "spiffe": c.URI}, NotBefore: c.NotBefore, Whole: true,
	}, nil
}

func (i *Issuer) content(scope *policy.Scope, source *Source, o issue.Order, serial string) content {
	c := content{
		Serial: serial, DNS: append([]string{}, source.DNS...), IPs: append([]string{}, source.IPs...),
		URI:       (&url.URL{Scheme: "spiffe", Host: i.TrustDomain, Path: "/host/" + o.Host + "/" + scope.Name}).String(),
		NotBefore: o.Now.Add(-backdate).UTC().Truncate(time.Second), NotAfter: o.Now.Add(scope.TTL).UTC().Truncate(time.Second),
	}
	if len(c.DNS) > 0 && len(c.DNS[0]) <= maxCommonName {
		c.CommonName = c.DNS[0]
	}
	return c
}

// sign takes the way that the authority checks: a one-use token, bound to the
// request, authorizes exactly this certificate. An error means that nothing was
// signed.
func (i *Issuer) sign(ctx context.Context, c content, csr []byte) ([]*x509.Certificate, error) {
	if _, err := parseSerial(c.Serial); err != nil {
		return nil, err
	}
	if c.NotAfter.After(i.issuer.NotAfter) {
		return nil, fmt.Errorf("%w: the issuer's certificate ends at %s, before what it would sign: \"Rotate CAs\" in docs/OPERATIONS.md says how to make a new one", issue.ErrConfig, i.issuer.NotAfter)
	}
	request, err := parseCSR(csr)
	if err != nil {
		return nil, err
	}
	select {
	case i.signing <- struct{}{}:
		defer func() { <-i.signing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	token, spent, err := i.token(c.URI, signAudience, &c, request.Raw)
	if err != nil {
		return nil, err
	}
	defer spent()
	options, err := i.authority.Authorize(provisioner.NewContextWithMethod(ctx, provisioner.SignMethod), token)
	if err != nil {
		return nil, err
	}
	return i.authority.SignWithContext(ctx, request, provisioner.SignOptions{}, options...)
}
