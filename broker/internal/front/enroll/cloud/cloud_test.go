package cloud

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

var (
	rsaKey   = newRSA(2048)
	otherRSA = newRSA(2048)
	bigRSA   = newRSA(3072)
	p256     = newECC(elliptic.P256())
	p384     = newECC(elliptic.P384())
)

func newRSA(bits int) crypto.PublicKey {
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return k.Public()
}

func newECC(c elliptic.Curve) crypto.PublicKey {
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		panic(err)
	}
	return k.Public()
}

func der(key crypto.PublicKey) []byte {
	b, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		panic(err)
	}
	return b
}

func hash(key crypto.PublicKey) string { return evidence.Sum(der(key)).String() }

func pemOf(key crypto.PublicKey) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der(key)}))
}

// certificate is one for the key, as PEM.
func certificate(key crypto.PublicKey) string {
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	b, err := x509.CreateCertificate(rand.Reader, template, template, key, ca)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b}))
}

func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

type object map[string]any

func gce(name string, key crypto.PublicKey, cert string) string {
	return text(object{"name": name, "zone": "https://www.googleapis.com/compute/v1/projects/p/zones/europe-west3-a", "project": "p", "identity": object{
		"kind":                 "compute#shieldedInstanceIdentity",
		"signingKey":           object{"ekCert": "", "ekPub": pemOf(otherRSA)},
		"encryptionKey":        object{"ekCert": cert, "ekPub": pemOf(key)},
		"eccP256EncryptionKey": object{"ekPub": pemOf(p256)},
	}})
}

func aws(id, kind, format string, value []byte) string {
	return text(object{"InstanceId": id, "KeyType": kind, "KeyFormat": format, "KeyValue": base64.StdEncoding.EncodeToString(value)})
}

func azure(name string, keys ...string) string {
	return text(object{"name": name, "resource_group": "prod", "vm_id": "id-" + name, "ek_public": keys})
}

// tpmt is the public area that the first template of the algorithm makes.
func tpmt(alg tpm.KeyAlgorithm, key crypto.PublicKey, change func(*tpm2.TPMTPublic)) []byte {
	for _, template := range tpm.EKTemplates() {
		if template.Algorithm == alg {
			area, err := tpm.WithKey(template.Public, key)
			if err != nil {
				panic(err)
			}
			change(&area)
			return tpm2.Marshal(area)
		}
	}
	panic(alg)
}

func same(*tpm2.TPMTPublic) {}

