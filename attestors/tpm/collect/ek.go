package collect

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

// nvChunk is how much is read of an NV index at once; every PC client TPM
// allows that much.
const nvChunk = 512

// A foundEK is an endorsement key and how to get at it again.
type foundEK struct {
	tpm.EK
	handle tpm2.NamedHandle
	public tpm2.TPMTPublic
}

// EKs finds the TPM's endorsement keys: those with a certificate in NV memory
// or a persistent handle, and where there is neither, as on many virtual TPMs,
// those that the TPM derives from the standard templates. Certified ones come
// first. A certificate that is for another key than the TPM's is left out.
func (d *Device) EKs(ctx context.Context) ([]tpm.EK, error) {
	var eks []tpm.EK
	err := d.do(ctx, "find the endorsement keys", func(s *session) error {
		eks = nil
		persistent, err := s.persistentEKs()
		if err != nil {
			return err
		}
		for _, provisioned := range []bool{true, false} {
			for _, template := range tpm.EKTemplates() {
				ek, err := s.findEK(template, persistent, provisioned)
				if err != nil {
					return fmt.Errorf("template %s: %w", template.Name, err)
				}
				s.flush() // an EK in a transient slot would stand in the next one's way
				if ek != nil && !slices.ContainsFunc(eks, func(e tpm.EK) bool { return bytes.Equal(e.Public, ek.Public) }) {
					eks = append(eks, ek.EK)
				}
			}
			if len(eks) > 0 {
				break
			}
		}
		if len(eks) == 0 {
			return errors.New("the TPM makes none of the standard endorsement keys (RSA-2048, P-256, P-384)")
		}
		slices.SortStableFunc(eks, func(a, b tpm.EK) int { return boolToInt(len(a.Certificate) == 0) - boolToInt(len(b.Certificate) == 0) })
		return nil
	})
	return eks, err
}

// The NV indices of the certificates of EKs' issuers (TCG EK Credential Profile,
// 2.2.1.5.2): each holds the next part of one run of certificates in DER.
const (
	firstIssuerNV = 0x01c00100
	lastIssuerNV  = 0x01c001ff
)

