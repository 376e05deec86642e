// Package fingerprint tells equal secrets, and nothing else of them: beside each
// credential's names goes an HMAC of its secret, so that who holds the ledger can
// see that two accounts have one password.
//
// The key is the broker's own and stays in its state folder. Whoever has it and
// the ledger can try passwords; without it a fingerprint says nothing. A broker
// that lost its key makes another, and equal secrets from before and after it are
// no longer seen to be equal.
package fingerprint

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/internal/durable"
)

// Name is the fingerprint's, among a credential's names.
const Name = "secret_hmac"

// KeyFile is the key's name in the state folder.
const KeyFile = "secret-hmac.key"

const keySize = 32

// A Key makes fingerprints.
type Key struct{ key []byte }

// Open reads the key in the state folder dir, and makes it where there is none.
func Open(dir string) (Key, error) {
	path := filepath.Join(dir, KeyFile)
	b, err := durable.Read(path)
	if errors.Is(err, os.ErrNotExist) {
		b = make([]byte, keySize)
		_, _ = rand.Read(b) // never fails
		return Key{b}, durable.Write(path, b)
	}
	if err != nil {
		return Key{}, fmt.Errorf("fingerprint key: %w", err)
	}
	if len(b) != keySize {
		return Key{}, fmt.Errorf("fingerprint key: %s has %d bytes instead of %d: bring back the one of the backup, or remove it to have another made", path, len(b), keySize)
	}
	return Key{b}, nil
}

// For returns a key for another purpose, which says nothing of this one.
func (k Key) For(purpose string) []byte {
	sum := hmac.New(sha256.New, k.key)
	part(sum.Write, []byte("key for "+purpose))
	return sum.Sum(nil)
}

// Of is the fingerprint of a credential's secret: its password, or without one
// all that it consists of but its user name and what is public. Empty: there is no
// secret in it.
func (k Key) Of(fields []issue.Field) string {
	sum := hmac.New(sha256.New, k.key)
	if i := slices.IndexFunc(fields, func(f issue.Field) bool { return f.Name == "password" }); i >= 0 {
		if fields[i].Value.Len() == 0 {
			return ""
		}
		part(sum.Write, []byte("password"))
		part(sum.Write, fields[i].Value.Reveal())
		return hex.EncodeToString(sum.Sum(nil))
	}
	// By name, whatever order they came in.
	byName := slices.SortedFunc(slices.Values(fields), func(a, b issue.Field) int { return strings.Compare(a.Name, b.Name) })
	empty := true
	for _, f := range byName {
		if f.Name == "username" || f.Public {
			continue
		}
		empty = empty && f.Value.Len() == 0
		part(sum.Write, []byte(f.Name))
		part(sum.Write, f.Value.Reveal())
	}
	if empty {
		return ""
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// part is one value behind its length, so that no two lists of them read alike.
func part(write func([]byte) (int, error), b []byte) {
	_, _ = write(binary.BigEndian.AppendUint64(nil, uint64(len(b)))) // a hash takes all
	_, _ = write(b)
}

// An Issuer is another issuer, whose credentials have a fingerprint among their
// names.
type Issuer struct {
	issue.Issuer
	Key Key
}

// Issue makes a credential.
func (i Issuer) Issue(ctx context.Context, o issue.Order) (issue.Credential, error) {
	c, err := i.Issuer.Issue(ctx, o)
	if err != nil {
		return c, err
	}
	if sum := i.Key.Of(c.Fields); sum != "" {
		if c.Names == nil {
			c.Names = map[string]string{}
		}
		c.Names[Name] = sum
	}
	return c, nil
}
