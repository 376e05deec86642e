package appraise_test

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

// What the tests share: a maker's CA and two TPMs of its make.
var (
	maker         *lab.TPMCA
	roots, middle *x509.CertPool
	realTPMs      [2]*lab.TPM
	devices       [2]*collect.Device
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if maker, err = lab.NewTPMCA(dir + "/ca"); err != nil {
		return 1, err
	}
	roots, middle = maker.Pools()
	for i := range realTPMs {
		if realTPMs[i], err = lab.StartTPM(context.Background(), fmt.Sprintf("%s/%d", dir, i), maker, lab.TPMOptions{}); err != nil {
			return 1, err
		}
		defer realTPMs[i].Stop()
		if devices[i], err = collect.Open(realTPMs[i].Path()); err != nil {
			return 1, err
		}
	}
	return m.Run(), nil
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// rejected demands that err is a rejection by one named check.
func rejected(t *testing.T, err error, want evidence.Check) {
	t.Helper()
	if err == nil {
		t.Errorf("accepted, want a rejection by %s", want)
	} else if got := evidence.CheckOf(err); got != want {
		t.Errorf("rejected by %q (%v), want %s", got, err, want)
	}
}

// extra is what the tests' statements are bound to.
var extra = evidence.Binding{Call: evidence.CallJoin, Nonce: evidence.Nonce{1}, Request: []byte("request")}.ExtraData()

func verifyEK(ek tpm.EK) (*appraise.EK, error) {
	return appraise.VerifyEK(ek, roots, middle, time.Now())
}

// ekOf is a real TPM's endorsement key of one kind.
func ekOf(t testing.TB, device *collect.Device, alg tpm.KeyAlgorithm) tpm.EK {
	t.Helper()
	eks := must[[]tpm.EK](t)(device.EKs(t.Context()))
	i := slices.IndexFunc(eks, func(ek tpm.EK) bool {
		key, err := x509.ParsePKIXPublicKey(ek.Public)
		if err != nil {
			t.Fatal(err)
		}
		got, err := tpm.AlgorithmOf(key)
		return err == nil && got == alg
	})
	if i < 0 {
		t.Fatalf("the TPM has no %s endorsement key", alg)
	}
	return eks[i]
}

// activates says whether somebody answers a challenge to ek and ak.
func activates(t *testing.T, ek *appraise.EK, ak *appraise.AK, answer func(tpm.Challenge) ([]byte, error)) error {
	t.Helper()
	challenge, secret, err := appraise.NewChallenge(rand.Reader, ek, ak)
	if err != nil {
		t.Fatal(err)
	}
	got, err := answer(challenge)
	if err == nil && subtle.ConstantTimeCompare(got, secret) != 1 {
		err = fmt.Errorf("the answer is wrong")
	}
	return err
}
