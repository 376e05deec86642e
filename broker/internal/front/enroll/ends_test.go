package enroll

import (
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// The end of an EK's certificate, and of its vendor's CA, says nothing against a
// TPM that the broker knows. A new one hears what an operator can do.
func TestEndedEKCertificates(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	ca := check.Must(lab.NewTPMCA(t.TempDir()))(t)
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	root, intermediate := ca.PEM()
	roots.AppendCertsFromPEM(root)
	intermediates.AppendCertsFromPEM(intermediate)
	var off time.Duration
	d := &Desk{Store: s, Roots: roots, Intermediates: intermediates, Now: time.Now, Wall: func() time.Time { return time.Now().Add(off) }}

	known, second, stranger := check.Must(lab.NewSoftTPM(ca))(t), check.Must(lab.NewSoftTPM(ca))(t), check.Must(lab.NewSoftTPM(ca))(t)
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		return inventory.Save(tx, inventory.Host{ID: "h", State: inventory.Trusted, Admitted: true, EKs: []evidence.Digest{known.EK.Hash()}})
	}))

	for _, off = range []time.Duration{0, 31 * 24 * time.Hour, 400 * 24 * time.Hour, 21 * 365 * 24 * time.Hour, 100 * 365 * 24 * time.Hour} {
		// A second key is not in the inventory: the host never showed it.
		conn := &challenge.Conn{}
		ch, err := d.Begin(t.Context(), conn, Application{EKs: []tpm.EK{second.EK, known.EK}, AKPublic: known.AKPublic})
		if err != nil || ch.Keys[0].EK != 1 {
			t.Errorf("a known TPM, %s later: %+v, %v", off, ch.Keys, err)
			continue
		}
		if j := check.Must(conn.TakeJoin(time.Now()))(t); !j.EKs[0].Certified {
			t.Errorf("a known TPM, %s later: its tier is lost", off)
		}

		_, err = d.Begin(t.Context(), &challenge.Conn{}, Application{EKs: []tpm.EK{stranger.EK}, AKPublic: stranger.AKPublic})
		if off < 365*24*time.Hour && err != nil {
			t.Errorf("a stranger, %s later: %v", off, err)
		}
		var rejected *evidence.Rejected
		if off > 20*365*24*time.Hour && (!errors.As(err, &rejected) || !strings.Contains(rejected.Detail, "countersign host add NAME --ek-hash "+stranger.EK.Hash().String())) {
			t.Errorf("a stranger, %s later: %v", off, err)
		}
	}

	// A root that an operator took away counts, whatever the time is.
	d.Roots, off = x509.NewCertPool(), 0
	conn := &challenge.Conn{}
	check.Must(d.Begin(t.Context(), conn, Application{EKs: []tpm.EK{known.EK}, AKPublic: known.AKPublic}))(t)
	if j := check.Must(conn.TakeJoin(time.Now()))(t); j.EKs[0].Certified {
		t.Error("it is certified by a root that is not configured")
	}
}

// One key that can't be vouched for doesn't refuse a new host whose other key is
// certified, be it first or last; alone, or beside one without a certificate, it
// does, with the reason.
func TestOneKeyNotVouchedFor(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	ca, other := check.Must(lab.NewTPMCA(t.TempDir()))(t), check.Must(lab.NewTPMCA(t.TempDir()))(t)
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	root, intermediate := ca.PEM()
	roots.AppendCertsFromPEM(root)
	intermediates.AppendCertsFromPEM(intermediate)
	d := &Desk{Store: s, Roots: roots, Intermediates: intermediates, Now: time.Now, Wall: time.Now}

	good, foreign := check.Must(lab.NewSoftTPM(ca))(t), check.Must(lab.NewSoftTPM(other))(t).EK
	bare := check.Must(lab.NewSoftTPM(ca))(t).EK
	bare.Certificate = nil
	garbage, mixed, short := foreign, foreign, foreign
	garbage.Certificate = []byte("garbage")
	mixed.Certificate = good.EK.Certificate
	short.Public = short.Public[:20]

	for name, odd := range map[string]tpm.EK{"another root": foreign, "garbage": garbage, "another key's certificate": mixed, "no key": short} {
		for chosen, eks := range [][]tpm.EK{{good.EK, odd}, {odd, good.EK}} {
			conn := &challenge.Conn{}
			ch, err := d.Begin(t.Context(), conn, Application{EKs: eks, AKPublic: good.AKPublic})
			if err != nil || ch.Keys[0].EK != chosen {
				t.Errorf("%s: %+v, %v, want key %d first", name, ch.Keys, err, chosen)
				continue
			}
			if j := check.Must(conn.TakeJoin(time.Now()))(t); !j.EKs[0].Certified {
				t.Errorf("%s: the host isn't certified", name)
			}
		}
		for _, eks := range [][]tpm.EK{{odd}, {bare, odd}} {
			var rejected *evidence.Rejected
			if _, err := d.Begin(t.Context(), &challenge.Conn{}, Application{EKs: eks, AKPublic: good.AKPublic}); !errors.As(err, &rejected) {
				t.Errorf("%s, with nobody's word for a key: %v", name, err)
			}
		}
	}
}
