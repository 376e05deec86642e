package watch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/internal/lifetime"
	"github.com/countersign/countersign/test/check"
)

// A renewer is a broker that renews certificates, for the key it is asked for
// or for another.
type renewer struct {
	countersignv1connect.OperatorServiceClient
	now   time.Time
	other *ecdsa.PrivateKey
	err   error
	asked int
}

func (r *renewer) RenewOperator(_ context.Context, req *connect.Request[v1.RenewOperatorRequest]) (*connect.Response[v1.RenewOperatorResponse], error) {
	r.asked++
	if r.err != nil {
		return nil, r.err
	}
	csr, err := x509.ParseCertificateRequest(req.Msg.GetCsr())
	if err != nil {
		return nil, err
	}
	key := csr.PublicKey
	if r.other != nil {
		key = r.other.Public()
	}
	der, err := certify(key, r.now)
	return connect.NewResponse(&v1.RenewOperatorResponse{Certificate: [][]byte{der}}), err
}

func certify(key any, now time.Time) ([]byte, error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "watch"}, NotBefore: now.Add(-lifetime.Backdate), NotAfter: now.Add(90 * 24 * time.Hour)}
	return x509.CreateCertificate(rand.Reader, template, template, key, signer)
}

func TestTheWatchRenewsItsCertificate(t *testing.T) {
	dir := t.TempDir()
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	c := &Config{StateDir: filepath.Join(dir, "state"), Broker: &Broker{Address: "https://b:1", Cert: filepath.Join(dir, "watch.crt"), Key: filepath.Join(dir, "watch.key")}}
	check.Nil(t, os.Mkdir(c.StateDir, 0o700))
	write := func() *ecdsa.PrivateKey {
		key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: check.Must(x509.MarshalPKCS8PrivateKey(key))(t)})
		check.Nil(t, os.WriteFile(c.Broker.Key, text, 0o600))
		text = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: check.Must(certify(key.Public(), start))(t)})
		check.Nil(t, os.WriteFile(c.Broker.Cert, text, 0o600))
		return key
	}
	write()
	broker := &renewer{}
	hung := 0
	dial := func(context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
		return broker, func() { hung++ }, nil
	}
	renew := func(at time.Duration) (time.Time, error) {
		broker.now = start.Add(at)
		return c.renew(t.Context(), dial, start.Add(at))
	}

	for _, at := range []time.Duration{0, 59 * day} {
		if ends, err := renew(at); err != nil || !ends.IsZero() || broker.asked != 0 || c.Certificate() != c.Broker.Cert {
			t.Errorf("at %s: %s, %v, %s", at, ends, err, c.Certificate())
		}
	}

	// What is no renewal of its own leaves all as it was.
	broker.other = check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	if _, err := renew(60 * day); err == nil || !strings.Contains(err.Error(), "another key") || c.Certificate() != c.Broker.Cert {
		t.Errorf("another key's: %v, %s", err, c.Certificate())
	}
	broker.other, broker.err = nil, errors.New("away")
	if _, err := renew(60 * day); err == nil || c.Certificate() != c.Broker.Cert {
		t.Errorf("a broker that is away: %v, %s", err, c.Certificate())
	}
	broker.err = nil
	ends := check.Must(renew(60 * day))(t)
	if !ends.Equal(start.Add(150*day)) || c.Certificate() == c.Broker.Cert {
		t.Errorf("until %s, in %s", ends, c.Certificate())
	}
	asked := broker.asked
	if ends := check.Must(renew(61 * day))(t); !ends.IsZero() || broker.asked != asked {
		t.Errorf("asked again: %s", ends)
	}
	if ends := check.Must(renew(125 * day))(t); !ends.Equal(start.Add(215 * day)) {
		t.Errorf("the second time: %s", ends)
	}
	if hung != broker.asked {
		t.Errorf("%d connections were ended, of %d", hung, broker.asked)
	}

	// A damaged file, and an admin's new key, bring the config's back.
	damaged := check.Must(os.ReadFile(c.renewed()))(t)
	check.Nil(t, os.WriteFile(c.renewed(), damaged[:len(damaged)/2], 0o600))
	if c.Certificate() != c.Broker.Cert {
		t.Error("a damaged file is shown")
	}
	check.Nil(t, os.WriteFile(c.renewed(), damaged, 0o600))
	if c.Certificate() != c.renewed() {
		t.Error("the renewed one is not shown")
	}
	write()
	if c.Certificate() != c.Broker.Cert {
		t.Error("a certificate of the old key is shown")
	}
}
