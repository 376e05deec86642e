package lab

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

var (
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidSAN           = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// A TPMCA stands for a TPM maker's: a root and an intermediate that certifies
// endorsement keys. Its keys are RSA because swtpm_localca signs with them too.
type TPMCA struct {
	Root         *x509.Certificate
	Intermediate *x509.Certificate
	key          *rsa.PrivateKey
	dir          string
}

// NewTPMCA makes a CA and keeps what swtpm_localca needs of it in dir.
func NewTPMCA(dir string) (*TPMCA, error) {
	rootKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	root, err := caCertificate("Lab TPM root", rootKey.Public(), nil, rootKey)
	if err != nil {
		return nil, err
	}
	intermediate, err := caCertificate("Lab TPM intermediate", key.Public(), root, rootKey)
	if err != nil {
		return nil, err
	}
	ca := &TPMCA{Root: root, Intermediate: intermediate, key: key, dir: dir}
	return ca, ca.writeLocalCA()
}

// Pools are what a verifier is configured with.
func (ca *TPMCA) Pools() (roots, intermediates *x509.CertPool) {
	roots, intermediates = x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(ca.Root)
	intermediates.AddCert(ca.Intermediate)
	return roots, intermediates
}

// PEM is root and intermediate, for a broker's configuration.
func (ca *TPMCA) PEM() (root, intermediate []byte) {
	return certificatePEM(ca.Root), certificatePEM(ca.Intermediate)
}

// OnDie is a maker's CA inside one machine, as firmware TPMs of Intel have it:
// each level certifies the next, and only the machine's TPM holds these
// certificates. chain is what is in its NV memory: the certificates in DER, the
// one below this CA first.
func (ca *TPMCA) OnDie() (inside *TPMCA, chain []byte, err error) {
	inside = ca
	for _, name := range []string{"Lab ROM CA", "Lab kernel CA", "Lab TPM CA"} {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return nil, nil, err
		}
		cert, err := caCertificate(name, key.Public(), inside.Intermediate, inside.key)
		if err != nil {
			return nil, nil, err
		}
		inside = &TPMCA{Root: ca.Root, Intermediate: cert, key: key}
		chain = append(chain, cert.Raw...)
	}
	return inside, chain, nil
}

// IssueEK certifies an endorsement key the way makers do, with a critical
// subject alternative name that holds the TPM's make. Each edit changes the
// certificate before it is signed: that is how a test forges one.
func (ca *TPMCA) IssueEK(key crypto.PublicKey, edits ...func(*x509.Certificate)) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	san, err := tpmSAN()
	if err != nil {
		return nil, err
	}
	usage := x509.KeyUsageKeyAgreement
	if _, ok := key.(*rsa.PublicKey); ok {
		usage = x509.KeyUsageKeyEncipherment
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(10, 0, 0),
		KeyUsage:              usage,
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{oidEKCertificate},
		BasicConstraintsValid: true,
		ExtraExtensions:       []pkix.Extension{{Id: oidSAN, Critical: true, Value: san}},
	}
	for _, edit := range edits {
		edit(template)
	}
	return x509.CreateCertificate(rand.Reader, template, ca.Intermediate, key, ca.key)
}

// tpmSAN is a directory name with the TPM's manufacturer, model and version
// (TCG EK credential profile, section 3.1.2).
func tpmSAN() ([]byte, error) {
	attribute := func(last int, value string) pkix.RelativeDistinguishedNameSET {
		return pkix.RelativeDistinguishedNameSET{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, last}, Value: value}}
	}
	name, err := asn1.Marshal(pkix.RDNSequence{attribute(1, "id:4C414230"), attribute(2, "lab"), attribute(3, "id:00010002")})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
}

func caCertificate(name string, key crypto.PublicKey, parent *x509.Certificate, signer crypto.Signer) (*x509.Certificate, error) {
	id, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          id,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().AddDate(-1, 0, 0),
		NotAfter:              time.Now().AddDate(20, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func certificatePEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// setupConfig is the path of swtpm_setup's configuration.
func (ca *TPMCA) setupConfig() string { return filepath.Join(ca.dir, "swtpm_setup.conf") }

// writeLocalCA configures swtpm_localca to sign with this CA's key.
func (ca *TPMCA) writeLocalCA() error {
	if err := os.MkdirAll(ca.dir, 0o700); err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(ca.dir, name) }
	key := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(ca.key)})
	for name, content := range map[string]string{
		"signkey.pem":      string(key),
		"issuercert.pem":   string(certificatePEM(ca.Intermediate)),
		"options":          "--platform-manufacturer Lab\n--platform-version 1\n--platform-model Lab\n",
		"localca.conf":     fmt.Sprintf("statedir = %s\nsigningkey = %s\nissuercert = %s\ncertserial = %s\n", ca.dir, in("signkey.pem"), in("issuercert.pem"), in("certserial")),
		"swtpm_setup.conf": fmt.Sprintf("create_certs_tool = swtpm_localca\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\nactive_pcr_banks = sha1,sha256\n", in("localca.conf"), in("options")),
	} {
		if err := os.WriteFile(in(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}
