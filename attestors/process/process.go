// Package process is what a host says of one running program, in the form in
// which the agent sends it and the broker reads it.
//
// Trust: pid, user and unit are the agent's word, which stands on the host's
// measured state; only the digest can be held against what the kernel
// measured. argv, environment and the process's name prove nothing and are
// not part of it. The codec promises one encoding: what Parse accepts, Encode
// gives back byte for byte.
package process

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/countersign/countersign/attestors/evidence"
)

// Limits of one program's evidence. A JVM maps some hundred libraries.
const (
	MaxEncoded  = 512 << 10
	MaxMappings = 2048
	MaxGroups   = 1024
	maxString   = 4096
)

// A Program is one instance of a program on a Linux or Windows host.
type Program struct {
	Boot   string          `json:"boot"`            // kernel's boot id
	PID    int             `json:"pid,omitempty"`   // 0 while a unit starts
	Start  uint64          `json:"start,omitempty"` // clock ticks from boot to the process's start
	Exe    string          `json:"exe"`             // absolute path, as the kernel resolved it
	SHA256 evidence.Digest `json:"sha256"`          // of the file that runs, read through /proc

	User   string   `json:"user"` // name of UID on the host, or the number
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`

	Cgroup     string `json:"cgroup,omitempty"`     // path in the system manager's hierarchy
	Unit       string `json:"unit,omitempty"`       // of the system manager, never of a user's
	Invocation string `json:"invocation,omitempty"` // 32 hex digits, from the manager

	// Starting is set while the unit is not yet running its program: Exe and
	// SHA256 are then those of its ExecStart file.
	Starting bool `json:"starting,omitempty"`

	// Mappings are executable mappings of files other than Exe, and of memory
	// that belongs to no file.
	Mappings []Mapping `json:"mappings,omitempty"`

	Parent *Parent `json:"parent,omitempty"`
}

// A Mapping is executable memory of a program.
type Mapping struct {
	Path    string `json:"path"`              // "[anonymous]" for memory without a file
	Deleted bool   `json:"deleted,omitempty"` // the file is gone, or was replaced
}

// Anonymous is the Path of executable memory that no file backs.
const Anonymous = "[anonymous]"

// A Parent is the process that a program's parent pid named.
type Parent struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
	Exe   string `json:"exe,omitempty"` // empty where it can't be read
}

// An Instance names one run of a program. It is comparable.
type Instance struct {
	Boot       string
	Unit       string // with Invocation, for a unit
	Invocation string
	PID        int // with Start, for everything else
	Start      uint64
}

// Instance is which run of the program this is: for a unit its invocation,
// whichever process speaks for it, otherwise the process.
func (p Program) Instance() Instance {
	if p.Unit != "" {
		return Instance{Boot: p.Boot, Unit: p.Unit, Invocation: p.Invocation}
	}
	return Instance{Boot: p.Boot, PID: p.PID, Start: p.Start}
}

func (i Instance) String() string {
	if i.Unit != "" {
		return i.Boot + "/" + i.Unit + "/" + i.Invocation
	}
	return fmt.Sprintf("%s/%d/%d", i.Boot, i.PID, i.Start)
}

// Encode writes the program for the wire.
func (p Program) Encode() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	return encode(p)
}

func encode(p Program) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(p); err != nil {
		return nil, err
	}
	out := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if len(out) > MaxEncoded {
		return nil, fmt.Errorf("program evidence of %d bytes; at most %d are sent", len(out), MaxEncoded)
	}
	return out, nil
}

// Parse reads what Encode wrote and nothing else: unknown or doubled fields,
// other spacing and values out of bounds are errors.
func Parse(b []byte) (Program, error) {
	if len(b) > MaxEncoded {
		return Program{}, fmt.Errorf("program evidence of %d bytes; at most %d are read", len(b), MaxEncoded)
	}
	var p Program
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return Program{}, fmt.Errorf("program evidence: %w", err)
	}
	if err := p.check(); err != nil {
		return Program{}, err
	}
	again, err := encode(p)
	if err != nil {
		return Program{}, err
	}
	if !bytes.Equal(again, b) {
		return Program{}, errors.New("program evidence is not in its one encoding")
	}
	return p, nil
}

func (p Program) check() error {
	if err := text("boot", p.Boot); err != nil {
		return err
	}
	if p.Boot == "" {
		return errors.New("program evidence: boot is missing")
	}
	for _, f := range []struct{ name, value string }{
		{"user", p.User}, {"cgroup", p.Cgroup}, {"unit", p.Unit}, {"invocation", p.Invocation},
	} {
		if err := text(f.name, f.value); err != nil {
			return err
		}
	}
	if err := file("exe", p.Exe); err != nil {
		return err
	}
	switch {
	case p.SHA256.IsZero():
		return errors.New("program evidence: sha256 is missing")
	case (p.Unit == "") != (p.Invocation == ""):
		return errors.New("program evidence: a unit comes with its invocation")
	case p.Invocation != "" && !isHex(p.Invocation, 32):
		return errors.New("program evidence: an invocation has 32 lowercase hex digits")
	case p.Starting && p.Unit == "":
		return errors.New("program evidence: only a unit can be starting")
	case !p.Starting && (p.PID <= 0 || p.Start == 0):
		return errors.New("program evidence: a running program has a pid and a start time")
	case len(p.Groups) > MaxGroups:
		return fmt.Errorf("program evidence: %d groups; at most %d", len(p.Groups), MaxGroups)
	case len(p.Mappings) > MaxMappings:
		return fmt.Errorf("program evidence: %d executable mappings; at most %d", len(p.Mappings), MaxMappings)
	}
	for _, m := range p.Mappings {
		if m.Path == Anonymous {
			continue
		}
		if err := file("mapping", m.Path); err != nil {
			return err
		}
	}
	if p.Parent != nil && p.Parent.Exe != "" {
		return file("parent", p.Parent.Exe)
	}
	return nil
}

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	return strings.Trim(s, "0123456789abcdef") == ""
}

func text(name, s string) error {
	if len(s) > maxString || !utf8.ValidString(s) {
		return fmt.Errorf("program evidence: %s is not UTF-8 of at most %d bytes", name, maxString)
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("program evidence: %s has a control character", name)
	}
	return nil
}

// file holds a path to the kernel's form: absolute and clean.
func file(name, s string) error {
	if err := text(name, s); err != nil {
		return err
	}
	windows := len(s) > 2 && s[1] == ':' && s[2] == '\\'
	if !windows && (!path.IsAbs(s) || path.Clean(s) != s) {
		return fmt.Errorf("program evidence: %s %q is not an absolute path", name, s)
	}
	return nil
}
