package cloud

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

// maxTPMT bounds a public area; that of an RSA-2048 EK has 314 bytes.
const maxTPMT = 1024

var awsTypes = map[string]tpm.KeyAlgorithm{"rsa-2048": tpm.RSA2048, "ecc-sec-p384": tpm.P384}

// readAWS reads an answer of `aws ec2 get-instance-tpm-ek-pub`, which has one key.
func readAWS(raw json.RawMessage) (answer, error) {
	var in struct{ InstanceId, KeyType, KeyFormat, KeyValue string }
	if err := json.Unmarshal(raw, &in); err != nil {
		return answer{}, err
	}
	if in.InstanceId == "" {
		return answer{}, errors.New("InstanceId is missing")
	}
	fail := func(err error) (answer, error) { return answer{}, fmt.Errorf("%s: %w", in.InstanceId, err) }

	want, ok := awsTypes[in.KeyType]
	if !ok {
		return fail(fmt.Errorf("KeyType %q is neither rsa-2048 nor ecc-sec-p384", in.KeyType))
	}
	value, err := base64.StdEncoding.DecodeString(in.KeyValue)
	if err != nil {
		return fail(fmt.Errorf("KeyValue: %w", err))
	}
	var key crypto.PublicKey
	switch in.KeyFormat {
	case "der":
		key, err = x509.ParsePKIXPublicKey(value)
	case "tpmt":
		key, err = tpmtKey(value)
	default:
		err = fmt.Errorf("KeyFormat %q is neither der nor tpmt", in.KeyFormat)
	}
	if err != nil {
		return fail(err)
	}
	got, err := tpm.AlgorithmOf(key)
	if err != nil {
		return fail(err)
	}
	if got != want {
		return fail(fmt.Errorf("KeyType is %s and the key is %s", in.KeyType, got))
	}
	return answer{id: in.InstanceId, name: in.InstanceId, labels: map[string]string{"cloud": "aws"}, keys: []crypto.PublicKey{key}}, nil
}

// tpmtKey returns the key of a TPMT_PUBLIC that one of the EK templates has made:
// the broker challenges an EK by the parameters of its template.
func tpmtKey(b []byte) (key crypto.PublicKey, err error) {
	if len(b) > maxTPMT {
		return nil, fmt.Errorf("a TPMT_PUBLIC of %d bytes", len(b))
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, fmt.Errorf("TPMT_PUBLIC: %w", err)
	}
	for _, template := range tpm.EKTemplates() {
		area := template.Public
		if area.Type != public.Type {
			continue
		}
		area.Unique = public.Unique
		if bytes.Equal(tpm2.Marshal(area), b) {
			return uniqueKey(public, template.Algorithm)
		}
	}
	return nil, errors.New("TPMT_PUBLIC: no EK template makes such a key")
}

func uniqueKey(public *tpm2.TPMTPublic, alg tpm.KeyAlgorithm) (crypto.PublicKey, error) {
	if alg == tpm.RSA2048 {
		modulus, err := public.Unique.RSA()
		if err != nil {
			return nil, err
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(modulus.Buffer), E: 65537}, nil // the templates have the default exponent
	}
	point, err := public.Unique.ECC()
	if err != nil {
		return nil, err
	}
	curve := elliptic.P256()
	if alg == tpm.P384 {
		curve = elliptic.P384()
	}
	size := curve.Params().BitSize / 8
	if len(point.X.Buffer) > size || len(point.Y.Buffer) > size {
		return nil, errors.New("TPMT_PUBLIC: a coordinate is too long")
	}
	encoded := make([]byte, 1+2*size)
	encoded[0] = 4 // uncompressed
	copy(encoded[1+size-len(point.X.Buffer):], point.X.Buffer)
	copy(encoded[1+2*size-len(point.Y.Buffer):], point.Y.Buffer)
	return ecdsa.ParseUncompressedPublicKey(curve, encoded)
}
