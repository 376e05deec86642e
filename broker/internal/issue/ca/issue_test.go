package ca

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
)

func TestCertificate(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	o := r.order(t, "billing-tls", newCSR(t, key, x509.CertificateRequest{}))
	c := must(r.Issue(t.Context(), o))(t)
	leaf := parse(t, field(t, c, "certificate"))[0]
	want := "spiffe://prod.example.com/host/" + host + "/billing-tls"
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want || c.Names["spiffe"] != want {
		t.Errorf("URIs %v, names %v", leaf.URIs, c.Names)
	}
	if leaf.SerialNumber.String() != serialText(o.Prepared.Ref) || serialText(c.Ref) != serialText(o.Prepared.Ref) || c.Names["certificate_serial"] != serialText(o.Prepared.Ref) {
		t.Errorf("serial %s, ordered %s, in the credential %s", leaf.SerialNumber, serialText(o.Prepared.Ref), serialText(c.Ref))
	}
	if !slices.Equal(leaf.DNSNames, []string{"billing.example.com", "billing"}) || fmt.Sprint(leaf.IPAddresses) != "[192.0.2.7 2001:db8::7]" || leaf.EmailAddresses != nil {
		t.Errorf("names %v %v %v", leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses)
	}
	if leaf.Subject.String() != "CN=billing.example.com" {
		t.Errorf("subject %s", leaf.Subject)
	}
	if !leaf.NotAfter.Equal(o.Now.Add(24*time.Hour).UTC().Truncate(time.Second)) || !c.Expires.Equal(leaf.NotAfter) ||
		!leaf.NotBefore.Equal(o.Now.Add(-time.Minute).UTC().Truncate(time.Second)) {
		t.Errorf("lives from %s to %s, ordered at %s", leaf.NotBefore, leaf.NotAfter, o.Now)
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature ||
		!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("CA %v, usage %v, %v", leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage)
	}
	if !slices.Equal(leaf.CRLDistributionPoints, []string{crlURL}) || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("CRL at %v, key %v", leaf.CRLDistributionPoints, leaf.PublicKey)
	}
	verifies(t, c, "billing.example.com")

	dir := files(t, c, key)
	if out, err := openssl(t, dir, "verify", "-x509_strict", "-CAfile", "ca.pem", "-untrusted", "chain.pem", "-verify_hostname", "billing.example.com", "certificate.pem"); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	out, err := openssl(t, dir, "x509", "-in", "certificate.pem", "-noout", "-text")
	if err != nil || !strings.Contains(out, "URI:"+want) || !strings.Contains(out, "URI:"+crlURL) {
		t.Errorf("openssl x509: %v\n%s", err, out)
	}
}

// verifies wants Go to trust the credential's chain for a name.
func verifies(t *testing.T, c issue.Credential, name string) {
	t.Helper()
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(parse(t, field(t, c, "ca"))[0])
	chain := parse(t, field(t, c, "chain"))
	middle.AddCert(chain[1])
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, DNSName: name, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Error(err)
		}
	}
}

// Without a name there is no subject, and the SAN is critical in its place.
func TestCertificateWithoutNames(t *testing.T) {
	r := newRig(t)
	r.CRLURL = ""
	r.Issuer = must(Open(t.Context(), r.Options))(t)
	c, leaf, key := r.mustIssue(t, "billing-id")
	if leaf.Subject.String() != "" || leaf.DNSNames != nil || leaf.IPAddresses != nil || leaf.CRLDistributionPoints != nil ||
		leaf.URIs[0].String() != "spiffe://prod.example.com/host/"+host+"/billing-id" {
		t.Errorf("subject %q, names %v %v %v", leaf.Subject, leaf.DNSNames, leaf.IPAddresses, leaf.URIs)
	}
	verifies(t, c, "")
	if out, err := openssl(t, files(t, c, key), "verify", "-x509_strict", "-CAfile", "ca.pem", "-untrusted", "chain.pem", "certificate.pem"); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
}

