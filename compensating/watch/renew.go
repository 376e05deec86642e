package watch

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/durable"
	"github.com/countersign/countersign/internal/lifetime"
)

// renewEvery is how often the watch looks whether its certificate is due.
const renewEvery = 10 * time.Second

// renewed is where renewed certificates are kept: the state folder is the one
// place that the watch may write to.
func (c *Config) renewed() string { return filepath.Join(c.StateDir, "certificate.crt") }

// Certificate returns the file of the certificate to show to the broker: the
// renewed one, unless it is of another key than the config's.
func (c *Config) Certificate() string {
	if _, err := tls.LoadX509KeyPair(c.renewed(), c.Broker.Key); err == nil {
		return c.renewed()
	}
	return c.Broker.Cert
}

// KeepCertificate renews the watch's certificate at two thirds of its life,
// over its own connection and for its own key, until ctx ends. On the broker's
// local socket there is none.
func (c *Config) KeepCertificate(ctx context.Context, dial Dial, log *slog.Logger, now func() time.Time) {
	if c.Broker.Address == "" {
		return
	}

	ticker := time.NewTicker(renewEvery)
	defer ticker.Stop()
	for said := ""; ; {
		switch ends, err := c.renew(ctx, dial, now()); {
		case ctx.Err() != nil:
			return
		case err != nil && err.Error() != said:
			said = err.Error()
			log.Warn("the watch's certificate is not renewed", "err", err)
		case err == nil && !ends.IsZero():
			said = ""
			log.Info("the watch's certificate is renewed", "until", ends.UTC())
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// renewTime bounds one renewal.
const renewTime = 30 * time.Second

// renew renews the certificate if it is due, and returns when the new one ends.
func (c *Config) renew(ctx context.Context, dial Dial, now time.Time) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, renewTime)
	defer cancel()
	pair, err := tls.LoadX509KeyPair(c.Certificate(), c.Broker.Key)
	if err != nil {
		return time.Time{}, err
	}
	if !lifetime.Due(pair.Leaf, now) {
		return time.Time{}, nil
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pair.Leaf.Subject}, pair.PrivateKey)
	if err != nil {
		return time.Time{}, err
	}

	client, hangUp, err := dial(ctx)
	if err != nil {
		return time.Time{}, err
	}
	defer hangUp()
	r, err := client.RenewOperator(ctx, connect.NewRequest(&v1.RenewOperatorRequest{Csr: csr}))
	if err != nil {
		return time.Time{}, err
	}

	return c.keep(r.Msg.GetCertificate(), pair)
}

// keep writes a renewed certificate, once it is one of the same key.
func (c *Config) keep(chain [][]byte, old tls.Certificate) (time.Time, error) {
	if len(chain) == 0 {
		return time.Time{}, errors.New("the broker's answer holds no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return time.Time{}, fmt.Errorf("the broker's answer: %w", err)
	}
	if key, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(old.Leaf.PublicKey) {
		return time.Time{}, errors.New("the broker's answer holds a certificate of another key")
	}

	var text bytes.Buffer
	for _, der := range chain {
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return time.Time{}, err
		}
	}
	if err := durable.Write(c.renewed(), text.Bytes()); err != nil {
		return time.Time{}, fmt.Errorf("keep the renewed certificate: %w", err)
	}
	return leaf.NotAfter, nil
}
