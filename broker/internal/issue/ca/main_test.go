package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/broker/internal/state/values"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/hclread"
	"github.com/countersign/countersign/test/lab"
)

const (
	domain  = "prod.example.com"
	host    = "h0st4aaaaaaaaaaa"
	crlURL  = "http://crl.example.com:9464/crl"
	boot    = "0f0e0d0c-0b0a-4908-8706-050403020100"
	crlText = "workload-crl.pem"
)

var password = []byte("test password")

const scopesHCL = `
scope "billing-tls" {
  process { unit = "billing.service" }
  certificate {
    dns = ["billing.example.com", "billing"]
    ips = ["192.0.2.7", "2001:db8::7"]
    ttl = "24h"
  }
}
scope "billing-id" {
  process { unit = "billing.service" }
  certificate { ttl = "1h" }
}
scope "billing-year" {
  process { unit = "billing.service" }
  certificate { ttl = "8784h" }
}
scope "billing-db" {
  process { unit = "billing.service" }
  vault {
    path = "database/creds/billing"
    ttl  = "1h"
  }
}
scope "other-tls" {
  process { unit = "other.service" }
  certificate { ttl = "1h" }
}
`

// decide decides as the broker does, on evidence that a software TPM signed.
func decide(t testing.TB, scope string) policy.Decision {
	t.Helper()
	soft := must(lab.NewSoftTPM(nil))(t)
	binding := evidence.Binding{Call: evidence.CallIssue, Request: []byte("request")}
	quote := must(soft.Quote(binding.ExtraData(), tpm.DefaultPCRs()))(t)
	program := must((&process.Program{
		Boot: boot, PID: 4711, Start: 815, User: "billing", Executables: process.OneFile("/opt/billing/bin/billingd", evidence.Sum([]byte("billingd"))),
		Linux: &process.Linux{UID: 990, GID: 990, Cgroup: "/system.slice/billing.service", Unit: "billing.service", Invocation: "0123456789abcdef0123456789abcdef"},
	}).Encode())(t)
	verified := must(appraise.Appraise(appraise.Bundle{Binding: binding, Quote: quote, Program: program, Boot: boot},
		inventory.Host{ID: host, AKPublic: soft.AKPublic, Tier: appraise.TierKnown}, appraise.Basis{}, time.Now()))(t)
	set := must(policy.Parse([]policy.File{{Name: "test.hcl", Content: []byte(scopesHCL)}}, policy.Options{Kinds: []policy.Kind{Kind.Kind, {Name: "vault", Arguments: []string{"path"}, Decode: func(hclread.Block, policy.Options) policy.Source { return nil }}}}))(t)
	return set.Decide(verified, scope, time.Now())
}

// A rig is an issuer with a state folder and a clock of its own.
type rig struct {
	*Issuer
	store *store.Store
	dir   string
	ahead atomic.Int64 // nanoseconds, of the clock
	sure  atomic.Int64 // nanoseconds, of what has surely passed
	log   bytes.Buffer
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{dir: t.TempDir()}
	// As Init does, but for the 600,000 rounds of deriving a key.
	check(t, create(r.dir, "b1", domain, time.Now(), func(key *ecdsa.PrivateKey) (*pem.Block, error) {
		return pemutil.Serialize(key, pemutil.WithPassword(password))
	}))
	r.open(t)
	return r
}

func (r *rig) now() time.Time { return time.Now().Add(time.Duration(r.ahead.Load())) }

func (r *rig) options(s *store.Store) Options {
	return Options{Dir: r.dir, Password: password, TrustDomain: domain, Values: values.In(s), CRLURL: crlURL, CRLEvery: time.Hour,
		Log: slog.New(slog.NewTextHandler(&r.log, nil)), Now: r.now, Sure: func() time.Time { return time.Now().Add(time.Duration(r.sure.Load())) }}
}

// open opens store and issuer as a start of the broker does.
func (r *rig) open(t testing.TB) {
	t.Helper()
	s := must(storetest.Open(filepath.Join(r.dir, "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	r.store = s
	r.Issuer = must(Open(context.Background(), r.options(s)))(t)
}

func (r *rig) order(t testing.TB, scope string, csr []byte) issue.Order {
	t.Helper()
	o := issue.Order{Decision: decide(t, scope), Lease: "g1", Host: host, CSR: csr, Request: "r1", Now: r.now()}
	o.Prepared = issue.Prepared{Ref: refTo(newSerial())}
	return o
}

// mustIssue issues to a new key and returns the leaf, too.
func (r *rig) mustIssue(t testing.TB, scope string) (issue.Credential, *x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t)
	c := must(r.Issue(t.Context(), r.order(t, scope, newCSR(t, key, x509.CertificateRequest{}))))(t)
	return c, parse(t, field(t, c, "certificate"))[0], key
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
}

func newCSR(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	return must(x509.CreateCertificateRequest(rand.Reader, &template, key))(t)
}

func field(t testing.TB, c issue.Credential, name string) []byte {
	t.Helper()
	for _, f := range c.Fields {
		if f.Name == name {
			return f.Value.Reveal()
		}
	}
	t.Fatalf("the credential has no field %s", name)
	return nil
}

func parse(t testing.TB, text []byte) (certs []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		certs = append(certs, must(x509.ParseCertificate(block.Bytes))(t))
	}
	if len(certs) == 0 {
		t.Fatalf("no certificate in %q", text)
	}
	return certs
}

// files writes a credential as an agent would.
func files(t testing.TB, c issue.Credential, key *ecdsa.PrivateKey) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, f := range c.Fields {
		check(t, os.WriteFile(filepath.Join(dir, f.Name+".pem"), f.Value.Reveal(), 0o600))
	}
	der := must(x509.MarshalPKCS8PrivateKey(key))(t)
	check(t, os.WriteFile(filepath.Join(dir, "private_key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return dir
}

func (r *rig) writeCRL(t testing.TB, dir string) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(dir, crlText), pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: r.CRL()}), 0o600))
}

func openssl(t testing.TB, dir string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// hexSerial is how openssl writes a serial.
func hexSerial(n *big.Int) string { return strings.ToUpper(hex.EncodeToString(n.Bytes())) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// must is for calls that return a value: must(f())(t).
func must[V any](v V, err error) func(testing.TB) V {
	return func(t testing.TB) V {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// fails wants an error with all of the words.
func fails(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

// refTo is a handle's reference to a serial.
func refTo(serial string) issue.Ref {
	r, err := encodeRef(serial)
	if err != nil {
		panic(err)
	}
	return r
}

// serialText is the reverse of refTo; empty where r is none.
func serialText(r issue.Ref) string {
	serial, err := serialOf(r)
	if err != nil {
		return ""
	}
	return serial
}
