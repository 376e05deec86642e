package vendors

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/test/check"
)

var now = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// A ca is a vendor's CA of the tests.
type ca struct {
	cert *x509.Certificate
	key  crypto.Signer
}

type change func(*x509.Certificate)

// newCA makes a CA under another, or one that signs itself.
func newCA(t testing.TB, name string, under *ca, changes ...change) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return newCAWith(t, name, under, key, changes...)
}

func newCAWith(t testing.TB, name string, under *ca, key crypto.Signer, changes ...change) *ca {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + int64(len(name))),
		Subject:      pkix.Name{Organization: []string{strings.Fields(name)[0]}, CommonName: name},
		NotBefore:    now.AddDate(-1, 0, 0), NotAfter: now.AddDate(10, 0, 0),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	for _, c := range changes {
		c(template)
	}
	parent, signer := template, key
	if under != nil {
		parent, signer = under.cert, under.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert, key}
}

func asPEM(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// isEK makes a certificate one of an endorsement key, with the URL of its issuer.
func isEK(c *x509.Certificate) {
	c.IsCA, c.KeyUsage = false, x509.KeyUsageKeyEncipherment
	c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}
	c.IssuingCertificateURL = []string{"http://vendor.example/issuer.crt"}
}

func TestFormats(t *testing.T) {
	root := newCA(t, "Acme root", nil)
	between := newCA(t, "Acme between", root)
	p7, err := pkcs7.DegenerateCertificate(slices.Concat(root.cert.Raw, between.cert.Raw))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"pem":              asPEM(root.cert, between.cert),
		"pem with text":    slices.Concat([]byte("Acme's\n"), asPEM(root.cert), []byte("and\n"), asPEM(between.cert)),
		"pem, CRLF":        bytes.ReplaceAll(asPEM(root.cert, between.cert), []byte("\n"), []byte("\r\n")),
		"pkcs7 der":        p7,
		"pkcs7 pem":        pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: p7}),
		"pkcs7 and a cert": slices.Concat(pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: p7}), asPEM(root.cert)),
	} {
		items, err := Read("file", data, now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		taken := 0
		for _, item := range items {
			if item.LeftOut != "" {
				t.Errorf("%s: %s: left out: %s", name, item.Subject, item.LeftOut)
				continue
			}
			taken++
			if item.Vendor != "Acme" || item.Root != item.cert.Equal(root.cert) {
				t.Errorf("%s: %+v", name, item)
			}
		}
		if taken < 2 {
			t.Errorf("%s: %d taken, want the root and the intermediate", name, taken)
		}
	}
	if items, _ := Read("file", root.cert.Raw, now); len(items) != 1 || items[0].LeftOut != "" {
		t.Errorf("DER: %+v", items)
	}
}

// What can't be used is left out with a reason, and keeps nothing else out.
func TestLeftOut(t *testing.T) {
	root := newCA(t, "Acme root", nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaRoot := newCAWith(t, "Acme rsa", nil, rsaKey)
	sha1 := newCA(t, "Acme sha1", rsaRoot, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA1WithRSA })
	// signedWith is a CA's certificate that names another algorithm of RSA (PKCS #1).
	signedWith := func(arc byte) []byte {
		sha256 := newCA(t, "Acme intermediate", rsaRoot).cert.Raw
		oid := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bytes.ReplaceAll(sha256, append(oid, 11), append(oid, arc))})
	}
	broken := bytes.Clone(root.cert.Raw)
	broken[30] ^= 0xff
	text := asPEM(root.cert)

	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"expired":   {asPEM(newCA(t, "Acme old", nil, func(c *x509.Certificate) { c.NotAfter = now.AddDate(0, 0, -1) }).cert), "expired on 2026-10-31"},
		"early":     {asPEM(newCA(t, "Acme new", nil, func(c *x509.Certificate) { c.NotBefore = now.AddDate(0, 0, 1) }).cert), "valid from 2026-11-02"},
		"no CA":     {asPEM(newCA(t, "Acme ek", root, isEK).cert), "isn't a CA's"},
		"sha1":      {asPEM(sha1.cert), "SHA1-RSA"},
		"md2":       {signedWith(2), "no chain may rest on"},
		"md5":       {signedWith(4), "MD5-RSA"},
		"unknown":   {signedWith(99), "no chain may rest on"},
		"odd der":   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: broken}), "can't be read"},
		"a key":     {pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte{1}}), "holds no certificate"},
		"cut":       {text[:len(text)/2], "damaged"},
		"bad pkcs7": {pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: []byte{0x30, 0x80}}), "PKCS#7"},
	} {
		items, err := Read("file", slices.Concat(test.data, []byte("\n"), text), now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		reasons, taken := "", 0
		for _, item := range items {
			reasons += item.LeftOut
			if item.LeftOut == "" {
				taken++
			}
		}
		if !strings.Contains(reasons, test.want) || name != "cut" && taken != 1 {
			t.Errorf("%s: %d taken, left out: %q, want %q", name, taken, reasons, test.want)
		}
	}
	for _, data := range [][]byte{nil, {0}, []byte("<html>"), bytes.Repeat([]byte{0x30}, 4096), append(bytes.Clone(root.cert.Raw), 0)} {
		if items, err := Read("file", data, now); err != nil || len(items) != 1 || items[0].LeftOut == "" {
			t.Errorf("%.10x: %+v, %v", data, items, err)
		}
	}
}