// Issuers returns the certificates of CAs that the TPM holds, in DER. Those are
// made in the machine itself, as in firmware TPMs of Intel's 11th generation and
// later, and can be had nowhere else. Most TPMs hold none. What can't be read as
// a certificate is left out, with all that follows it.
func (d *Device) Issuers(ctx context.Context) (issuers [][]byte, err error) {
	err = d.do(ctx, "read the issuers' certificates", func(s *session) error {
		issuers = nil
		indices, err := s.handles(firstIssuerNV)
		if err != nil {
			return err
		}
		var run []byte
		for _, index := range indices {
			if index < firstIssuerNV || index > lastIssuerNV || len(run) > tpm.MaxIssuers*tpm.MaxCertificate {
				break
			}
			part, err := s.readNV(index)
			if err != nil {
				return fmt.Errorf("NV index %#x: %w", uint32(index), err)
			}
			run = append(run, part...)
		}
		certs, _ := tpm.SplitCertificates(run)
		for _, cert := range certs {
			issuers = append(issuers, cert.Raw)
		}
		return nil
	})
	return issuers, err
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// findEK finds the key of one template: a persistent one, or one that is
// derived. With provisioned, a key that has neither a handle nor a certificate
// is not looked for.
func (s *session) findEK(template tpm.EKTemplate, persistent []foundEK, provisioned bool) (*foundEK, error) {
	certificate, err := s.readNV(template.NVIndex)
	if err != nil {
		return nil, fmt.Errorf("read the certificate in NV index %#x: %w", uint32(template.NVIndex), err)
	}
	certificate = trimDER(certificate)

	for _, ek := range persistent {
		if sameTemplate(ek.public, template.Public) {
			return withCertificate(ek, certificate), nil
		}
	}
	if provisioned && len(certificate) == 0 {
		return nil, nil
	}
	ek, err := s.createEK(template)
	if ek == nil || err != nil {
		return nil, err
	}
	return withCertificate(*ek, certificate), nil
}

// withCertificate adds the certificate if it is the key's.
func withCertificate(ek foundEK, certificate []byte) *foundEK {
	if cert, err := x509.ParseCertificate(certificate); err == nil && tpm.Certifies(cert, ek.EK.Public) {
		ek.Certificate = certificate
	}
	return &ek
}

// createEK derives a template's key, or none if the TPM doesn't know its kind.
func (s *session) createEK(template tpm.EKTemplate) (*foundEK, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic:      tpm2.New2B(template.Public),
	}.Execute(s)
	if unsupported(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s.loaded = append(s.loaded, rsp.ObjectHandle)
	return newFoundEK(rsp.ObjectHandle, rsp.Name, rsp.OutPublic)
}

func unsupported(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCurve, tpm2.TPMRCHash, tpm2.TPMRCSymmetric, tpm2.TPMRCKeySize, tpm2.TPMRCValue, tpm2.TPMRCAsymmetric, tpm2.TPMRCType} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// persistentEKs reads the keys at the handles that the TCG reserves for EKs.
func (s *session) persistentEKs() ([]foundEK, error) {
	handles, err := s.handles(0x81010000)
	if err != nil {
		return nil, err
	}
	var eks []foundEK
	for _, handle := range handles {
		if handle > 0x8101ffff {
			break
		}
		rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(s)
		if err != nil {
			return nil, fmt.Errorf("read persistent handle %#x: %w", uint32(handle), err)
		}
		if ek, err := newFoundEK(handle, rsp.Name, rsp.OutPublic); err == nil {
			eks = append(eks, *ek)
		} // else a key of some other kind, which somebody keeps there
	}
	return eks, nil
}

func newFoundEK(handle tpm2.TPMHandle, name tpm2.TPM2BName, out tpm2.TPM2BPublic) (*foundEK, error) {
	public, err := out.Contents()
	if err != nil {
		return nil, err
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	return &foundEK{tpm.EK{Public: der}, tpm2.NamedHandle{Handle: handle, Name: name}, *public}, nil
}

// sameTemplate says whether a key was made from a template: all but the unique
// field agree.
func sameTemplate(public, template tpm2.TPMTPublic) bool {
	if public.Type != template.Type {
		return false
	}
	public.Unique = template.Unique
	return bytes.Equal(tpm2.Marshal(public), tpm2.Marshal(template))
}

// ekHandle makes an endorsement key usable: its persistent handle, or the key
// derived anew.
func (s *session) ekHandle(want tpm.EK) (*foundEK, error) {
	persistent, err := s.persistentEKs()
	if err != nil {
		return nil, err
	}
	for _, ek := range persistent {
		if bytes.Equal(ek.EK.Public, want.Public) {
			return &ek, nil
		}
	}
	key, err := x509.ParsePKIXPublicKey(want.Public)
	if err != nil {
		return nil, err
	}
	alg, err := tpm.AlgorithmOf(key)
	if err != nil {
		return nil, err
	}
	for _, template := range tpm.EKTemplates() {
		if template.Algorithm != alg {
			continue
		}
		ek, err := s.createEK(template)
		if err != nil {
			return nil, err
		}
		if ek != nil && bytes.Equal(ek.EK.Public, want.Public) {
			return ek, nil
		}
		s.flush()
	}
	return nil, fmt.Errorf("endorsement key %s is not this TPM's", want.Hash())
}

// readNV reads an NV index whole; one that doesn't exist is empty.
func (s *session) readNV(index tpm2.TPMHandle) ([]byte, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(s)
	if errors.Is(err, tpm2.TPMRCHandle) || errors.Is(err, tpm2.TPMRCValue) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	public, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	if !public.Attributes.Written || public.DataSize > tpm.MaxCertificate {
		return nil, nil
	}
	reader := tpm2.AuthHandle{Handle: index, Name: rsp.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !public.Attributes.AuthRead {
		reader = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	var data []byte
	for len(data) < int(public.DataSize) {
		part, err := tpm2.NVRead{
			AuthHandle: reader,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: rsp.NVName},
			Size:       min(nvChunk, public.DataSize-uint16(len(data))),
			Offset:     uint16(len(data)),
		}.Execute(s)
		if err != nil {
			return nil, err
		}
		if len(part.Data.Buffer) == 0 {
			return nil, errors.New("the TPM reads nothing where it says there is more")
		}
		data = append(data, part.Data.Buffer...)
	}
	return data, nil
}

// trimDER cuts the filling that some makers put behind a certificate.
func trimDER(data []byte) []byte {
	var whole asn1.RawValue
	if rest, err := asn1.Unmarshal(data, &whole); err == nil {
		return data[:len(data)-len(rest)]
	}
	return nil
}
