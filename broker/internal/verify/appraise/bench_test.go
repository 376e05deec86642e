package appraise_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/test/lab"
)

// A request is one host's request for one credential, as the broker has it in
// hand when it starts to appraise. Its quote is an ECC key's over 16 PCRs; its
// program has as many libraries mapped as a C program with TLS does.
type request struct {
	bundle appraise.Bundle
	host   inventory.Host
	set    *policy.Set

	// The floor's: the PCRs' values as they are hashed, and a signature of the
	// same statement by a key of the same kind.
	quoted []byte
	key    *ecdsa.PublicKey
	sig    []byte
}

func newRequest(b *testing.B) request {
	b.Helper()
	set, err := issuers.Parse([]policy.File{{Name: "bench.hcl", Content: []byte(`
scope "billing-db" {
  host    { labels = { role = "billing" } }
  process {
    user = "billing"
    exe  = "/opt/billing/bin/billingd"
  }
  when = "host.tier == 'certified' && process.uid != 0"
  certificate {
    dns = ["billing.example.com"]
    ttl = "1h"
  }
}`)}})
	if err != nil {
		b.Fatal(err)
	}
	soft, err := lab.NewSoftTPM(nil)
	if err != nil {
		b.Fatal(err)
	}
	const boot = "00000000-0000-4000-8000-000000000001"
	program := process.Program{Boot: boot, PID: 4711, Start: 471100, User: "billing", Executables: process.OneFile("/opt/billing/bin/billingd", evidence.Sum([]byte("exe"))),
		Linux: &process.Linux{UID: 990, GID: 990, Groups: []uint32{990}, Cgroup: "/system.slice/billing.service"}, Parent: &process.Parent{PID: 1, Start: 4, Exe: "/usr/lib/systemd/systemd"}}
	for _, library := range []string{"ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libssl.so.3", "libcrypto.so.3", "libpq.so.5.15", "libz.so.1.2.13", "libpthread.so.0"} {
		program.Mappings = append(program.Mappings, process.Mapping{Path: "/usr/lib/x86_64-linux-gnu/" + library})
	}
	encoded, err := program.Encode()
	if err != nil {
		b.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(soft.TLSKey.Public())
	if err != nil {
		b.Fatal(err)
	}
	binding := evidence.Binding{Call: evidence.CallIssue, Nonce: evidence.Nonce{1}, KeySPKI: spki, Request: append(encoded, make([]byte, 300)...)}
	quote, err := soft.Quote(binding.ExtraData(), tpm.DefaultPCRs())
	if err != nil {
		b.Fatal(err)
	}
	r := request{
		bundle: appraise.Bundle{Binding: binding, Quote: quote, Program: encoded, Boot: boot, OS: "linux", Address: "192.0.2.7"},
		host:   inventory.Host{ID: "h1", Name: "db-client", AKPublic: soft.AKPublic, Tier: appraise.TierCertified, Labels: map[string]string{"role": "billing"}},
		set:    set,
	}
	for _, p := range quote.PCRs {
		r.quoted = append(r.quoted, p.SHA256[:]...)
	}
	digest := sha256.Sum256(quote.Attest)
	if r.sig, err = ecdsa.SignASN1(rand.Reader, soft.TLSKey, digest[:]); err != nil {
		b.Fatal(err)
	}
	r.key = &soft.TLSKey.PublicKey
	return r
}

func (r request) decide(b *testing.B, now time.Time) {
	verified, err := appraise.Appraise(r.bundle, r.host, appraise.Basis{}, now)
	if err != nil {
		b.Fatal(err)
	}
	if d := r.set.Decide(verified, "billing-db", now); !d.Allows() {
		b.Fatalf("%+v", d.Result())
	}
}

// BenchmarkAppraise is one request from its bytes to its decision.
func BenchmarkAppraise(b *testing.B) {
	r := newRequest(b)
	now := time.Now()
	for b.Loop() {
		r.decide(b, now)
	}
}

// BenchmarkFloor is the cryptography that no implementation can do without: one
// ECDSA P-256 verification, and the SHA-256 of the statement, the PCRs, the
// request, the TLS key, and the binding over them.
func BenchmarkFloor(b *testing.B) {
	r := newRequest(b)
	for b.Loop() {
		digest := sha256.Sum256(r.bundle.Quote.Attest)
		_ = sha256.Sum256(r.quoted)
		_ = r.bundle.Binding.ExtraData()
		if !ecdsa.VerifyASN1(r.key, digest[:], r.sig) {
			b.Fatal("the signature doesn't verify")
		}
	}
}
