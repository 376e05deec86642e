package process

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
)

// Version is the newest version of the encoding. A new optional fact is a new field and
// doesn't change the version, because readers ignore fields that they don't know. The
// version changes when a reader that ignores a fact would decide wrongly.
const Version = 2

// Encode encodes the program in the newest version. A program that Parse returned is
// encoded as it was received.
func (p Program) Encode() ([]byte, error) { return p.EncodeAs(Version) }

// EncodeAs is Encode for a reader that knows versions up to this one. It leaves out facts
// that the older version has no field for.
func (p Program) EncodeAs(version int) ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	var out []byte
	var err error
	switch {
	case p.encoded != nil:
		return p.encoded, nil
	case version >= Version:
		out, err = second(p)
	case p.Linux == nil:
		return nil, errors.New("program evidence: this broker reads programs of Linux alone; upgrade it")
	default:
		out, err = firstOf(p).encode()
	}
	if err == nil && len(out) > MaxEncoded {
		err = fmt.Errorf("program evidence of %d bytes; at most %d are sent", len(out), MaxEncoded)
	}
	return out, err
}

// Parse decodes a program. Repeated fields, another order or spacing, values out of bounds
// and unknown versions are errors. Unknown facts are kept for Encode and otherwise ignored.
func Parse(b []byte) (Program, error) {
	if len(b) > MaxEncoded {
		return Program{}, fmt.Errorf("program evidence of %d bytes; at most %d are read", len(b), MaxEncoded)
	}
	p, version, err := parse(b)
	if err != nil {
		return Program{}, err
	}
	if err := p.check(); err != nil {
		return Program{}, err
	}

	// The first version has no optional facts.
	var again []byte
	if version == 1 {
		again, err = firstOf(p).encode()
	} else {
		again, err = ordered(b)
	}
	if err != nil {
		return Program{}, err
	}
	if !bytes.Equal(again, b) {
		return Program{}, errors.New("program evidence is not in its one encoding")
	}
	p.encoded = bytes.Clone(b)
	return p, nil
}

// parse reads either version, in any order and spacing.
func parse(b []byte) (p Program, version int, err error) {
	var v struct {
		Version *int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return p, 0, fmt.Errorf("program evidence: %w", err)
	}
	if v.Version == nil {
		var f first
		if err := json.Unmarshal(b, &f); err != nil {
			return p, 0, fmt.Errorf("program evidence: %w", err)
		}
		return f.program(), 1, nil
	}
	if *v.Version != Version {
		return p, 0, fmt.Errorf("program evidence of version %d; 1 to %d are read", *v.Version, Version)
	}
	if err := json.Unmarshal(b, (*plain)(&p)); err != nil {
		return p, 0, fmt.Errorf("program evidence: %w", err)
	}
	return p, *v.Version, nil
}

// plain is a Program without its methods.
type plain Program

// second is a program in the second version.
func second(p Program) ([]byte, error) {
	b, err := json.Marshal(struct {
		plain
		Version int `json:"version"`
	}{plain(p), Version})
	if err != nil {
		return nil, err
	}
	return ordered(b)
}

// ordered returns JSON in the form that json.Marshal writes: without spaces, with <, > and
// & escaped, and with the fields of each object sorted and without repetition. Inside
// another value, such as a lease, json.Marshal leaves this form unchanged. Names with
// capital letters are errors, because encoding/json ignores case, and so is null, which it
// takes for an absent field.
func ordered(b []byte) ([]byte, error) {
	var v any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("program evidence: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("program evidence: something follows it")
	}
	if err := plainNames(v); err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

func plainNames(v any) error {
	switch v := v.(type) {
	case nil:
		return errors.New("program evidence: a fact is null")
	case []any:
		for _, one := range v {
			if err := plainNames(one); err != nil {
				return err
			}
		}
	case map[string]any:
		for name, one := range v {
			if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
				return fmt.Errorf("program evidence: a fact's name %q has other characters than a-z, 0-9 and _", name)
			}
			if err := plainNames(one); err != nil {
				return err
			}
		}
	}
	return nil
}

// MarshalJSON writes the program as Encode does, whether or not it is complete.
func (p Program) MarshalJSON() ([]byte, error) {
	if p.encoded != nil {
		return p.encoded, nil
	}
	return second(p)
}

// UnmarshalJSON decodes a program in any layout, without Parse's checks. It is for what the
// broker recorded itself, and for tools.
func (p *Program) UnmarshalJSON(b []byte) error {
	read, _, err := parse(b)
	*p = read
	return err
}

// first is the first version, of Linux programs alone. It has no version field,
// and doesn't change any more.
type first struct {
	Boot       string          `json:"boot"`
	PID        int             `json:"pid,omitempty"`
	Start      uint64          `json:"start,omitempty"`
	Exe        string          `json:"exe"`
	SHA256     evidence.Digest `json:"sha256"`
	User       string          `json:"user"`
	UID        uint32          `json:"uid"`
	GID        uint32          `json:"gid"`
	Groups     []uint32        `json:"groups,omitempty"`
	Cgroup     string          `json:"cgroup,omitempty"`
	Unit       string          `json:"unit,omitempty"`
	Invocation string          `json:"invocation,omitempty"`
	Starting   bool            `json:"starting,omitempty"`
	Mappings   []firstMapping  `json:"mappings,omitempty"`
	Parent     *firstParent    `json:"parent,omitempty"`
}

type firstMapping struct {
	Path    string `json:"path"`
	Deleted bool   `json:"deleted,omitempty"`
}

type firstParent struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
	Exe   string `json:"exe,omitempty"`
}

func firstOf(p Program) first {
	f := first{Boot: p.Boot, PID: p.PID, Start: p.Start, Exe: p.Main().Path, SHA256: p.Main().SHA256, User: p.User, Starting: p.Starting}
	if l := p.Linux; l != nil {
		f.UID, f.GID, f.Groups, f.Cgroup, f.Unit, f.Invocation = l.UID, l.GID, l.Groups, l.Cgroup, l.Unit, l.Invocation
	}
	for _, m := range p.Mappings {
		f.Mappings = append(f.Mappings, firstMapping{Path: m.Path, Deleted: m.Deleted})
	}
	if p.Parent != nil {
		f.Parent = &firstParent{PID: p.Parent.PID, Start: p.Parent.Start, Exe: p.Parent.Exe}
	}
	return f
}

func (f first) encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(f)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

func (f first) program() Program {
	p := Program{Boot: f.Boot, PID: f.PID, Start: f.Start, Executables: OneFile(f.Exe, f.SHA256), User: f.User, Starting: f.Starting,
		Linux: &Linux{UID: f.UID, GID: f.GID, Groups: f.Groups, Cgroup: f.Cgroup, Unit: f.Unit, Invocation: f.Invocation}}
	for _, m := range f.Mappings {
		p.Mappings = append(p.Mappings, Mapping{Path: m.Path, Deleted: m.Deleted})
	}
	if f.Parent != nil {
		p.Parent = &Parent{PID: f.Parent.PID, Start: f.Parent.Start, Exe: f.Parent.Exe}
	}
	return p
}
