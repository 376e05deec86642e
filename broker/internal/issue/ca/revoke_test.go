package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// listed are the serials on the newest CRL, whose signature is checked.
func (r *rig) listed(t *testing.T) (*x509.RevocationList, []string) {
	t.Helper()
	list := must(x509.ParseRevocationList(r.CRL()))(t)
	check(t, list.CheckSignatureFrom(r.issuer))
	var serials []string
	for _, e := range list.RevokedCertificateEntries {
		serials = append(serials, e.SerialNumber.String())
	}
	return list, serials
}

func TestRevoke(t *testing.T) {
	r := newRig(t)
	if r.CRL() != nil || r.Status() != "no CRL yet" {
		t.Errorf("before Run: %d bytes, %s", len(r.CRL()), r.Status())
	}
	good, _, key := r.mustIssue(t, "billing-tls")
	bad, leaf, badKey := r.mustIssue(t, "billing-tls")
	dir, badDir := files(t, good, key), files(t, bad, badKey)
	check(t, r.publish(t.Context()))
	verify := func(dir string) (string, error) {
		r.writeCRL(t, dir)
		return openssl(t, dir, "verify", "-crl_check", "-CRLfile", crlText, "-CAfile", "ca.pem", "-untrusted", "chain.pem", "certificate.pem")
	}
	for _, d := range []string{dir, badDir} {
		if out, err := verify(d); err != nil {
			t.Fatalf("before: %v\n%s", err, out)
		}
	}
	first, serials := r.listed(t)
	if serials != nil {
		t.Errorf("lists %v", serials)
	}
	for range 2 { // said twice, it changes nothing
		check(t, r.Revoke(t.Context(), bad.Handle))
	}
	check(t, r.publish(t.Context()))
	second, serials := r.listed(t)
	if !slices.Equal(serials, []string{serialText(bad.Ref)}) || second.Number.Cmp(first.Number) <= 0 || !strings.Contains(r.Status(), "lists 1 certificates") {
		t.Errorf("lists %v, number %s after %s: %s", serials, second.Number, first.Number, r.Status())
	}
	if out, err := verify(badDir); err == nil || !strings.Contains(out, "certificate revoked") {
		t.Errorf("the revoked one: %v\n%s", err, out)
	}
	if out, err := verify(dir); err != nil {
		t.Errorf("the other one: %v\n%s", err, out)
	}
	if out, err := openssl(t, badDir, "crl", "-in", crlText, "-noout", "-text"); err != nil || !strings.Contains(out, "Serial Number: "+hexSerial(leaf.SerialNumber)) {
		t.Errorf("openssl crl: %v\n%s", err, out)
	}

	// The authority itself knows it, and a restart forgets nothing.
	check(t, r.store.Close())
	r.open(t)
	if _, serials := r.listed(t); !slices.Equal(serials, []string{serialText(bad.Ref)}) {
		t.Errorf("after a restart, before a new CRL: lists %v", serials)
	}
	if revoked, err := r.authority.IsRevoked(serialText(bad.Ref)); !revoked || err != nil {
		t.Errorf("after a restart: revoked %v, %v", revoked, err)
	}
	if revoked, err := r.authority.IsRevoked(serialText(good.Ref)); revoked || err != nil {
		t.Errorf("the other one: revoked %v, %v", revoked, err)
	}
	_, err := r.authority.Renew(leaf)
	fails(t, err, "revoked")
	check(t, r.publish(t.Context()))
	if third, serials := r.listed(t); !slices.Equal(serials, []string{serialText(bad.Ref)}) || third.Number.Cmp(second.Number) <= 0 {
		t.Errorf("after a restart: lists %v, number %s after %s", serials, third.Number, second.Number)
	}
}

// The intent knew the serial; whether it was signed, nobody knows any more.
func TestRevokeWhatWasNeverIssued(t *testing.T) {
	r := newRig(t)
	serial := new(big.Int).Lsh(big.NewInt(5), 120).String()
	check(t, r.Revoke(t.Context(), issue.Handle{Lease: "g", Ref: refTo(serial)}))
	check(t, r.publish(t.Context()))
	if _, serials := r.listed(t); !slices.Equal(serials, []string{serial}) {
		t.Errorf("lists %v", serials)
	}
	for _, bad := range []string{"", "abc", "-1", "0"} {
		fails(t, r.Revoke(t.Context(), issue.Handle{Ref: refTo(bad)}), "no decimal serial")
	}
}

// An order that failed before a signature leaves nothing to revoke: a host
// can't fill the CRL with bad requests.
func TestFailedOrderIsNotOnTheCRL(t *testing.T) {
	r := newRig(t)
	o := r.order(t, "billing-tls", []byte("bad"))
	_, err := r.Issue(t.Context(), o)
	fails(t, err, "no PKCS #10")
	check(t, r.Revoke(t.Context(), issue.Handle{Ref: refTo(serialText(o.Prepared.Ref))}))
	check(t, r.publish(t.Context()))
	if _, serials := r.listed(t); serials != nil {
		t.Errorf("lists %v", serials)
	}
}

