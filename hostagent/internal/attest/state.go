// Package attest speaks to brokers in the host's name: it joins, keeps the one
// connection, and makes for each request the quote that proves it.
//
// It trusts the broker by its pinned CA, and of what it answers only that. It
// keeps keys as TPM-wrapped blobs, readable by root alone; the newest signed
// head of the broker's audit log, which each later one has to contain; and
// nothing secret.
package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/internal/durable"
)

// keys are the host's, as the TPM wrapped them.
type keys struct {
	AK  []byte `json:"ak"`
	TLS []byte `json:"tls"`

	ak, tls collect.Blob
}

// membership is what joining gave.
type membership struct {
	HostID      string   `json:"host_id"`
	AuditKey    string   `json:"audit_key"`
	Certificate [][]byte `json:"certificate"` // DER chain, leaf first
	Checkpoint  []byte   `json:"checkpoint"`  // signed note
	// CA is the pin under which the host joined, empty in what earlier agents wrote.
	CA string `json:"ca_sha256,omitempty"`
	// NewEpoch says which epoch of the audit log began, until a person accepts it.
	NewEpoch string `json:"new_epoch,omitempty"`
}

// A continuation is what the last answer to a proof gave, and what the next proof shows. Its
// file is in the run folder: a disk that is brought back from a backup must not bring back a
// value that the host has left behind, or the host would pass for its own copy.
type continuation struct {
	file  string
	value []byte // empty: none
}

func openContinuation(dir string) (c continuation, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return c, err
	}
	c.file = filepath.Join(dir, "continuation")
	c.value, err = durable.Read(c.file)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return c, err
}

// set keeps value for the next proof. If the file can't be written it is removed: none is
// better than an old one.
func (c *continuation) set(value []byte) error {
	c.value = value
	err := durable.Write(c.file, value)
	if err != nil {
		err = errors.Join(err, durable.Remove(c.file))
	}
	return err
}

func readJSON(dir, name string, into any) error {
	b, err := durable.Read(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s is damaged (%w); move it away and join again", filepath.Join(dir, name), err)
	}
	return nil
}

func writeJSON(dir, name string, from any) error {
	b, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return durable.Write(filepath.Join(dir, name), b)
}

const (
	keysFile       = "keys.json"
	membershipFile = "host.json"
)

func loadKeys(dir string) (*keys, error) {
	k := &keys{}
	err := readJSON(dir, keysFile, k)
	if err != nil {
		return nil, err
	}
	if k.ak, err = collect.ParseBlob(k.AK); err != nil {
		return nil, err
	}
	k.tls, err = collect.ParseBlob(k.TLS)
	return k, err
}

func loadMembership(dir string) (*membership, error) {
	m := &membership{}
	err := readJSON(dir, membershipFile, m)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return m, err
}
