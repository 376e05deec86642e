package ekcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

func ekOf(t testing.TB, key crypto.PublicKey) tpm.EK {
	t.Helper()
	return tpm.EK{Public: check.Must(x509.MarshalPKIXPublicKey(key))(t)}
}

// certified makes an EK of one kind and a certificate of it.
func certified(t testing.TB, ca *lab.TPMCA, kind tpm.KeyAlgorithm) (tpm.EK, *x509.Certificate) {
	t.Helper()
	var key crypto.PublicKey
	switch kind {
	case tpm.RSA2048:
		key = check.Must(rsa.GenerateKey(rand.Reader, 2048))(t).Public()
	case tpm.P384:
		key = check.Must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t).Public()
	default:
		key = check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t).Public()
	}
	der := check.Must(ca.IssueEK(key))(t)
	return ekOf(t, key), check.Must(x509.ParseCertificate(der))(t)
}

func newCA(t testing.TB) *lab.TPMCA {
	t.Helper()
	return check.Must(lab.NewTPMCA(t.TempDir()))(t)
}

// Two keys of real TPMs, under whose URLs the makers serve certificates. Both
// pairs are public: tpm2-tools and go-attestation test with them.
const (
	intelKey = `-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAwyDi8kSoYBqs8+AdJsZl
JJk1Vi3h2hl+nn8HbEaWE8+2U+mOwsOG/B0TPyyMbMM4tzLwsgi9g4qHej5bvD4d
QIToNcfIkGocBbTS0w/b68HbrZUPprFlvUtqhkYDFGFkwMT1nUiQEe8fko3upukA
YfPTdeVkYnMVHvYiJSCYvhpKsB3AoSInxgn9rOsRWvQI1Gk6b0mRl3RpWwwSvBih
/3EgpzN7L7XxlR2Lt/CU1bVUwRyVI7MHKf5keH0KE7nmMEiNq039hmNKUnDscvzF
pE3GeajzKTjdgZfina6Dn1tMoPXeJ8lSLCPFThws5XhZUlEYvURwsYGA7veK5CZ7
zQIDAQAB
-----END PUBLIC KEY-----`
	amdKey = `-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAo8ID3MRLZQWgq2WIK1qT
e2HQxzZgiDWn6Tzw6uQOoXI1iyO9pxIailRxll2NeK1lRVP/dEKCV+mGwv75T+y2
MmzpFhUY/O5RtEG8TiocDw6WkHRAJ9A9h1OMP+vD3mPClNoA9/ssB36/0ScmVtYR
0gRkL+cZkAT6qro7xz4eRKLt8KfX6OG/Y9kCfJsKDCtYbc4OavHSf11VgbBLtxm7
jSVE+pnO+x/om6qwACjZbU4qrq4PUbAxD1S9dJ2cZzKaYSsCA8wMIho0umYa3jGv
eptunXDcE993BlsUGjLNbXC4aWVEtgo9yu98gKqhYGFEx7Mtk5NYOvWoNvcUBe2L
2QIDAQAB
-----END PUBLIC KEY-----`
)

func TestURLOfRealKeys(t *testing.T) {
	for _, tt := range []struct{ manufacturer, key, want string }{
		{"INTC", intelKey, "https://ekop.intel.com/ekcertservice/WVEG2rRwkQ7m3RpXlUphgo6Y2HLxl18h6ZZkkOAdnBE%3D"},
		{"AMD", amdKey, "https://ftpm.amd.com/pki/aia/d027b3ce6a9b6b56846d2b9935884a88"},
	} {
		block, _ := pem.Decode([]byte(tt.key))
		if got, err := URL(tt.manufacturer, tpm.EK{Public: block.Bytes}); got != tt.want || err != nil {
			t.Errorf("%s: %s, %v; want %s", tt.manufacturer, got, err, tt.want)
		}
	}
}

// ECC keys are hashed as x and y in full length, also where these begin with
// zeros.
func TestURLOfECCKeys(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		var xy []byte
		var key *ecdsa.PrivateKey
		for len(xy) == 0 || xy[0] != 0 {
			key = check.Must(ecdsa.GenerateKey(curve, rand.Reader))(t)
			xy = check.Must(key.PublicKey.Bytes())(t)[1:]
		}
		ek := ekOf(t, key.Public())

		digest := sha256.Sum256(xy)
		want := "https://ekop.intel.com/ekcertservice/" + strings.ReplaceAll(base64.URLEncoding.EncodeToString(digest[:]), "=", "%3D")
		if got, err := URL("INTC", ek); got != want || err != nil {
			t.Errorf("Intel: %s, %v; want %s", got, err, want)
		}
		digest = sha256.Sum256(append([]byte{0, 0, 0x44, 0x44}, xy...))
		want = "https://ftpm.amd.com/pki/aia/" + hex.EncodeToString(digest[:16])
		if got, err := URL("AMD", ek); got != want || err != nil {
			t.Errorf("AMD: %s, %v; want %s", got, err, want)
		}
	}
}

