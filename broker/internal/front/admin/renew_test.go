package admin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// A responder renews its certificate for its own key, when that is due, for as
// long as it was made for; nobody else does, and no removed one.
func TestRenewOperator(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	var at time.Duration
	ca := check.Must(pki.Create(t.TempDir(), pki.OperatorCA, "operators", []byte("test password"), start))(t)
	d := &Desk{Store: s, OperatorCA: ca, Now: func() time.Time { return start.Add(at) }}
	root := Actor{Name: "root", Role: Admin}

	newKey := func() (csr, spki []byte) {
		key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
		return check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t), check.Must(x509.MarshalPKIXPublicKey(key.Public()))(t)
	}
	add := func(name string, role Role) (csr, spki []byte, leaf *x509.Certificate) {
		csr, spki = newKey()
		der := check.Must(d.AddOperator(t.Context(), root, name, role, csr, start.Add(at+90*day)))(t)
		return csr, spki, check.Must(x509.ParseCertificate(der))(t)
	}
	csr, spki, leaf := add("watch", Responder)
	renew := func(csr []byte) (*x509.Certificate, error) {
		a, err := d.ActorByKey(t.Context(), spki)
		if err != nil {
			return nil, err
		}
		der, err := d.RenewOperator(t.Context(), a, spki, leaf, csr)
		if err != nil {
			return nil, err
		}
		return x509.ParseCertificate(der)
	}

	var bad *InvalidError
	if _, err := renew(csr); !errors.As(err, &bad) || !strings.Contains(err.Error(), "is renewed from 2026-04-30T12:00:00Z on") {
		t.Errorf("too early: %v", err)
	}
	at = 60 * day
	other, _ := newKey()
	if _, err := renew(other); !errors.As(err, &bad) || !strings.Contains(err.Error(), "not the one that opened this connection") {
		t.Errorf("for another key: %v", err)
	}
	for range 2 { // an answer may have been lost
		cert := check.Must(renew(csr))(t)
		if !cert.NotAfter.Equal(start.Add(150*day)) || cert.Subject.CommonName != "watch" || !cert.PublicKey.(*ecdsa.PublicKey).Equal(leaf.PublicKey) {
			t.Errorf("%s until %s", cert.Subject, cert.NotAfter)
		}
	}
	at = 149 * day
	if a, err := d.ActorByKey(t.Context(), spki); err != nil || a.Name != "watch" || a.Role != Responder {
		t.Errorf("after the first certificate's end: %+v, %v", a, err)
	}

	// An admin may remove it between the look-up and the renewal.
	a := check.Must(d.ActorByKey(t.Context(), spki))(t)
	check.Nil(t, d.RemoveOperator(t.Context(), root, "watch"))
	if _, err := d.RenewOperator(t.Context(), a, spki, leaf, csr); !errors.Is(err, ErrForbidden) {
		t.Errorf("a removed one: %v", err)
	}
	if list := check.Must(d.Operators(t.Context(), root))(t); len(list) != 0 {
		t.Errorf("it is back: %+v", list)
	}

	for _, role := range []Role{Viewer, Operator, Admin} {
		csr, spki, leaf := add("person-"+role.String(), role)
		at += 80 * day
		_, err := d.RenewOperator(t.Context(), Actor{Name: "person-" + role.String(), Role: role}, spki, leaf, csr)
		if !errors.Is(err, ErrForbidden) || !strings.Contains(err.Error(), "countersign operator add person-"+role.String()+" --role "+role.String()) {
			t.Errorf("%s: %v", role, err)
		}
	}

	var kinds []string
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		return audit.Read(tx, 0, 100, func(_ int64, body []byte) error {
			r, err := event.Parse(body)
			kinds = append(kinds, string(r.Kind)+" "+r.Actor)
			return err
		})
	}))
	if n := len(slices.DeleteFunc(kinds, func(k string) bool { return k != "operator.renewed operator:watch" })); n != 2 {
		t.Errorf("%d renewals are in the audit log", n)
	}
}

// A key that an admin added again, for less, is not renewed for as long as its first
// certificate was made for.
func TestRenewNoLongerThanTheNewest(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	ca := check.Must(pki.Create(t.TempDir(), pki.OperatorCA, "operators", []byte("test password"), now))(t)
	d := &Desk{Store: s, OperatorCA: ca, Now: func() time.Time { return now }}
	root := Actor{Name: "root", Role: Admin}
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	csr, spki := check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t), check.Must(x509.MarshalPKIXPublicKey(key.Public()))(t)

	first := check.Must(x509.ParseCertificate(check.Must(d.AddOperator(t.Context(), root, "watch", Responder, csr, now.Add(90*day)))(t)))(t)
	now = now.Add(70 * day)
	check.Nil(t, d.RemoveOperator(t.Context(), root, "watch"))
	check.Must(d.AddOperator(t.Context(), root, "watch", Responder, csr, now.Add(7*day)))(t)
	renewed := check.Must(x509.ParseCertificate(check.Must(d.RenewOperator(t.Context(), Actor{Name: "watch", Role: Responder}, spki, first, csr))(t)))(t)
	if !renewed.NotAfter.Equal(now.Add(7 * day)) {
		t.Errorf("renewed until %s, want a week from now", renewed.NotAfter)
	}
}
