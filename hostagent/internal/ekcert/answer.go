package ekcert

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/countersign/countersign/attestors/tpm"
)

// Parse reads one certificate out of what a maker answers, or out of a file: DER
// (AMD), PEM, or a JSON object whose field "certificate" is base64url (Intel).
// Anything before or behind it is an error.
func Parse(answer []byte) (*x509.Certificate, error) {
	der, err := unwrap(answer)
	if err != nil {
		return nil, err
	}

	switch {
	case len(der) == 0:
		return nil, errors.New("the certificate is empty")
	case len(der) > tpm.MaxCertificate:
		return nil, fmt.Errorf("the certificate has %d bytes; at most %d are read", len(der), tpm.MaxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse the certificate: %w", err)
	}
	return cert, nil
}

// derSequence is the first byte of every DER certificate.
const derSequence = 0x30

func unwrap(answer []byte) ([]byte, error) {
	text := bytes.TrimSpace(answer)
	switch {
	case len(text) == 0:
		return nil, errors.New("it is empty")
	case answer[0] == derSequence:
		return answer, nil
	case bytes.HasPrefix(text, []byte("-----BEGIN")):
		return fromPEM(text)
	case text[0] == '{':
		return fromJSON(text)
	}
	return nil, fmt.Errorf("it is neither DER, PEM nor JSON; it begins with %q", text[:min(len(text), 24)])
}

func fromPEM(text []byte) ([]byte, error) {
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, errors.New("the PEM block is damaged")
	case block.Type != "CERTIFICATE":
		return nil, fmt.Errorf("the PEM block is a %q, not a CERTIFICATE", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("something follows the PEM block; leave the EK's certificate alone in the file")
	}
	return block.Bytes, nil
}

// fromJSON reads an answer of Intel's: {"pubhash": "…", "certificate": "…"}. A
// field that comes twice has no meaning, so it is an error.
func fromJSON(text []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("parse JSON: %w", err)
	}

	encoded, found := "", false
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("parse JSON: %w", err)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, fmt.Errorf("parse JSON: %w", err)
		}
		if name != "certificate" {
			continue
		}
		if found {
			return nil, errors.New(`the JSON field "certificate" comes twice`)
		}
		if found = true; len(value) == 0 || value[0] != '"' || json.Unmarshal(value, &encoded) != nil {
			return nil, errors.New(`the JSON field "certificate" is not a string`)
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("parse JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the JSON object")
	}
	if !found {
		return nil, errors.New(`the JSON object has no field "certificate"`)
	}

	// The padding is there as in a URL, or not at all.
	encoded = strings.NewReplacer("%3D", "=", "%3d", "=").Replace(encoded)
	der, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(encoded, "="))
	if err != nil {
		return nil, fmt.Errorf(`the JSON field "certificate" is not base64url: %w`, err)
	}
	return der, nil
}