func TestNoURL(t *testing.T) {
	ek, _ := certified(t, newCA(t), tpm.P256)
	for _, manufacturer := range []string{"IBM", "STM", "", "intc"} {
		var none *NoServiceError
		if got, err := URL(manufacturer, ek); got != "" || !errors.As(err, &none) {
			t.Errorf("%q: %s, %v", manufacturer, got, err)
		}
	}
	if got, err := URL("INTC", tpm.EK{Public: []byte("garbage")}); got != "" || err == nil {
		t.Errorf("garbage: %s", got)
	}
}

func intelJSON(der []byte) string {
	return `{"pubhash":"x%3D","certificate":"` + strings.ReplaceAll(base64.URLEncoding.EncodeToString(der), "=", "%3D") + `"}`
}

func TestParse(t *testing.T) {
	_, cert := certified(t, newCA(t), tpm.RSA2048)
	block := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	url64 := base64.URLEncoding.EncodeToString(cert.Raw)
	huge := make([]byte, tpm.MaxCertificate+1)
	huge[0] = derSequence

	for name, tt := range map[string]struct{ answer, problem string }{
		"DER":                  {string(cert.Raw), ""},
		"PEM":                  {block, ""},
		"PEM, spaces around":   {"\r\n " + block + "\n\n", ""},
		"Intel":                {intelJSON(cert.Raw), ""},
		"Intel, plain padding": {`{"certificate":"` + url64 + `"}`, ""},
		"Intel, no padding":    {`{"certificate":"` + strings.TrimRight(url64, "=") + `"}`, ""},
		"Intel, other fields":  {`{"a":{"certificate":1},"certificate":"` + url64 + `","b":[{}]}`, ""},

		"nothing":                     {"", "empty"},
		"spaces":                      {" \n", "empty"},
		"HTML":                        {"<!DOCTYPE html><html>Access denied</html>", `neither DER, PEM nor JSON; it begins with "<!DOCTYPE html>`},
		"a terminal's controls":       {"\x1b]0;owned\x07", `"\x1b]0;owned\a"`},
		"DER, garbage behind":         {string(cert.Raw) + "x", "trailing data"},
		"DER, cut":                    {string(cert.Raw[:100]), "parse the certificate"},
		"DER, no certificate":         {"\x30\x00", "parse the certificate"},
		"too large":                   {string(huge), "has 8193 bytes"},
		"PEM of a key":                {string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}})), "not a CERTIFICATE"},
		"PEM, empty":                  {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE"})), "empty"},
		"PEM, damaged":                {"-----BEGIN CERTIFICATE-----\n!\n", "damaged"},
		"PEM, two":                    {block + block, "something follows"},
		"JSON, no certificate":        {`{"pubhash":"x","Certificate":"` + url64 + `"}`, `no field "certificate"`},
		"JSON, twice":                 {`{"certificate":"` + url64 + `","certificate":"` + url64 + `"}`, "comes twice"},
		"JSON, twice with an escape":  {`{"certificate":"` + url64 + `","\u0063ertificate":""}`, "comes twice"},
		"JSON, a number":              {`{"certificate":1}`, "not a string"},
		"JSON, null":                  {`{"certificate":null}`, "not a string"},
		"JSON, empty":                 {`{"certificate":""}`, "empty"},
		"JSON, wrong alphabet":        {`{"certificate":"+/+/"}`, "not base64url"},
		"JSON, garbage behind":        {intelJSON(cert.Raw) + "x", "something follows"},
		"JSON, cut":                   {intelJSON(cert.Raw)[:50], "parse JSON"},
		"JSON, garbage in the object": {`{"certificate" "x"}`, "parse JSON"},
		"JSON, deep":                  {`{"a":` + strings.Repeat("[", 20000), "parse JSON"},
		"JSON, garbage behind DER":    {intelJSON(append(cert.Raw[:len(cert.Raw):len(cert.Raw)], 0)), "trailing data"},
	} {
		got, err := Parse([]byte(tt.answer))
		if tt.problem == "" && (err != nil || !got.Equal(cert)) {
			t.Errorf("%s: %v", name, err)
		}
		if tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem)) {
			t.Errorf("%s: %v, want an error with %q", name, err, tt.problem)
		}
	}
}

