package collect_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
	"github.com/google/go-tpm/tpm2"
)

// start gives a test a TPM of its own.
func start(t testing.TB, options lab.TPMOptions) (*lab.TPM, *collect.Device, *lab.TPMCA) {
	t.Helper()
	dir := t.TempDir()
	ca, err := lab.NewTPMCA(dir + "/ca")
	if err != nil {
		t.Fatal(err)
	}
	real, err := lab.StartTPM(t.Context(), dir+"/tpm", ca, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(real.Stop)
	device, err := collect.Open(real.Path())
	if err != nil {
		t.Fatal(err)
	}
	return real, device, ca
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

func TestEKsAreFoundWithTheirCertificates(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{})
	found := map[tpm.KeyAlgorithm]bool{}
	for _, ek := range must[[]tpm.EK](t)(device.EKs(t.Context())) {
		key := must[any](t)(x509.ParsePKIXPublicKey(ek.Public))
		alg := must[tpm.KeyAlgorithm](t)(tpm.AlgorithmOf(key))
		cert := must[*x509.Certificate](t)(x509.ParseCertificate(ek.Certificate))
		if string(cert.RawSubjectPublicKeyInfo) != string(ek.Public) {
			t.Errorf("%s: the certificate is for another key", alg)
		}
		found[alg] = true
	}
	if len(found) != 3 {
		t.Errorf("found %v, want all three kinds", found)
	}
}

func TestEKsWithoutCertificates(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{NoCertificates: true})
	eks := must[[]tpm.EK](t)(device.EKs(t.Context()))
	if len(eks) == 0 {
		t.Fatal("found none")
	}
	for _, ek := range eks {
		if len(ek.Certificate) != 0 {
			t.Errorf("%s has a certificate", ek.Hash())
		}
	}
}

func TestACertificateOfAnotherKeyIsLeftOut(t *testing.T) {
	real, device, ca := start(t, lab.TPMOptions{NoCertificates: true})
	other := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	if err := real.WriteNV(0x01c0000a, must[[]byte](t)(ca.IssueEK(other.Public()))); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, ek := range must[[]tpm.EK](t)(device.EKs(t.Context())) {
		key, ok := must[any](t)(x509.ParsePKIXPublicKey(ek.Public)).(*ecdsa.PublicKey)
		if ok && key.Curve == elliptic.P256() {
			found = true
			if key.Equal(other.Public()) || len(ek.Certificate) != 0 {
				t.Error("the EK came with the other key's certificate")
			}
		}
	}
	if !found {
		t.Error("the P-256 EK wasn't found")
	}
}

// The certificates of a CA inside the machine are one run over several indices.
func TestIssuersInTheTPM(t *testing.T) {
	real, device, ca := start(t, lab.TPMOptions{NoCertificates: true})
	if issuers := must[[][]byte](t)(device.Issuers(t.Context())); len(issuers) != 0 {
		t.Errorf("%d issuers where there are none", len(issuers))
	}
	_, chain, err := ca.OnDie()
	if err != nil {
		t.Fatal(err)
	}
	half := len(chain) / 2 // in the midst of a certificate
	for index, data := range map[tpm2.TPMHandle][]byte{0x01c00100: chain[:half], 0x01c00101: append(chain[half:len(chain):len(chain)], make([]byte, 100)...), 0x01c00200: []byte("not of it")} {
		if err := real.WriteNV(index, data); err != nil {
			t.Fatal(err)
		}
	}
	if issuers := must[[][]byte](t)(device.Issuers(t.Context())); len(issuers) != 3 || !bytes.Equal(slices.Concat(issuers...), chain) {
		t.Errorf("%d issuers of 3", len(issuers))
	}
}

func TestGarbageForIssuers(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{NoCertificates: true})
	if err := real.WriteNV(0x01c00100, bytes.Repeat([]byte{0x30, 0x80}, 600)); err != nil {
		t.Fatal(err)
	}
	if issuers := must[[][]byte](t)(device.Issuers(t.Context())); len(issuers) != 0 {
		t.Errorf("%d issuers in garbage", len(issuers))
	}
}

func TestNothingIsHeldBetweenOperations(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{})
	ak := must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	must[tpm.Quote](t)(device.Quote(t.Context(), ak, evidence.Sum(nil), tpm.DefaultPCRs()))
	must[[]tpm.EK](t)(device.EKs(t.Context()))
	if loaded := loadedHandles(t, real); len(loaded) != 0 {
		t.Errorf("left loaded: %v", loaded)
	}
}

func loadedHandles(t *testing.T, real *lab.TPM) []tpm2.TPMHandle {
	t.Helper()
	var all []tpm2.TPMHandle
	for _, first := range []uint32{0x80000000, 0x02000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 16}.Execute(real)
		if err != nil {
			t.Fatal(err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, list.Handle...)
	}
	return all
}

// A process that was killed in the midst of an operation leaves its handles in
// a software TPM. They fill its slots, and the next operation makes room.
func TestLeftoversOfAKilledProcess(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{})
	for range 3 {
		if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm.SRKTemplate())}).Execute(real); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(loadedHandles(t, real)); n != 3 {
		t.Fatalf("%d handles are loaded, want the TPM full with 3", n)
	}
	must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	if loaded := loadedHandles(t, real); len(loaded) != 0 {
		t.Errorf("left loaded: %v", loaded)
	}
}

