// Package cloud reads what the command lines of clouds print about the vTPMs of
// their VMs, and makes hosts to register of it.
//
// It trusts that whoever ran the cloud's command line was answered by the cloud:
// the keys decide which VMs are admitted. It promises that no answer is skipped:
// one that it can't use, or that could be understood in two ways, is a problem,
// with its place in the input. Fields that it has no use for are ignored.
package cloud

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/internal/strictjson"
)

// Bounds of an input; its length in bytes is its caller's to bound.
const (
	maxItems = 100_000
	maxKeys  = 8 // of one VM
)

// A Host is a VM to register.
type Host struct {
	Name     string
	EKHashes []string
	Labels   map[string]string
}

// An answer is what one JSON document holds.
type answer struct {
	id     string // the VM among all of its cloud
	name   string
	labels map[string]string
	keys   []crypto.PublicKey
}

// A source is how one cloud's answers are read.
type source struct {
	read  func(json.RawMessage) (answer, error)
	merge bool // a VM has one answer for each of its keys
}

var sources = map[string]source{
	"aws":   {read: readAWS, merge: true},
	"azure": {read: readAzure},
	"gce":   {read: readGCE},
}

// Names returns the clouds that Read knows, sorted.
func Names() []string { return slices.Sorted(maps.Keys(sources)) }

// A vm is a host and what was found of it so far.
type vm struct {
	Host
	place string
	kinds map[tpm.KeyAlgorithm]string // the hash of the key of each kind
}

// Read reads a cloud's answers: one JSON document, an array, or several documents
// one after another. Where there are problems, hosts is empty.
func Read(from string, data []byte) (hosts []Host, problems []string) {
	s, ok := sources[from]
	if !ok {
		return nil, []string{fmt.Sprintf("no such cloud: %q (known are %s)", from, strings.Join(Names(), ", "))}
	}
	items, err := split(data)
	if err != nil {
		problems = append(problems, err.Error())
	}

	vms := map[string]*vm{}
	owners := map[string]string{} // of each key's hash: the place of its VM's first answer
	var order []*vm
	for _, it := range items {
		a, err := s.readStrictly(it.raw)
		if err != nil {
			problems = append(problems, it.place+": "+err.Error())
			continue
		}
		v := vms[a.id]
		switch {
		case v == nil:
			v = &vm{Host: Host{Name: a.name, Labels: a.labels}, place: it.place, kinds: map[tpm.KeyAlgorithm]string{}}
			vms[a.id], order = v, append(order, v)
		case !s.merge:
			problems = append(problems, fmt.Sprintf("%s: %s: it is in %s already", it.place, a.name, v.place))
			continue
		}
		for _, key := range a.keys {
			if err := v.add(key, owners); err != nil {
				problems = append(problems, fmt.Sprintf("%s: %s: %v", it.place, a.name, err))
			}
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	if len(order) == 0 {
		return nil, []string{"the input has no answers"}
	}
	for _, v := range order {
		hosts = append(hosts, v.Host)
	}
	return hosts, nil
}

// readStrictly reads an answer that has each key once, and no error message.
func (s source) readStrictly(raw json.RawMessage) (answer, error) {
	if text := errorOf(raw); text != "" {
		return answer{}, fmt.Errorf("an error message instead of a key: %s", text)
	}
	if err := strictjson.Keys(raw, func(_, _ string) error { return nil }); err != nil {
		return answer{}, err
	}
	return s.read(raw)
}

// add takes a key of the VM. A TPM has one EK of each kind in use here, and no EK
// is in two TPMs.
func (v *vm) add(key crypto.PublicKey, owners map[string]string) error {
	kind, err := tpm.AlgorithmOf(key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return err
	}
	hash := evidence.Sum(der).String()
	switch had := v.kinds[kind]; {
	case had == hash:
		return nil
	case had != "":
		return fmt.Errorf("it has two different keys of type %s", kind)
	}
	if owner, ok := owners[hash]; ok {
		return fmt.Errorf("its %s key is also that of the VM in %s", kind, owner)
	}
	owners[hash], v.kinds[kind] = v.place, hash
	v.EKHashes = append(v.EKHashes, hash)
	return nil
}

// An item is one answer, not decoded yet.
type item struct {
	place string
	raw   json.RawMessage
}

// split finds the answers in an input. On an error it returns those before it.
func split(data []byte) (items []item, err error) {
	if bytes.HasPrefix(data, []byte("\xff\xfe")) || bytes.HasPrefix(data, []byte("\xfe\xff")) {
		return nil, errors.New("the file is UTF-16: save it as UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))))
	for n := 1; ; n++ {
		place := fmt.Sprintf("document %d", n)
		var raw json.RawMessage
		if err := d.Decode(&raw); errors.Is(err, io.EOF) {
			return items, nil
		} else if err != nil {
			return items, fmt.Errorf("%s: not JSON: %w", place, err)
		}
		if raw[0] != '[' {
			items = append(items, item{place, raw})
		} else {
			var list []json.RawMessage
			if err := json.Unmarshal(raw, &list); err != nil {
				return items, fmt.Errorf("%s: %w", place, err)
			}
			for i, raw := range list {
				items = append(items, item{fmt.Sprintf("%s, item %d", place, i+1), raw})
			}
		}
		if len(items) > maxItems {
			return nil, fmt.Errorf("more than %d answers: import them in several files", maxItems)
		}
	}
}

// errorOf returns the error message that a cloud's command line printed as JSON,
// shortened, or "".
func errorOf(raw json.RawMessage) string {
	var e struct {
		Error json.RawMessage `json:"error"`
	}
	if json.Unmarshal(raw, &e) != nil || len(e.Error) == 0 || string(e.Error) == "null" {
		return ""
	}
	return fmt.Sprintf("%.200q", e.Error)
}

// pemKey reads a public key in PEM, and nothing else beside it.
func pemKey(text string) (crypto.PublicKey, error) {
	block, rest := pem.Decode([]byte(text))
	switch {
	case block == nil:
		return nil, errors.New("not PEM")
	case block.Type != "PUBLIC KEY":
		return nil, fmt.Errorf("PEM of %q, not PUBLIC KEY", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("something follows the key")
	}
	return x509.ParsePKIXPublicKey(block.Bytes)
}