func TestAYear(t *testing.T) {
	r := newRig(t)
	if _, leaf, _ := r.mustIssue(t, "billing-year"); leaf.NotAfter.Sub(leaf.NotBefore) != 366*24*time.Hour+time.Minute {
		t.Errorf("lives %s", leaf.NotAfter.Sub(leaf.NotBefore))
	}
}

// What else a request asks for makes no difference to the certificate.
func TestCSRWithMoreSANs(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	o := r.order(t, "billing-tls", newCSR(t, key, x509.CertificateRequest{}))
	twin := parse(t, field(t, must(r.Issue(t.Context(), o))(t), "certificate"))[0]
	o.CSR = newCSR(t, key, x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin.example.com", Organization: []string{"Admins"}}, DNSNames: []string{"billing.example.com", "admin.example.com"},
		IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}, EmailAddresses: []string{"root@example.com"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/host/other/admin"}},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}, // CA:TRUE
	})
	if !strings.Contains(string(must(x509.ParseCertificateRequest(o.CSR))(t).Raw), "admin.example.com") {
		t.Fatal("the request asks for nothing more")
	}
	greedy := parse(t, field(t, must(r.Issue(t.Context(), o))(t), "certificate"))[0]
	if !reflect.DeepEqual(greedy.Extensions, twin.Extensions) || !slices.Equal(greedy.RawSubject, twin.RawSubject) || greedy.IsCA {
		t.Errorf("extensions\n%v\nof the twin\n%v\nsubject %s", greedy.Extensions, twin.Extensions, greedy.Subject)
	}
}

func TestRefusedCSRs(t *testing.T) {
	r := newRig(t)
	good := newCSR(t, newKey(t), x509.CertificateRequest{})
	o := r.order(t, "billing-tls", good)
	must(r.Issue(t.Context(), o))(t)
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	broken := slices.Clone(good)
	broken[len(broken)-3] ^= 1
	swapped := slices.Clone(good)
	spki := must(x509.ParseCertificateRequest(good))(t).RawSubjectPublicKeyInfo
	other := must(x509.MarshalPKIXPublicKey(newKey(t).Public()))(t)
	copy(swapped[strings.Index(string(good), string(spki)):], other)
	for _, c := range []struct {
		name, why string
		csr       []byte
	}{
		{"none", "no PKCS #10", nil},
		{"garbage", "no PKCS #10", []byte("-----BEGIN CERTIFICATE REQUEST-----")},
		{"trailing bytes", "no PKCS #10", append(slices.Clone(good), 0)},
		{"truncated", "no PKCS #10", good[:len(good)-1]},
		{"oversized", "at most 16384", newCSR(t, newKey(t), x509.CertificateRequest{DNSNames: []string{strings.Repeat("a", 16<<10)}})},
		{"broken signature", "not signed by its key", broken},
		{"another's key", "not signed by its key", swapped},
		{"RSA-1024", "RSA key of 1024 bits", newCSR(t, must(rsa.GenerateKey(rand.Reader, 1024))(t), x509.CertificateRequest{})},
		{"P-224", "key on P-224", newCSR(t, must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))(t), x509.CertificateRequest{})},
		{"P-521", "key on P-521", newCSR(t, must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))(t), x509.CertificateRequest{})},
		{"Ed25519", "key of another kind", newCSR(t, edKey, x509.CertificateRequest{})},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := o
			o.CSR = c.csr
			_, err := r.Issue(t.Context(), o)
			fails(t, err, c.why)
		})
	}
	for name, key := range map[string]any{"RSA-2048": must(rsa.GenerateKey(rand.Reader, 2048))(t), "P-384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t)} {
		o.CSR = must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
		if _, err := r.Issue(t.Context(), o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusedOrders(t *testing.T) {
	r := newRig(t)
	good := r.order(t, "billing-tls", newCSR(t, newKey(t), x509.CertificateRequest{}))
	must(r.Issue(t.Context(), good))(t)
	for _, c := range []struct {
		name, why string
		change    func(*issue.Order)
	}{
		{"no decision", "no allowing decision", func(o *issue.Order) { o.Decision = policy.Decision{} }},
		{"refused", "no allowing decision", func(o *issue.Order) { o.Decision = decide(t, "other-tls") }},
		{"a vault scope", "of another kind", func(o *issue.Order) { o.Decision = decide(t, "billing-db") }},
		{"another host", "another host", func(o *issue.Order) { o.Host = "h0st4bbbbbbbbbbb" }},
		{"no serial", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo("") }},
		{"serial 0", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo("0") }},
		{"negative", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo("-5") }},
		{"hexadecimal", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo("0xff") }},
		{"leading zero", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo("017") }},
		{"too long", "no decimal serial", func(o *issue.Order) { o.Prepared.Ref = refTo(new(big.Int).Lsh(big.NewInt(1), 159).String()) }},
		{"after the issuer's end", "issuer's certificate ends", func(o *issue.Order) { o.Now = o.Now.Add(lifetime) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := good
			c.change(&o)
			_, err := r.Issue(t.Context(), o)
			fails(t, err, c.why)
		})
	}
}

