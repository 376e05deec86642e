package ekcert

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/internal/durable"
)

// file is the path of the kept certificate of an EK. Its name is the key's, so
// that copies for another TPM are not even looked at.
func file(dir string, ek tpm.EK) string {
	return filepath.Join(dir, "ek-"+ek.Hash().String()+".der")
}

// Kept says where a certificate is kept now.
type Kept struct {
	File      string
	Unchanged bool   // it was kept already
	Replaced  string // the file that another certificate was moved to, if there was one
}

// Keep writes the certificate of an EK to dir. A different file that was there
// before is kept beside it.
func Keep(dir string, ek tpm.EK, cert *x509.Certificate) (Kept, error) {
	if !tpm.Certifies(cert, ek.Public) {
		return Kept{}, fmt.Errorf("the certificate is for another key than EK %s", ek.Hash())
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Kept{}, fmt.Errorf("keep the certificate of EK %s: %w", ek.Hash(), err)
	}

	k := Kept{File: file(dir, ek)}
	old, err := durable.Read(k.File)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return Kept{}, fmt.Errorf("keep the certificate of EK %s: %w (move that file away and try again)", ek.Hash(), err)
	case bytes.Equal(old, cert.Raw):
		k.Unchanged = true
		return k, nil
	default:
		digest := sha256.Sum256(old)
		k.Replaced = fmt.Sprintf("%s.old-%x", k.File, digest[:8])
		if err := durable.Write(k.Replaced, old); err != nil {
			return Kept{}, fmt.Errorf("keep the certificate of EK %s: save the old one: %w", ek.Hash(), err)
		}
	}

	if err := durable.Write(k.File, cert.Raw); err != nil {
		return Kept{}, fmt.Errorf("keep the certificate of EK %s: %w", ek.Hash(), err)
	}
	return k, nil
}

// load reads the kept certificate of an EK. The error is os.ErrNotExist if there
// is none, and another if the file can't be used.
func load(dir string, ek tpm.EK) (*x509.Certificate, error) {
	if dir == "" {
		return nil, os.ErrNotExist
	}
	path := file(dir, ek)
	b, err := durable.Read(path)
	if err != nil {
		return nil, err
	}

	cert, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w (remove it, and fetch or import the certificate again)", path, err)
	}
	if !tpm.Certifies(cert, ek.Public) {
		return nil, fmt.Errorf("%s: the certificate is for another key than EK %s (remove it, and fetch or import the certificate again)", path, ek.Hash())
	}
	return cert, nil
}

// Complete returns eks with the kept certificates of those that came without
// one, certified keys first. A kept file that can't be used is left out, and
// reported in problems.
func Complete(dir string, eks []tpm.EK) (completed []tpm.EK, problems []error) {
	completed = slices.Clone(eks)
	for i, ek := range completed {
		if len(ek.Certificate) > 0 {
			continue
		}
		cert, err := load(dir, ek)
		switch {
		case err == nil:
			completed[i].Certificate = cert.Raw
		case !errors.Is(err, os.ErrNotExist):
			problems = append(problems, err)
		}
	}

	slices.SortStableFunc(completed, func(a, b tpm.EK) int { return uncertified(a) - uncertified(b) })
	return completed, problems
}

func uncertified(ek tpm.EK) int {
	if len(ek.Certificate) == 0 {
		return 1
	}
	return 0
}

// Match returns the EK that cert is for.
func Match(cert *x509.Certificate, eks []tpm.EK) (tpm.EK, bool) {
	i := slices.IndexFunc(eks, func(ek tpm.EK) bool { return tpm.Certifies(cert, ek.Public) })
	if i < 0 {
		return tpm.EK{}, false
	}
	return eks[i], true
}
