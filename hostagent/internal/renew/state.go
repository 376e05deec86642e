package renew

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"crypto"

	"github.com/countersign/countersign/internal/durable"
	"github.com/countersign/countersign/internal/secret"
)

// A keeper is one credential's place on disk and in memory.
//
//	STATE/leases/NAME.json     the lease in force, without its secret
//	STATE/leases/NAME.pending  the lease that is being delivered
//	STATE/leases/NAME.owed     leases to give back
//	RUN/withheld/NAME          a credential that waits for its unit, with its secret
type keeper struct{ state, run, name string }

func (k *keeper) file(kind string) string {
	return filepath.Join(k.state, "leases", k.name+"."+kind)
}
func (k *keeper) withheldFile() string { return filepath.Join(k.run, "withheld", k.name) }

func read[T any](path string) (*T, error) {
	b, err := durable.Read(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v := new(T)
	if err := json.Unmarshal(b, v); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	return v, nil
}

func write(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.Write(path, b)
}

func (k *keeper) load() (*Lease, error)        { return read[Lease](k.file("json")) }
func (k *keeper) save(l *Lease) error          { return write(k.file("json"), l) }
func (k *keeper) drop() error                  { return durable.Remove(k.file("json")) }
func (k *keeper) loadPending() (*Lease, error) { return read[Lease](k.file("pending")) }
func (k *keeper) savePending(l *Lease) error   { return write(k.file("pending"), l) }
func (k *keeper) dropPending() error           { return durable.Remove(k.file("pending")) }

func (k *keeper) owed() ([]string, error) {
	list, err := read[[]string](k.file("owed"))
	if err != nil || list == nil {
		return nil, err
	}
	return *list, nil
}

func (k *keeper) owe(leases []string) error {
	have, err := k.owed()
	if err != nil {
		return err
	}
	for _, l := range leases {
		if !slices.Contains(have, l) {
			have = append(have, l)
		}
	}
	return write(k.file("owed"), have)
}

func (k *keeper) paid() error { return durable.Remove(k.file("owed")) }

type withheldFile struct {
	Lease    *Lease   `json:"lease"`
	Contents [][]byte `json:"contents"` // in the order of the credential's files
}

func (k *keeper) withhold(l *Lease, contents []secret.Bytes) error {
	w := withheldFile{Lease: l}
	for _, c := range contents {
		w.Contents = append(w.Contents, c.Reveal())
	}
	return write(k.withheldFile(), w)
}

func (k *keeper) loadWithheld() (*Lease, []secret.Bytes, error) {
	w, err := read[withheldFile](k.withheldFile())
	if err != nil || w == nil {
		return nil, nil, err
	}
	var contents []secret.Bytes
	for _, c := range w.Contents {
		contents = append(contents, secret.New(c))
	}
	return w.Lease, contents, nil
}

func (k *keeper) dropWithheld() error { return durable.Remove(k.withheldFile()) }

func newDeliveryID() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// A hostKey is a certificate's private key. It is made here and goes nowhere
// but into the credential's files.
type hostKey struct{ key crypto.Signer }

func newHostKey(kind string) (*hostKey, error) {
	var key crypto.Signer
	var err error
	if kind == "rsa2048" {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return &hostKey{key}, err
}

// csr asks for a certificate of the key; names are the broker's to give.
func (k *hostKey) csr() ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.key)
}

func (k *hostKey) pem() secret.Bytes {
	der, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		panic(err) // both kinds can be marshalled
	}
	defer clear(der)
	return secret.New(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}
