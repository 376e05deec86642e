package main

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/test/lab"
)

const (
	floorNames = "two fsync'd appends of 4 KiB on the store's file system; two ECDSA P-256 verifications (quote, certificate request) and one signature (certificate)"
	floorTimes = 12
)

// A floor does what a request for a certificate can't do without.
type floor struct {
	file   *os.File
	key    *ecdsa.PrivateKey
	digest [sha256.Size]byte
	sig    []byte
}

func newFloor(dir string) (*floor, error) {
	f := &floor{digest: sha256.Sum256([]byte("floor"))}
	var err error
	if f.key, err = lab.NewECDSA(); err != nil {
		return nil, err
	}
	if f.sig, err = ecdsa.SignASN1(rand.Reader, f.key, f.digest[:]); err != nil {
		return nil, err
	}
	f.file, err = os.Create(filepath.Join(dir, "floor"))
	return f, err
}

func (f *floor) close() {
	_ = f.file.Close()
	_ = os.Remove(f.file.Name())
}

func (f *floor) once() (time.Duration, error) {
	page := make([]byte, 4096)
	start := time.Now()
	for range 2 {
		if _, err := f.file.Write(page); err != nil {
			return 0, err
		}
		if err := f.file.Sync(); err != nil {
			return 0, err
		}
		if err := f.verify(); err != nil {
			return 0, err
		}
	}
	_, err := ecdsa.SignASN1(rand.Reader, f.key, f.digest[:])
	return time.Since(start), err
}

func (f *floor) verify() error {
	if !ecdsa.VerifyASN1(&f.key.PublicKey, f.digest[:], f.sig) {
		return errors.New("the floor's signature doesn't verify")
	}
	return nil
}
