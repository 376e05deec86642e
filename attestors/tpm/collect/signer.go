package collect

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// signLimit bounds one signature: TLS gives its signers no context.
const signLimit = 30 * time.Second

// A signer is a TLS key in the TPM. It holds nothing of the TPM's between
// signatures, and is safe for concurrent use.
type signer struct {
	device *Device
	key    Blob
	public *ecdsa.PublicKey
}

// Signer is the TLS key of a blob as crypto.Signer: it signs SHA-256 digests,
// and answers with an ASN.1 ECDSA signature.
func (d *Device) Signer(key Blob) (crypto.Signer, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](key.public)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", key, err)
	}
	pub, err := tpm2.Pub(*public)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", key, err)
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%v is no ECC key", key)
	}
	return &signer{d, key, ec}, nil
}

func (s *signer) Public() crypto.PublicKey { return s.public }

func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, errors.New("the TLS key signs SHA-256 digests only")
	}
	ctx, cancel := context.WithTimeout(context.Background(), signLimit)
	defer cancel()
	var signature []byte
	err := s.device.do(ctx, "sign with the TLS key", func(t *session) error {
		keys, err := t.load(s.key)
		if err != nil {
			return err
		}
		rsp, err := tpm2.Sign{
			KeyHandle:  keys[0],
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(t)
		if err != nil {
			return err
		}
		ecc, err := rsp.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		signature, err = asn1.Marshal(struct{ R, S *big.Int }{
			new(big.Int).SetBytes(ecc.SignatureR.Buffer), new(big.Int).SetBytes(ecc.SignatureS.Buffer)})
		return err
	})
	return signature, err
}