// What is surely over for a day is forgotten, and nothing before that, whatever
// the clock says for a while.
func TestCRLIsPruned(t *testing.T) {
	r := newRig(t)
	short, _, _ := r.mustIssue(t, "billing-id")
	long, _, _ := r.mustIssue(t, "billing-year")
	check(t, r.Revoke(t.Context(), short.Handle))
	check(t, r.Revoke(t.Context(), long.Handle))
	both, one := []string{serialText(short.Ref), serialText(long.Ref)}, []string{serialText(long.Ref)}
	slices.Sort(both)
	for _, c := range []struct {
		ahead, sure time.Duration
		want        []string
	}{
		{0, 0, both}, {24 * time.Hour, 24 * time.Hour, both}, {-time.Hour, 0, both},
		{31 * 24 * time.Hour, time.Hour, both}, {0, 26 * time.Hour, both}, // one of the two is wrong
		{26 * time.Hour, 26 * time.Hour, one}, {0, 0, one},
	} {
		r.ahead.Store(int64(c.ahead))
		r.sure.Store(int64(c.sure))
		before := r.crl.Load()
		check(t, r.publish(t.Context()))
		_, serials := r.listed(t)
		slices.Sort(serials)
		if !slices.Equal(serials, c.want) {
			t.Errorf("%s ahead: lists %v, want %v", c.ahead, serials, c.want)
		}
		if before != nil && r.crl.Load().Number <= before.Number {
			t.Errorf("%s ahead: number %d after %d", c.ahead, r.crl.Load().Number, before.Number)
		}
	}
	var rows int
	check(t, r.store.View(t.Context(), func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT COUNT(*) FROM ca_values WHERE bucket = ?`, RevokedBucket).Scan(&rows)
	}))
	if rows != 1 {
		t.Errorf("%d revocations are kept", rows)
	}
}

// A restored backup has an older CRL; verifiers have seen the newer number.
func TestNumbersGoUpAfterARestore(t *testing.T) {
	r := newRig(t)
	check(t, r.publish(t.Context()))
	backup := r.crl.Load()
	r.ahead.Store(int64(time.Minute))
	check(t, r.publish(t.Context()))
	newest := r.crl.Load().Number
	r.crl.Store(backup)
	r.ahead.Store(int64(2 * time.Minute))
	check(t, r.publish(t.Context()))
	if n := r.crl.Load().Number; n <= newest {
		t.Errorf("number %d after %d", n, newest)
	}
}

// A CRL of a clock that was ahead is replaced as soon as the clock is back, and
// one that is old when the clock goes on: verifiers refuse both. Numbers go up
// all the same.
func TestACRLFollowsTheClock(t *testing.T) {
	r := newRig(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() { stop(); check(t, <-done) }()

	last := int64(0)
	for _, ahead := range []time.Duration{0, 30 * 24 * time.Hour, 0, 400 * 24 * time.Hour} {
		r.ahead.Store(int64(ahead))
		good := func() bool {
			if r.CRL() == nil {
				return false
			}
			list, _ := r.listed(t)
			return !list.ThisUpdate.After(r.now()) && list.NextUpdate.After(r.now()) && r.crl.Load().Made.After(r.now().Add(-time.Hour))
		}
		for range 1000 {
			if good() {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		list, _ := r.listed(t)
		if !good() || list.Number.Int64() < last {
			t.Errorf("%s ahead: CRL %s, after %d, is good from %s to %s", ahead, list.Number, last, list.ThisUpdate, list.NextUpdate)
		}
		if ends := r.Ends(); ends[len(ends)-1].What != EndCRL || !ends[len(ends)-1].At.Equal(list.NextUpdate) {
			t.Errorf("it is said that %+v, and it ends at %s", ends, list.NextUpdate)
		}
		last = list.Number.Int64()
	}
}

// Run makes a CRL at once, after each revocation, and on its timer.
func TestRun(t *testing.T) {
	r := newRig(t)
	r.CRLEvery = time.Second
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	wait := func(what string, ok func(*crl) bool) {
		t.Helper()
		for range 1000 {
			if c := r.crl.Load(); c != nil && ok(c) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("it never came about: %s", what)
	}
	wait("a first CRL", func(*crl) bool { return true })
	first := r.crl.Load().Number
	wait("a CRL by the timer", func(c *crl) bool { return c.Number > first && c.Entries == 0 })
	c, _, _ := r.mustIssue(t, "billing-tls")
	check(t, r.Revoke(t.Context(), c.Handle))
	wait("a CRL that lists the revoked one", func(c *crl) bool { return c.Entries == 1 })
	stop()
	check(t, <-done)

	// What can't be written is not confirmed.
	check(t, r.store.Close())
	if err := r.Revoke(t.Context(), c.Handle); err == nil {
		t.Error("confirmed a revocation without a store")
	}
}

// One order makes no durable write, and one revocation one.
func TestIssuingWritesNothing(t *testing.T) {
	r := newRig(t)
	rows := func() (n int) {
		check(t, r.store.View(t.Context(), func(tx *store.Tx) error { return tx.QueryRow(`SELECT COUNT(*) FROM ca_values`).Scan(&n) }))
		return n
	}
	c, _, _ := r.mustIssue(t, "billing-tls")
	if n := rows(); n != 0 {
		t.Errorf("issuing left %d rows", n)
	}
	left := 0
	r.database.tokens.Range(func(any, any) bool { left++; return true })
	if left != 0 {
		t.Errorf("%d tokens can still be used", left)
	}
	check(t, r.Revoke(t.Context(), c.Handle))
	if n := rows(); n != 1 {
		t.Errorf("revoking left %d rows", n)
	}
	s := r.store
	check(t, s.Close())
	r.mustIssue(t, "billing-tls") // would fail if it wrote
}

func TestOpenErrors(t *testing.T) {
	r := newRig(t)
	other := newRig(t)
	copyFile := func(from, to string) { check(t, os.WriteFile(to, must(os.ReadFile(from))(t), 0o600)) }
	for _, c := range []struct {
		name   string
		words  []string
		change func(*Options)
	}{
		{"wrong password", []string{"workload-ca-issuer.key", "is key_password_file the one"}, func(o *Options) { o.Password = []byte("another password, of some length") }},
		{"another trust domain", []string{"trust domain", "spiffe://prod.example.com", "test.example.com"}, func(o *Options) { o.TrustDomain = "test.example.com" }},
		{"no files", []string{"workload-ca.crt", "broker init"}, func(o *Options) { o.Dir = t.TempDir() }},
		{"another CA's key", []string{"is not the key of workload-ca-issuer.crt"}, func(o *Options) {
			copyFile(filepath.Join(other.dir, "workload-ca-issuer.key"), filepath.Join(o.Dir, "workload-ca-issuer.key"))
		}},
		{"another CA's root", []string{"workload-ca-issuer.crt is not of workload-ca.crt"}, func(o *Options) {
			copyFile(filepath.Join(other.dir, "workload-ca.crt"), filepath.Join(o.Dir, "workload-ca.crt"))
		}},
		{"no interval", []string{"no interval"}, func(o *Options) { o.CRLEvery = 0 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := r.Options
			o.Dir = t.TempDir()
			check(t, os.CopyFS(o.Dir, os.DirFS(r.dir)))
			must(Open(t.Context(), o))(t)
			c.change(&o)
			_, err := Open(t.Context(), o)
			fails(t, err, c.words...)
			if strings.Contains(err.Error(), string(o.Password)) {
				t.Errorf("the password stands in %v", err)
			}
		})
	}
	t.Run("the root's key may be elsewhere", func(t *testing.T) {
		check(t, os.Remove(filepath.Join(r.dir, "workload-ca.key")))
		must(Open(t.Context(), r.Options))(t)
	})
	fails(t, Init(t.TempDir(), "b1", "Prod Example", password, time.Now()), "trust_domain", "SPIFFE")
}

func TestFiles(t *testing.T) {
	r := newRig(t)
	check(t, Init(r.dir, "b1", domain, password, time.Now()))
	r.Issuer = must(Open(t.Context(), r.Options))(t)
	for _, name := range []string{"workload-ca.key", "workload-ca-issuer.key"} {
		path := filepath.Join(r.dir, name)
		if mode := must(os.Stat(path))(t).Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o", name, mode)
		}
		if text := string(must(os.ReadFile(path))(t)); !strings.HasPrefix(text, "-----BEGIN ENCRYPTED PRIVATE KEY-----") {
			t.Errorf("%s is not encrypted: %.40q", name, text)
		}
	}
	if r.root.MaxPathLen != 1 || !r.issuer.MaxPathLenZero || fmt.Sprint(r.issuer.URIs) != "[spiffe://prod.example.com]" {
		t.Errorf("root %+v, issuer %+v", r.root.MaxPathLen, r.issuer.URIs)
	}
}

func TestCancelled(t *testing.T) {
	r := newRig(t)
	o := r.order(t, "billing-tls", newCSR(t, newKey(t), x509.CertificateRequest{}))
	for range cap(r.signing) {
		r.signing <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Issue(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for others: %v", err)
	}
}

// A revocation that can't be read counts for good, and keeps no other off the CRL.
func TestAnUnreadableRevocation(t *testing.T) {
	r := newRig(t)
	bad, _, _ := r.mustIssue(t, "billing-tls")
	check(t, r.Revoke(t.Context(), bad.Handle))
	check(t, r.store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, '7', 'x'), (?, 'no serial', '{}')`, RevokedBucket, RevokedBucket)
		return err
	}))
	for range 2 {
		check(t, r.publish(t.Context()))
		if _, serials := r.listed(t); len(serials) != 2 || !slices.Contains(serials, "7") || !slices.Contains(serials, serialText(bad.Ref)) {
			t.Errorf("lists %v, want 7 and %s", serials, serialText(bad.Ref))
		}
	}
}