// The token that authorizes a certificate is good once, for one request.
func TestTokenIsBound(t *testing.T) {
	r := newRig(t)
	o := r.order(t, "billing-tls", newCSR(t, newKey(t), x509.CertificateRequest{}))
	c := r.content(o.Decision.Scope(), o.Decision.Scope().Source.(*Source), o, serialText(o.Prepared.Ref))
	request, other := must(parseCSR(o.CSR))(t), must(parseCSR(newCSR(t, newKey(t), x509.CertificateRequest{})))(t)
	ctx := provisioner.NewContextWithMethod(t.Context(), provisioner.SignMethod)
	token, _, err := r.token(c.URI, signAudience, &c, request.Raw)
	check(t, err)
	options := must(r.authority.Authorize(ctx, token))(t)
	must(r.authority.SignWithContext(ctx, request, provisioner.SignOptions{}, options...))(t)
	_, err = r.authority.SignWithContext(ctx, other, provisioner.SignOptions{}, options...)
	fails(t, err, "fingerprint does not match")
	_, err = r.authority.Authorize(ctx, token)
	fails(t, err, "token already used")
	token, spent, err := r.token(c.URI, signAudience, &c, request.Raw)
	check(t, err)
	spent()
	_, err = r.authority.Authorize(ctx, token)
	fails(t, err, "token already used")

	stranger := newRig(t)
	if token, _, err = stranger.token(c.URI, signAudience, &c, request.Raw); err != nil {
		t.Fatal(err)
	}
	_, err = r.authority.Authorize(ctx, token)
	fails(t, err, "provisioner not found")
}

// An old certificate opens no way around a decision.
func TestRenewalByCertificateIsRefused(t *testing.T) {
	r := newRig(t)
	_, leaf, _ := r.mustIssue(t, "billing-tls")
	_, err := r.authority.Renew(leaf)
	fails(t, err, "renew is disabled")
	_, err = r.authority.Rekey(leaf, newKey(t).Public())
	fails(t, err, "renew is disabled")
}

// A backward step of the clock must not stop the CA, nor a forward one.
func TestClockSteps(t *testing.T) {
	r := newRig(t)
	for _, step := range []time.Duration{-time.Hour, time.Hour} {
		r.ahead.Store(int64(step))
		if _, leaf, _ := r.mustIssue(t, "billing-tls"); leaf.NotBefore.Sub(time.Now().Add(step)).Abs() > 2*time.Minute {
			t.Errorf("%s: valid from %s", step, leaf.NotBefore)
		}
	}
}

