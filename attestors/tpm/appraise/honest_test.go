package appraise_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

// Every kind of endorsement key takes every kind of attestation key through a
// whole joining.
func TestJoiningWithARealTPM(t *testing.T) {
	for _, ekAlg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048, tpm.P384} {
		for _, akAlg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048} {
			t.Run(fmt.Sprintf("EK %s, AK %s", ekAlg, akAlg), func(t *testing.T) {
				device := devices[0]
				presented := ekOf(t, device, ekAlg)
				ek := must[*appraise.EK](t)(verifyEK(presented))
				if !ek.Certified || ek.Algorithm != ekAlg || ek.Hash != presented.Hash() || ek.Manufacturer == "" || ek.Model == "" {
					t.Errorf("the EK came out as %+v", ek)
				}
				blob := must[collect.Blob](t)(device.CreateAK(t.Context(), akAlg))
				ak := must[*appraise.AK](t)(appraise.ParseAK(blob.Public()))
				if err := activates(t, ek, ak, func(c tpm.Challenge) ([]byte, error) {
					return device.Activate(t.Context(), blob, presented, c)
				}); err != nil {
					t.Fatal(err)
				}

				key := must[collect.Blob](t)(device.CreateTLSKey(t.Context()))
				certification := must[tpm.Certification](t)(device.Certify(t.Context(), blob, key, extra))
				spki := must[[]byte](t)(ak.VerifyCertification(key.Public(), certification, extra))
				signer := must[crypto.Signer](t)(device.Signer(key))
				if want := must[[]byte](t)(x509.MarshalPKIXPublicKey(signer.Public())); string(spki) != string(want) {
					t.Error("the certified key isn't the one that signs")
				}

				measured := fmt.Appendf(nil, "%s %s", ekAlg, akAlg)
				if err := realTPMs[0].Extend(14, measured); err != nil {
					t.Fatal(err)
				}
				quote := must[tpm.Quote](t)(device.Quote(t.Context(), blob, extra, tpm.DefaultPCRs()))
				verified := must[*appraise.Verified](t)(ak.VerifyQuote(quote, extra, tpm.DefaultPCRs()))
				if len(verified.PCRs) != 16 || verified.PCRs[14].IsZero() || !verified.PCRs[13].IsZero() {
					t.Errorf("PCRs %v", verified.PCRs)
				}
			})
		}
	}
}

func TestAnEKWithoutCertificateIsKnownAtMost(t *testing.T) {
	ek := must[*appraise.EK](t)(verifyEK(tpm.EK{Public: ekOf(t, devices[0], tpm.P256).Public}))
	if ek.Certified {
		t.Error("it counts as certified")
	}
}

// The TPM's key authenticates the client of a TLS 1.3 connection.
func TestTLSHandshakeWithTheTPMsKey(t *testing.T) {
	signer := must[crypto.Signer](t)(devices[0].Signer(must[collect.Blob](t)(devices[0].CreateTLSKey(t.Context()))))
	ca := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil)).TLSKey
	issue := func(public crypto.PublicKey) []byte {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"broker"},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
		return must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, public, ca))
	}
	pool := x509.NewCertPool()
	root := must[*x509.Certificate](t)(x509.ParseCertificate(issue(ca.Public())))
	pool.AddCert(root)
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	server := tls.Server(far, &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		Certificates: []tls.Certificate{{Certificate: [][]byte{root.Raw}, PrivateKey: ca}}})
	client := tls.Client(near, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "broker",
		Certificates: []tls.Certificate{{Certificate: [][]byte{issue(signer.Public())}, PrivateKey: signer}}})
	done := make(chan error, 1)
	go func() {
		_, err := client.Write([]byte("hello"))
		done <- err
	}()
	hello := make([]byte, 5)
	if _, err := io.ReadFull(server, hello); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if peer := server.ConnectionState().PeerCertificates[0].PublicKey.(*ecdsa.PublicKey); !peer.Equal(signer.Public()) {
		t.Error("the peer's key isn't the TPM's")
	}
}

// fixture reads a file of a real measured boot.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	return must[[]byte](t)(os.ReadFile("../../../test/vectors/boots/" + name))
}

// bootQuote is the quote of a real measured boot, made by tpm2-tools.
func bootQuote(t testing.TB) (public []byte, q tpm.Quote, nonce evidence.Digest) {
	t.Helper()
	q = tpm.Quote{Attest: fixture(t, "clean/quote.tpms_attest"), Signature: fixture(t, "clean/quote.tpmt_signature")}
	for _, m := range regexp.MustCompile(`(\d+) *: 0x([0-9A-F]{64})\b`).FindAllSubmatch(fixture(t, "clean/pcrs.txt"), -1) {
		index := must[int](t)(strconv.Atoi(string(m[1])))
		if index <= 14 { // the quote is over 0–14
			q.PCRs = append(q.PCRs, tpm.PCR{Index: index, SHA256: evidence.Digest(must[[]byte](t)(hex.DecodeString(string(m[2]))))})
		}
	}
	raw := must[[]byte](t)(hex.DecodeString(strings.TrimSpace(string(fixture(t, "clean/nonce.hex")))))
	return fixture(t, "clean/ak.tpm2b_public")[2:], q, evidence.Digest(raw)
}

// A quote that another implementation made, of a real boot.
func TestQuoteOfARealBoot(t *testing.T) {
	public, q, nonce := bootQuote(t)
	ak := must[*appraise.AK](t)(appraise.ParseAK(public))
	if want := fixture(t, "clean/ak.name"); string(ak.Name()) != string(want) {
		t.Errorf("name %x, want %x", ak.Name(), want)
	}
	verified := must[*appraise.Verified](t)(ak.VerifyQuote(q, nonce, []int{0, 4, 7, 10}))
	if len(verified.PCRs) != 15 {
		t.Errorf("%d PCRs", len(verified.PCRs))
	}
}

// Certificates that swtpm's own CA issued.
func TestEKCertificatesOfSwtpm(t *testing.T) {
	trusted, between := x509.NewCertPool(), x509.NewCertPool()
	trusted.AppendCertsFromPEM(fixture(t, "ca/swtpm-localca-rootca-cert.pem"))
	between.AppendCertsFromPEM(fixture(t, "ca/issuercert.pem"))
	rsaKey, _ := pem.Decode(fixture(t, "clean/ek.pem"))
	eccCert := must[*x509.Certificate](t)(x509.ParseCertificate(fixture(t, "clean/ek_ecc384_cert.der")))
	for _, presented := range []tpm.EK{
		{Public: rsaKey.Bytes, Certificate: fixture(t, "clean/ek_rsa_cert.der")},
		{Public: eccCert.RawSubjectPublicKeyInfo, Certificate: eccCert.Raw},
	} {
		ek := must[*appraise.EK](t)(appraise.VerifyEK(presented, trusted, between, time.Now()))
		if !ek.Certified || ek.Manufacturer != "id:00001014" || ek.Model != "swtpm" {
			t.Errorf("%+v", ek)
		}
	}
}
