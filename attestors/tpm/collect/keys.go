package collect

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// authSize is the length of a new key's authorization value.
const authSize = 32

// nonceSize is the length of the nonces in an authorization session.
const nonceSize = 16

// CreateAK makes an attestation key, P256 or RSA2048.
func (d *Device) CreateAK(ctx context.Context, alg tpm.KeyAlgorithm) (Blob, error) {
	template, err := tpm.AKTemplate(alg)
	if err != nil {
		return Blob{}, err
	}
	return d.create(ctx, "create an attestation key", template)
}

// CreateTLSKey makes a P-256 key that signs TLS handshakes.
func (d *Device) CreateTLSKey(ctx context.Context) (Blob, error) {
	return d.create(ctx, "create a TLS key", tpm.TLSKeyTemplate())
}

func (d *Device) create(ctx context.Context, what string, template tpm2.TPMTPublic) (Blob, error) {
	var blob Blob
	err := d.do(ctx, what, func(s *session) error {
		parent, public, err := s.parent()
		if err != nil {
			return err
		}
		auth := newAuth()
		// Salted and encrypted, so that the new key's authorization value doesn't cross
		// the bus between processor and TPM in the clear.
		salted := tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize,
			tpm2.Salted(parent.Handle, *public), tpm2.AESEncryption(128, tpm2.EncryptIn))
		rsp, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: salted},
			InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: auth}}},
			InPublic:     tpm2.New2B(template),
		}.Execute(s)
		if err != nil {
			return err
		}
		blob = Blob{public: rsp.OutPublic.Bytes(), private: rsp.OutPrivate.Buffer, auth: auth}
		return nil
	})
	return blob, err
}

// newAuth is a random authorization value without a zero byte: go-tpm takes one
// in the midst of a value for its end, and the TPM doesn't.
func newAuth() []byte {
	auth := make([]byte, authSize)
	rand.Read(auth)
	for i := range auth {
		for auth[i] == 0 {
			rand.Read(auth[i : i+1])
		}
	}
	return auth
}

// parent derives the storage key that this host's keys hang from.
func (s *session) parent() (tpm2.NamedHandle, *tpm2.TPMTPublic, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm.SRKTemplate()),
	}.Execute(s)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return tpm2.NamedHandle{}, nil, fmt.Errorf("the owner hierarchy has a password; the agent needs it empty: %w", err)
	}
	if err != nil {
		return tpm2.NamedHandle{}, nil, fmt.Errorf("derive the storage key: %w", err)
	}
	s.loaded = append(s.loaded, rsp.ObjectHandle)
	public, err := rsp.OutPublic.Contents()
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, public, err
}

// load makes keys usable, at most two: TPMs have as few as three slots, and the
// parent takes one.
func (s *session) load(blobs ...Blob) ([]tpm2.AuthHandle, error) {
	parent, _, err := s.parent()
	if err != nil {
		return nil, err
	}
	keys := make([]tpm2.AuthHandle, len(blobs))
	for i, blob := range blobs {
		if blob.IsZero() {
			return nil, errors.New("no key")
		}
		rsp, err := tpm2.Load{
			ParentHandle: parent,
			InPrivate:    tpm2.TPM2BPrivate{Buffer: blob.private},
			InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](blob.public),
		}.Execute(s)
		if err != nil {
			return nil, fmt.Errorf("load %v (was the TPM cleared or replaced?): %w", blob, err)
		}
		s.loaded = append(s.loaded, rsp.ObjectHandle)
		keys[i] = tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name,
			Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, tpm2.Auth(blob.auth))}
	}
	return keys, nil
}

// Activate opens a challenge, which shows that the AK and the endorsement key
// are in one TPM.
func (d *Device) Activate(ctx context.Context, ak Blob, ek tpm.EK, challenge tpm.Challenge) ([]byte, error) {
	var secret []byte
	err := d.do(ctx, "activate the attestation key", func(s *session) error {
		endorsement, err := s.ekHandle(ek)
		if err != nil {
			return err
		}
		keys, err := s.load(ak)
		if err != nil {
			return err
		}
		rsp, err := tpm2.ActivateCredential{
			ActivateHandle: keys[0],
			KeyHandle: tpm2.AuthHandle{Handle: endorsement.handle.Handle, Name: endorsement.handle.Name,
				Auth: endorsementAuth(endorsement.public)},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: challenge.CredentialBlob},
			Secret:         tpm2.TPM2BEncryptedSecret{Buffer: challenge.EncryptedSecret},
		}.Execute(s)
		if err != nil {
			return err
		}
		secret = rsp.CertInfo.Buffer
		return nil
	})
	return secret, err
}

// endorsementAuth is how an endorsement key is used: with its empty password
// where its template allows one, else by the endorsement hierarchy's.
func endorsementAuth(public tpm2.TPMTPublic) tpm2.Session {
	if public.ObjectAttributes.UserWithAuth {
		return tpm2.PasswordAuth(nil)
	}
	return tpm2.Policy(public.NameAlg, nonceSize, func(t transport.TPM, policy tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			PolicySession: policy,
		}.Execute(t)
		return err
	})
}

// Certify has the AK state that a key is in the same TPM, and what it is.
func (d *Device) Certify(ctx context.Context, ak, key Blob, extra evidence.Digest) (tpm.Certification, error) {
	var certification tpm.Certification
	err := d.do(ctx, "certify the TLS key", func(s *session) error {
		keys, err := s.load(ak, key)
		if err != nil {
			return err
		}
		rsp, err := tpm2.Certify{
			ObjectHandle:   keys[1],
			SignHandle:     keys[0],
			QualifyingData: tpm2.TPM2BData{Buffer: extra[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		}.Execute(s)
		if err != nil {
			return err
		}
		certification = tpm.Certification{Attest: rsp.CertifyInfo.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
		return nil
	})
	return certification, err
}