func TestExtend(t *testing.T) {
	r := newRig(t)
	c, leaf, _ := r.mustIssue(t, "billing-id")
	for _, ahead := range []time.Duration{0, 2 * time.Hour, 24*time.Hour + 30*time.Minute} {
		r.ahead.Store(int64(ahead))
		if until, err := r.Extend(t.Context(), c.Handle, time.Hour); err != nil || !until.Equal(leaf.NotAfter) {
			t.Errorf("%s later: %s, %v; want %s", ahead, until, err, leaf.NotAfter)
		}
	}
	// A clock alone ends nothing, however far it is ahead.
	r.ahead.Store(int64(31 * 24 * time.Hour))
	if until, err := r.Extend(t.Context(), c.Handle, time.Hour); err != nil || !until.Equal(leaf.NotAfter) {
		t.Errorf("a clock a month ahead: %s, %v; want %s", until, err, leaf.NotAfter)
	}
	r.ahead.Store(int64(26 * time.Hour))
	r.sure.Store(int64(26 * time.Hour))
	if _, err := r.Extend(t.Context(), c.Handle, time.Hour); !errors.Is(err, issue.ErrGone) {
		t.Errorf("a day after its end: %v", err)
	}
}

// openssl's two ends shake hands with two workloads' certificates, and don't
// with one of another CA.
func TestMutualTLS(t *testing.T) {
	r := newRig(t)
	c, _, key := r.mustIssue(t, "billing-tls")
	server := files(t, c, key)
	c, _, key = r.mustIssue(t, "billing-id")
	client := files(t, c, key)
	c, _, key = newRig(t).mustIssue(t, "billing-id")
	stranger := files(t, c, key)

	port := freePort(t)
	cmd := exec.CommandContext(t.Context(), "openssl", "s_server", "-accept", "127.0.0.1:"+port, "-cert", "certificate.pem", "-cert_chain", "chain.pem",
		"-key", "private_key.pem", "-CAfile", "ca.pem", "-Verify", "3", "-verify_return_error", "-purpose", "sslclient", "-www")
	cmd.Dir = server
	output := must(cmd.StdoutPipe())(t)
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for lines := bufio.NewScanner(output); lines.Scan() && !strings.Contains(lines.Text(), "ACCEPT"); {
	}
	handshake := func(dir string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "openssl", "s_client", "-connect", "127.0.0.1:"+port, "-cert", "certificate.pem", "-cert_chain", "chain.pem",
			"-key", "private_key.pem", "-CAfile", filepath.Join(server, "ca.pem"), "-verify_hostname", "billing.example.com", "-verify_return_error", "-ign_eof")
		cmd.Dir = dir
		cmd.Stdin = strings.NewReader("GET / HTTP/1.0\r\n\r\n")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := handshake(client); err != nil || !strings.Contains(out, "Verification: OK") || !strings.Contains(out, "HTTP/1.0 200") {
		t.Errorf("handshake: %v\n%s", err, out)
	}
	if out, _ := handshake(stranger); strings.Contains(out, "HTTP/1.0 200") || !strings.Contains(out, "alert") {
		t.Errorf("a client of another CA:\n%s", out)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	check(t, err)
	return port
}

func FuzzParseCSR(f *testing.F) {
	f.Add(newCSR(f, newKey(f), x509.CertificateRequest{}))
	f.Add(newCSR(f, must(rsa.GenerateKey(rand.Reader, 2048))(f), x509.CertificateRequest{DNSNames: []string{"a.example.com"}}))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := parseCSR(der)
		if err != nil {
			return
		}
		if checkKey(csr.PublicKey) != nil || csr.CheckSignature() != nil || csr.DNSNames != nil || csr.Extensions != nil || csr.Subject.String() != "" {
			t.Errorf("accepted %+v", csr)
		}
	})
}

func BenchmarkIssue(b *testing.B) {
	r := newRig(b)
	o := r.order(b, "billing-tls", newCSR(b, newKey(b), x509.CertificateRequest{}))
	for b.Loop() {
		must(r.Issue(b.Context(), o))(b)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certificates/s")
}

func BenchmarkIssueParallel(b *testing.B) {
	r := newRig(b)
	o := r.order(b, "billing-tls", newCSR(b, newKey(b), x509.CertificateRequest{}))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.Issue(b.Context(), o); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certificates/s")
}