func TestRead(t *testing.T) {
	const rsaType, eccType = "rsa-2048", "ecc-sec-p384"
	awsBoth := aws("i-1", rsaType, "der", der(rsaKey)) + "\n" + aws("i-1", eccType, "tpmt", tpmt(tpm.P384, p384, same))
	for _, c := range []struct {
		name, from, in string
		want           []Host
	}{
		{"gce", "gce", gce("web", rsaKey, certificate(rsaKey)),
			[]Host{{"web", []string{hash(rsaKey), hash(p256)}, map[string]string{"cloud": "gce", "zone": "europe-west3-a"}}}},
		{"aws, two answers of one VM", "aws", awsBoth,
			[]Host{{"i-1", []string{hash(rsaKey), hash(p384)}, map[string]string{"cloud": "aws"}}}},
		{"aws, RSA as TPMT", "aws", aws("i-1", rsaType, "tpmt", tpmt(tpm.RSA2048, rsaKey, same)),
			[]Host{{"i-1", []string{hash(rsaKey)}, map[string]string{"cloud": "aws"}}}},
		{"aws, the same key twice", "aws", aws("i-1", rsaType, "der", der(rsaKey)) + aws("i-1", rsaType, "tpmt", tpmt(tpm.RSA2048, rsaKey, same)),
			[]Host{{"i-1", []string{hash(rsaKey)}, map[string]string{"cloud": "aws"}}}},
		{"azure, an array behind a byte order mark", "azure", "\xef\xbb\xbf[" + azure("a", pemOf(rsaKey)) + "," + azure("b", pemOf(p384)) + "]\r\n", []Host{
			{"a", []string{hash(rsaKey)}, map[string]string{"cloud": "azure", "resource_group": "prod"}},
			{"b", []string{hash(p384)}, map[string]string{"cloud": "azure", "resource_group": "prod"}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			hosts, problems := Read(c.from, []byte(c.in))
			if len(problems) > 0 || text(hosts) != text(c.want) {
				t.Errorf("got %s, %q\nwant %s", text(hosts), problems, text(c.want))
			}
		})
	}
}

func TestProblems(t *testing.T) {
	const rsaType, eccType = "rsa-2048", "ecc-sec-p384"
	for _, c := range []struct{ name, from, in, want string }{
		{"an unknown cloud", "moon", "{}", "known are aws, azure, gce"},
		{"nothing", "gce", " ", "the input has no answers"},
		{"an empty array", "gce", "[]", "the input has no answers"},
		{"UTF-16", "gce", "\xff\xfe{\x00", "UTF-16"},
		{"garbage behind", "azure", azure("a", pemOf(rsaKey)) + "Done.", "document 2: not JSON"},
		{"cut", "azure", azure("a", pemOf(rsaKey))[:40], "document 1: not JSON"},
		{"no object", "azure", "[[]]", "document 1, item 1: "},
		{"an error answer", "gce", `{"error":{"code":403,"message":"no permission"}}`, "no permission"},
		{"an error beside keys", "azure", strings.TrimSuffix(azure("a", pemOf(rsaKey)), "}") + `,"error":{"code":"x"}}`, "an error message"},
		{"a name twice", "azure", strings.TrimSuffix(azure("a", pemOf(rsaKey)), "}") + `,"NAME":"b"}`, `document 1: "NAME" stands in it twice`},
		{"keys twice", "azure", strings.TrimSuffix(azure("a", pemOf(rsaKey)), "}") + `,"ek_public":["x"]}`, `"ek_public" stands in it twice`},
		{"an identity twice", "gce", strings.TrimSuffix(gce("a", rsaKey, ""), "}") + `,"Identity":{}}`, `"Identity" stands in it twice`},
		{"a value twice", "aws", strings.TrimSuffix(aws("i-1", rsaType, "der", der(rsaKey)), "}") + `,"KeyValue":"x"}`, `"KeyValue" stands in it twice`},
		{"null", "aws", "null", "document 1: InstanceId is missing"},

		{"gce, not wrapped", "gce", `{"kind":"compute#shieldedInstanceIdentity"}`, "name or zone is missing"},
		{"gce, no keys", "gce", `{"name":"a","zone":"z","identity":{"encryptionKey":{"ekPub":""}}}`, "is it a Shielded VM"},
		{"gce, not PEM", "gce", `{"name":"a","zone":"z","identity":{"encryptionKey":{"ekPub":"x"}}}`, "a: encryptionKey: ekPub: not PEM"},
		{"gce, another key's certificate", "gce", gce("a", rsaKey, certificate(otherRSA)), "ekCert is for another key"},
		{"gce, no certificate", "gce", gce("a", rsaKey, "x"), "ekCert: not PEM"},
		{"gce, RSA-3072", "gce", gce("a", bigRSA, ""), "an RSA key of 3072 bits"},
		{"gce, an instance twice", "gce", gce("a", rsaKey, "") + gce("a", rsaKey, ""), "document 2: a: it is in document 1 already"},
		{"gce, a key of two instances", "gce", gce("a", rsaKey, "") + gce("b", rsaKey, ""), "is also that of the VM in document 1"},

		{"aws, bad base64", "aws", `{"InstanceId":"i-1","KeyType":"rsa-2048","KeyFormat":"der","KeyValue":"%"}`, "i-1: KeyValue: illegal base64"},
		{"aws, unknown type", "aws", aws("i-1", "dsa", "der", nil), `KeyType "dsa"`},
		{"aws, unknown format", "aws", aws("i-1", rsaType, "pem", nil), `KeyFormat "pem"`},
		{"aws, another type", "aws", aws("i-1", eccType, "der", der(rsaKey)), "KeyType is ecc-sec-p384 and the key is rsa-2048"},
		{"aws, RSA-3072", "aws", aws("i-1", rsaType, "der", der(bigRSA)), "an RSA key of 3072 bits"},
		{"aws, two keys of a type", "aws", aws("i-1", rsaType, "der", der(rsaKey)) + aws("i-1", rsaType, "der", der(otherRSA)), "two different keys of type rsa-2048"},
		{"aws, no public area", "aws", aws("i-1", rsaType, "tpmt", []byte{0, 1}), "TPMT_PUBLIC: "},
		{"aws, long public area", "aws", aws("i-1", rsaType, "tpmt", make([]byte, 2000)), "a TPMT_PUBLIC of 2000 bytes"},
		{"aws, something behind", "aws", aws("i-1", rsaType, "tpmt", append(tpmt(tpm.RSA2048, rsaKey, same), 0)), "TPMT_PUBLIC"},
		{"aws, another policy", "aws", aws("i-1", rsaType, "tpmt", tpmt(tpm.RSA2048, rsaKey, func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) })), "no EK template"},
		{"aws, other attributes", "aws", aws("i-1", rsaType, "tpmt", tpmt(tpm.RSA2048, rsaKey, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })), "no EK template"},
		{"aws, a point off the curve", "aws", aws("i-1", eccType, "tpmt", tpmt(tpm.P384, p384, func(p *tpm2.TPMTPublic) {
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte{1}}, Y: tpm2.TPM2BECCParameter{Buffer: []byte{1}}})
		})), "i-1: "},

		{"azure, no name", "azure", `{"ek_public":[]}`, "name or vm_id is missing"},
		{"azure, no keys", "azure", azure("a"), "ek_public has 0 keys"},
		{"azure, a certificate", "azure", azure("a", certificate(rsaKey)), `PEM of "CERTIFICATE"`},
		{"azure, two keys in one", "azure", azure("a", pemOf(rsaKey)+pemOf(p256)), "something follows the key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			hosts, problems := Read(c.from, []byte(c.in))
			if len(hosts) > 0 || !strings.Contains(strings.Join(problems, "\n"), c.want) {
				t.Errorf("got %d hosts, %q, want %q", len(hosts), problems, c.want)
			}
		})
	}
}

// All problems are listed, and the good answers between them add nobody.
func TestEveryProblem(t *testing.T) {
	in := strings.Join([]string{`{"InstanceId":"i-1"}`, aws("i-2", "rsa-2048", "der", der(rsaKey)), `{}`}, "\n")
	if hosts, problems := Read("aws", []byte(in)); len(hosts) != 0 || len(problems) != 2 {
		t.Errorf("%v, %q", hosts, problems)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(gce("a", rsaKey, certificate(rsaKey))))
	f.Add([]byte(aws("i-1", "ecc-sec-p384", "tpmt", tpmt(tpm.P384, p384, same))))
	f.Add(bytes.Repeat([]byte("["), 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, from := range Names() {
			if hosts, problems := Read(from, b); (len(hosts) == 0) == (len(problems) == 0) {
				t.Errorf("%v, %q", hosts, problems)
			}
		}
	})
}