// A key without noDA in use during three power cuts locks the TPM: the TLS key
// must go on signing.
func TestTLSKeySignsAfterPowerCuts(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{})
	key := must[collect.Blob](t)(device.CreateTLSKey(t.Context()))
	signer := must[crypto.Signer](t)(device.Signer(key))
	digest := sha256.Sum256([]byte("handshake"))
	for range 3 {
		must[[]byte](t)(signer.Sign(nil, digest[:], crypto.SHA256))
		if err := real.PowerCut(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	signature := must[[]byte](t)(signer.Sign(nil, digest[:], crypto.SHA256))
	if !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
		t.Error("the signature is wrong")
	}
	info := must[collect.Info](t)(device.Info(t.Context()))
	if info.InLockout || info.LockoutCount != 0 {
		t.Errorf("after three power cuts: in lockout %v, count %d", info.InLockout, info.LockoutCount)
	}
}

func TestSignerIsSafeForConcurrentUse(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{})
	signer := must[crypto.Signer](t)(device.Signer(must[collect.Blob](t)(device.CreateTLSKey(t.Context()))))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			digest := sha256.Sum256([]byte{byte(i)})
			signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil || !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
				t.Errorf("signature %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

func TestClearedTPMNoLongerLoadsTheKey(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{})
	ak := must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	must[tpm.Quote](t)(device.Quote(t.Context(), ak, evidence.Sum(nil), []int{0}))
	if err := real.Clear(); err != nil {
		t.Fatal(err)
	}
	_, err := device.Quote(t.Context(), ak, evidence.Sum(nil), []int{0})
	if err == nil || !strings.Contains(err.Error(), "cleared or replaced") {
		t.Errorf("quote with a lost key: %v", err)
	}
}

func TestInfo(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{})
	info := must[collect.Info](t)(device.Info(t.Context()))
	if info.Manufacturer != "IBM" || !info.SHA256Bank || info.LockoutMax == 0 || info.OwnerAuth {
		t.Errorf("%+v", info)
	}
}

func TestAnEndedContextStopsTheWaiting(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := device.Info(ctx); err == nil {
		t.Error("an operation ran in a context that had ended")
	}
}

// TestWaitingForAnotherClient holds the TPM's only connection.
func TestWaitingForAnotherClient(t *testing.T) {
	real, device, _ := start(t, lab.TPMOptions{})
	release := holdSocket(t, real)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := device.Info(ctx); err == nil {
		t.Error("a TPM in use answered somebody else")
	}
	release()
	must[collect.Info](t)(device.Info(t.Context()))
}

func TestBlobsShowNothing(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{})
	blob := must[collect.Blob](t)(device.CreateTLSKey(t.Context()))
	exported := blob.Export()
	auth := exported[len(exported)-32:]

	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("key", "blob", blob, "in", struct{ B collect.Blob }{blob})
	encoded := must[[]byte](t)(json.Marshal(map[string]any{"blob": blob}))
	for _, printed := range []string{
		fmt.Sprintf("%v %+v %#v %s %x %d %q", blob, blob, blob, blob, blob, blob, blob),
		fmt.Sprintf("%v %+v %#v", []collect.Blob{blob}, &blob, struct{ B collect.Blob }{blob}),
		log.String(), string(encoded),
	} {
		for _, secret := range []string{hex.EncodeToString(auth), fmt.Sprint(auth)[1:60], string(auth), fmt.Sprintf("%#x", auth[:2])[2:] + hex.EncodeToString(auth[2:8])} {
			if strings.Contains(printed, secret) {
				t.Errorf("shows the authorization value: %s", printed)
			}
		}
		if !strings.Contains(printed, "TPM key ") {
			t.Errorf("doesn't name the key: %s", printed)
		}
	}
	again := must[collect.Blob](t)(collect.ParseBlob(exported))
	signer := must[crypto.Signer](t)(device.Signer(again))
	digest := sha256.Sum256(nil)
	must[[]byte](t)(signer.Sign(nil, digest[:], crypto.SHA256))
}

// go-tpm authorizes wrongly with a value that has a zero byte in it, which one
// random value in eight has.
func TestEveryKeyCanBeUsed(t *testing.T) {
	_, device, _ := start(t, lab.TPMOptions{NoCertificates: true})
	digest := sha256.Sum256(nil)
	for range 64 {
		blob := must[collect.Blob](t)(device.CreateTLSKey(t.Context()))
		must[[]byte](t)(must[crypto.Signer](t)(device.Signer(blob)).Sign(nil, digest[:], crypto.SHA256))
	}
}

func FuzzParseBlob(f *testing.F) {
	_, device, _ := start(f, lab.TPMOptions{NoCertificates: true})
	seed := must[collect.Blob](f)(device.CreateTLSKey(f.Context())).Export()
	f.Add(seed)
	f.Add(seed[:len(seed)-1])
	f.Add(append(seed, 0))
	f.Fuzz(func(t *testing.T, exported []byte) {
		blob, err := collect.ParseBlob(exported)
		if err == nil && string(blob.Export()) != string(exported) {
			t.Error("what was read is not what is written")
		}
	})
}