// Whatever comes, reading it ends in a certificate that can be kept or in an error.
func FuzzParse(f *testing.F) {
	_, cert := certified(f, newCA(f), tpm.P256)
	f.Add(cert.Raw)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	f.Add([]byte(intelJSON(cert.Raw)))
	f.Add([]byte(`{"a":[1,{}],"certificate":null}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		got, err := Parse(answer)
		if (got == nil) == (err == nil) {
			t.Fatalf("certificate %v, error %v", got, err)
		}
		if err == nil {
			if again, err := Parse(got.Raw); err != nil || !again.Equal(got) || len(got.Raw) > tpm.MaxCertificate {
				t.Fatalf("what is kept can't be read again: %v", err)
			}
			tpm.Certifies(got, cert.RawSubjectPublicKeyInfo)
		}
	})
}

func TestKeep(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()+"/state"
	ek, cert := certified(t, ca, tpm.P256)
	other, otherCert := certified(t, ca, tpm.RSA2048)

	if _, err := Keep(dir, ek, otherCert); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("another key's: %v", err)
	}
	k := check.Must(Keep(dir, ek, cert))(t)
	if k.Unchanged || k.Replaced != "" {
		t.Errorf("first: %+v", k)
	}
	if k := check.Must(Keep(dir, ek, cert))(t); !k.Unchanged || k.Replaced != "" {
		t.Errorf("again: %+v", k)
	}

	// A newer certificate for the same key is the one that counts; the old file stays.
	newer := check.Must(x509.ParseCertificate(check.Must(ca.IssueEK(cert.PublicKey))(t)))(t)
	k = check.Must(Keep(dir, ek, newer))(t)
	if old := check.Must(os.ReadFile(k.Replaced))(t); string(old) != string(cert.Raw) {
		t.Error("the old certificate is lost")
	}
	got, problems := Complete(dir, []tpm.EK{other, ek})
	if len(problems) > 0 || string(got[0].Public) != string(ek.Public) || string(got[0].Certificate) != string(newer.Raw) || len(got[1].Certificate) > 0 {
		t.Errorf("complete: %v, %v", got, problems)
	}
}

// A host joins even if its kept files are damaged, or are another TPM's.
func TestComplete(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	bare, _ := certified(t, ca, tpm.P256)
	kept, keptCert := certified(t, ca, tpm.RSA2048)
	inTPM, tpmCert := certified(t, ca, tpm.P384)
	inTPM.Certificate = tpmCert.Raw
	check.Must(Keep(dir, kept, keptCert))(t)
	check.Must(Keep(dir, inTPM, check.Must(x509.ParseCertificate(check.Must(ca.IssueEK(tpmCert.PublicKey))(t)))(t)))(t)

	eks := []tpm.EK{bare, kept, inTPM}
	got, problems := Complete(dir, eks)
	if len(problems) > 0 || string(got[0].Certificate) != string(keptCert.Raw) || string(got[1].Certificate) != string(tpmCert.Raw) || len(got[2].Certificate) > 0 {
		t.Errorf("%v, %v", got, problems)
	}
	if len(eks[1].Certificate) > 0 {
		t.Error("the argument was changed")
	}

	for name, content := range map[string]string{
		"garbage": "garbage", "empty": "", "another key's": string(keptCert.Raw), "cut": string(keptCert.Raw[:99]), "huge": strings.Repeat("0", 2<<20),
	} {
		check.Nil(t, os.WriteFile(file(dir, bare), []byte(content), 0o600))
		got, problems := Complete(dir, eks)
		if len(problems) != 1 || len(got) != 3 || len(got[2].Certificate) > 0 {
			t.Errorf("%s: %v", name, problems)
		}
		if list := List(dir, "INTC", eks); list[0].Source != None || list[0].Problem == "" || list[1].Source != InFile || list[2].Source != InTPM {
			t.Errorf("%s: %+v", name, list)
		}
	}
	check.Nil(t, os.Remove(file(dir, bare)))
	check.Nil(t, os.Mkdir(file(dir, bare), 0o700))
	if _, problems := Complete(dir, eks); len(problems) != 1 {
		t.Errorf("a folder: %v", problems)
	}

	// Without a state folder, nothing is kept.
	if got, problems := Complete("", eks); len(problems) > 0 || len(got[2].Certificate) > 0 {
		t.Errorf("no folder: %v", problems)
	}
}