// An old root may be signed with SHA-1: its own signature proves nothing.
func TestRootWithSHA1(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	root := newCAWith(t, "Acme root", nil, key, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA1WithRSA })
	file := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(file, asPEM(root.cert), 0o600); err != nil {
		t.Fatal(err)
	}
	set, err := Load([]string{file})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := set.Check(newCA(t, "Acme ek", root, isEK).cert.Raw, now)
	if err != nil || chain.Verdict != Certified {
		t.Errorf("%+v, %v", chain, err)
	}
}

// A damaged block is an error: the decoder would pass over it, and the broker
// would start with fewer roots than its config names.
func TestLoadDamaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "roots.pem")
	root := asPEM(newCA(t, "Acme root", nil).cert)
	for name, data := range map[string][]byte{"cut": root[:len(root)-30], "not base64": bytes.Replace(root, []byte("\nMII"), []byte("\n*II"), 1)} {
		if err := os.WriteFile(file, slices.Concat(root, data), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load([]string{file}); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMergeKeepsWhatIsThere(t *testing.T) {
	root, other := newCA(t, "Acme root", nil), newCA(t, "Other-----END root\nX", nil)
	out := filepath.Join(t.TempDir(), "roots.pem")
	before := append([]byte("# written by hand\n"), bytes.TrimSpace(asPEM(root.cert))...)
	if err := os.WriteFile(out, before, 0o600); err != nil {
		t.Fatal(err)
	}
	items, err := Read("file", asPEM(root.cert, other.cert, other.cert), now)
	if err != nil {
		t.Fatal(err)
	}
	added, err := Merge(out, items)
	if err != nil || added != 1 || !strings.Contains(items[0].LeftOut, "already") || !strings.Contains(items[2].LeftOut, "already") {
		t.Errorf("added %d, %v: %+v", added, err, items)
	}
	after, err := os.ReadFile(out)
	if err != nil || !bytes.HasPrefix(after, before) {
		t.Errorf("what was there is changed: %v\n%s", err, after)
	}
	if set, err := Load([]string{out}); err != nil || len(set.All) != 2 {
		t.Errorf("the file holds %d certificates, %v", len(set.All), err)
	}

	if err := os.WriteFile(out, []byte("not PEM\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	items, _ = Read("file", asPEM(other.cert), now)
	if _, err := Merge(out, items); err == nil {
		t.Error("a file that can't be read was added to")
	}
	if after, _ := os.ReadFile(out); string(after) != "not PEM\n" {
		t.Errorf("a file that can't be read was changed: %s", after)
	}
}

// The file is replaced where a link leads, with the mode that it had, and by way
// of no name that another user could have put a link at.
func TestMergeInSharedFolder(t *testing.T) {
	dir := t.TempDir()
	target, out, victim := filepath.Join(dir, "target.pem"), filepath.Join(dir, "roots.pem"), filepath.Join(dir, "victim")
	for name, data := range map[string][]byte{target: asPEM(newCA(t, "Acme root", nil).cert), victim: []byte("precious")} {
		if err := os.WriteFile(name, data, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{out: target, filepath.Join(dir, ".new-roots.pem"): victim, filepath.Join(dir, ".new-target.pem"): victim} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	items := check.Must(Read("file", asPEM(newCA(t, "Other root", nil).cert), now))(t)
	if added, err := Merge(out, items); err != nil || added != 1 {
		t.Fatal(added, err)
	}
	if data := check.Must(os.ReadFile(victim))(t); string(data) != "precious" {
		t.Errorf("another file was written: %.40q", data)
	}
	if info := check.Must(os.Lstat(out))(t); info.Mode()&os.ModeSymlink == 0 {
		t.Error("the link was replaced")
	}
	if info := check.Must(os.Stat(target))(t); info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", info.Mode())
	}
	if set, err := Load([]string{target}); err != nil || len(set.All) != 2 {
		t.Errorf("%d certificates, %v", len(set.All), err)
	}
}

func TestCheck(t *testing.T) {
	root := newCA(t, "Acme root", nil)
	between := newCA(t, "Acme between", root)
	ek := newCA(t, "ek", between, isEK).cert
	for name, test := range map[string]struct {
		set     Set
		verdict string
		links   int
		missing string
	}{
		"whole":            {NewSet([]*x509.Certificate{between.cert, root.cert}), Certified, 3, ""},
		"no intermediate":  {NewSet([]*x509.Certificate{root.cert}), NotCertified, 1, "CN=Acme between,O=Acme"},
		"no root":          {NewSet([]*x509.Certificate{between.cert}), NotCertified, 2, "CN=Acme root,O=Acme"},
		"nothing":          {Set{}, NotCertified, 1, "CN=Acme between,O=Acme"},
		"same name, other": {NewSet([]*x509.Certificate{root.cert, newCA(t, "Acme between", root).cert}), NotCertified, 1, "CN=Acme between,O=Acme"},
	} {
		for _, given := range [][]byte{ek.Raw, asPEM(ek)} {
			chain, err := test.set.Check(given, now)
			if err != nil || chain.Verdict != test.verdict || len(chain.Links) != test.links || chain.Missing != test.missing {
				t.Errorf("%s: %+v, %v", name, chain, err)
			}
			if test.missing == "CN=Acme between,O=Acme" && !slices.Equal(chain.IssuerAt, ek.IssuingCertificateURL) {
				t.Errorf("%s: the missing issuer is at %v", name, chain.IssuerAt)
			}
		}
	}
	// Certificates that the TPM holds lead on, and are nobody's root.
	run := slices.Concat(between.cert.Raw, root.cert.Raw, make([]byte, 40), bytes.Repeat([]byte{0xff}, 40))
	for _, given := range [][]byte{run, asPEM(between.cert, root.cert)} {
		issuers, err := Issuers(given)
		if err != nil || len(issuers) != 2 {
			t.Fatalf("%d issuers, %v", len(issuers), err)
		}
		if chain, err := NewSet([]*x509.Certificate{root.cert}).With(issuers).Check(ek.Raw, now); err != nil || chain.Verdict != Certified {
			t.Errorf("with what the TPM holds: %+v, %v", chain, err)
		}
		for name, set := range map[string]Set{"no roots": {}, "another root": NewSet([]*x509.Certificate{newCA(t, "Beta root", nil).cert})} {
			if chain, err := set.With(issuers).Check(ek.Raw, now); err != nil || chain.Verdict != NotCertified {
				t.Errorf("%s, and a root that the TPM holds: %+v, %v", name, chain, err)
			}
		}
	}
	for _, odd := range [][]byte{nil, []byte("<html>"), append(bytes.Clone(between.cert.Raw), "garbage"...)} {
		if issuers, err := Issuers(odd); err == nil {
			t.Errorf("%d issuers in %.20q", len(issuers), odd)
		}
	}
	if chain, err := NewSet([]*x509.Certificate{root.cert}).Check(between.cert.Raw, now); err != nil || chain.Verdict != NotCertified {
		t.Errorf("a CA's certificate: %+v, %v", chain, err)
	}
}

// cabinet has gcab make a cabinet of files with many blocks, and osslsigncode
// sign it.
func cabinet(t testing.TB, signer *ca, flags ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	root := newCA(t, "Acme root", nil)
	between := newCA(t, "Acme between", root)
	for name, data := range map[string][]byte{
		"Acme/RootCA/root.crt":     root.cert.Raw,
		"Acme/Intermediate/b.cer":  between.cert.Raw,
		"Beta/RootCA/beta.crt":     newCA(t, "Beta root", nil).cert.Raw,
		"Beta/RootCA/odd.crt":      []byte("garbage"),
		"Beta/long.txt":            bytes.Repeat([]byte("a line that comes again and again\n"), 5000),
		"setup.ps1":                []byte("# nothing\n"),
		"Acme/Intermediate/b2.cer": between.cert.Raw,
	} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command := func(name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	command("gcab", slices.Concat([]string{"-c"}, flags, []string{"plain.cab", "Acme/RootCA/root.crt", "Acme/Intermediate/b.cer", "Beta/RootCA/beta.crt",
		"Beta/RootCA/odd.crt", "Beta/long.txt", "Acme/Intermediate/b2.cer", "setup.ps1"})...)
	file := "plain.cab"
	if signer != nil {
		leaf := newCAWith(t, "Signer leaf", signer, check.Must(rsa.GenerateKey(rand.Reader, 2048))(t), func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.ExtKeyUsage = false, x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
			c.NotAfter = time.Now().AddDate(1, 0, 0)
		})
		key := check.Must(x509.MarshalPKCS8PrivateKey(leaf.key))(t)
		for name, data := range map[string][]byte{"leaf.pem": asPEM(leaf.cert), "leaf.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		command("osslsigncode", "sign", "-certs", "leaf.pem", "-key", "leaf.key", "-h", "sha256", "-in", "plain.cab", "-out", "signed.cab")
		file = "signed.cab"
	}
	return check.Must(os.ReadFile(filepath.Join(dir, file)))(t)
}

func TestCabinet(t *testing.T) {
	signer := newCAWith(t, "Signer root", nil, check.Must(rsa.GenerateKey(rand.Reader, 2048))(t))
	signers := x509.NewCertPool()
	signers.AddCert(signer.cert)
	for _, flags := range [][]string{{"-z"}, nil} { // MSZIP, stored
		signed := cabinet(t, signer, flags...)
		items, err := read("t.cab", signed, signers, now)
		if err != nil {
			t.Fatal(err)
		}
		text := ""
		for _, item := range items {
			text += fmt.Sprintf("%s %s %v %s\n", item.Vendor, item.Source, item.Root, item.LeftOut)
		}
		for _, want := range []string{
			"Acme t.cab:Acme/RootCA/root.crt true \n", "Acme t.cab:Acme/Intermediate/b.cer false \n", "Beta t.cab:Beta/RootCA/beta.crt true \n",
			"Beta t.cab:Beta/RootCA/odd.crt false it is neither", "t.cab:setup.ps1 false it isn't a certificate's file\n",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%v: %q isn't in\n%s", flags, want, text)
			}
		}
		if _, err := Read("t.cab", signed, now); err == nil || !strings.Contains(err.Error(), "isn't signed by Microsoft") {
			t.Errorf("a stranger's signature: %v", err)
		}

		// Every byte that a signature covers: one wrong, and nothing is taken.
		for at := 60; at < len(signed)-4000; at += 97 {
			forged := bytes.Clone(signed)
			forged[at] ^= 1
			if items, err := read("t.cab", forged, signers, now); err == nil {
				t.Fatalf("a cabinet with byte %d changed gave %d items", at, len(items))
			}
		}
	}
	if _, err := read("t.cab", cabinet(t, nil, "-z"), signers, now); err == nil || !strings.Contains(err.Error(), "isn't signed") {
		t.Errorf("no signature: %v", err)
	}
}

func TestOtherCompression(t *testing.T) {
	data := cabinet(t, nil, "-z")
	for method, name := range map[byte]string{2: "Quantum", 3: "LZX", 7: "method 7"} {
		data[cabHeader+6] = method
		if _, err := unpack(data); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "cabextract -d") {
			t.Errorf("method %d: %v", method, err)
		}
	}
}

func TestMicrosoftsRoots(t *testing.T) {
	if microsoft() == nil { // it panics where the file and the fingerprints differ
		t.Error("no roots")
	}
}

func FuzzRead(f *testing.F) {
	root := newCA(f, "Acme root", nil)
	f.Add(asPEM(root.cert))
	f.Add(root.cert.Raw)
	f.Add(check.Must(pkcs7.DegenerateCertificate(root.cert.Raw))(f))
	f.Add(cabinet(f, nil, "-z"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = Read("file", data, now)
		_, _ = unpack(data)
	})
}

// Names are somebody else's: whatever they are, the broker can read the file.
func TestNamesInComments(t *testing.T) {
	for _, name := range []string{"---------BEGIN CERTIFICATE-----", "-----END X\n-----BEGIN Y", "\x1b]0;x\x07\u202eevil", strings.Repeat("-", 300)} {
		out := filepath.Join(t.TempDir(), "roots.pem")
		root := newCA(t, "Acme root", nil, func(c *x509.Certificate) {
			c.Subject = pkix.Name{Organization: []string{name}, CommonName: name}
		})
		for range 2 { // what was written is read again
			if _, err := Merge(out, []Item{judge("file", "", root.cert, now), judge("file", name, newCA(t, "Acme other", nil).cert, now)}); err != nil {
				t.Errorf("%q: %v", name, err)
			}
		}
		if set, err := Load([]string{out}); err != nil || len(set.All) != 3 {
			t.Errorf("%q: %d certificates, %v", name, len(set.All), err)
		}
		if text := check.Must(os.ReadFile(out))(t); bytes.ContainsAny(text, "\x1b\u202e") {
			t.Errorf("%q: a control code is in the file", name)
		}
	}
}

func TestMergeReplacesPlainFilesAlone(t *testing.T) {
	check.Root(t)
	dir := t.TempDir()
	items := []Item{judge("file", "", newCA(t, "Acme root", nil).cert, now)}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(dir, "null") // one of its own: what this test is about would destroy the machine's
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil && os.Getuid() == 0 {
		t.Fatal(err)
	} else if err != nil {
		device = dir
	}
	for _, out := range []string{device, dir, pipe} {
		before := check.Must(os.Stat(out))(t)
		if _, err := Merge(out, slices.Clone(items)); err == nil || !strings.Contains(err.Error(), "isn't a regular file") {
			t.Errorf("%s: %v", out, err)
		}
		if after := check.Must(os.Stat(out))(t); after.Mode() != before.Mode() {
			t.Errorf("%s is replaced: %v", out, after.Mode())
		}
	}
}

// Imports at the same time add up.
func TestMergesAtOnce(t *testing.T) {
	out := filepath.Join(t.TempDir(), "roots.pem")
	const imports = 8
	var all sync.WaitGroup
	for i := range imports {
		items := []Item{judge("file", "", newCA(t, fmt.Sprintf("Acme root %d", i), nil).cert, now)}
		all.Go(func() {
			if added, err := Merge(out, items); err != nil || added != 1 {
				t.Errorf("%d added, %v", added, err)
			}
		})
	}
	all.Wait()
	if set, err := Load([]string{out}); err != nil || len(set.All) != imports {
		t.Errorf("%d certificates of %d, %v", len(set.All), imports, err)
	}
}

func TestMergeKeepsTheOwner(t *testing.T) {
	check.Root(t)
	if os.Getuid() != 0 {
		t.Skip("only root gives files to others")
	}
	out := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(out, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(out, 1000, 1001); err != nil {
		t.Fatal(err)
	}
	if _, err := Merge(out, []Item{judge("file", "", newCA(t, "Acme root", nil).cert, now)}); err != nil {
		t.Fatal(err)
	}
	if owner, _ := owners(check.Must(os.Stat(out))(t)); owner.Uid != 1000 || owner.Gid != 1001 {
		t.Errorf("the file is now of %d:%d", owner.Uid, owner.Gid)
	}
}

// A cabinet's lengths make no room before they are compared with the file's.
func TestCabinetOfClaims(t *testing.T) {
	le := binary.LittleEndian
	for _, at := range []int{8, 16, cabHeader + 8, cabHeader + 12} {
		b := make([]byte, 91)
		copy(b, "MSCF")
		le.PutUint16(b[30:], flagReserve)
		le.PutUint32(b[at:], 0xfffffff0)
		if err := checkSignature(b, x509.NewCertPool()); err == nil {
			t.Errorf("offset %d: no error", at)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_ = checkSignature(b, x509.NewCertPool())
		runtime.ReadMemStats(&after)
		if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
			t.Errorf("offset %d: %d bytes are allocated", at, allocated)
		}
	}
}

// Folders that share their blocks count them each.
func TestCabinetOfSharedBlocks(t *testing.T) {
	le := binary.LittleEndian
	const folders, blocks = 100, 60_000
	b := make([]byte, cabHeader+cabFolder*folders+cabBlock*blocks)
	copy(b, "MSCF")
	le.PutUint32(b[16:], uint32(len(b)))
	le.PutUint16(b[26:], folders)
	for i := range folders {
		le.PutUint32(b[cabHeader+cabFolder*i:], uint32(cabHeader+cabFolder*folders))
		le.PutUint16(b[cabHeader+cabFolder*i+4:], blocks)
	}
	if _, err := unpack(b); err == nil || !strings.Contains(err.Error(), "blocks") {
		t.Errorf("%v", err)
	}
}
