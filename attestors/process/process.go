// Package process is what a host says of one running program, in the form in
// which the agent sends it and the broker reads it.
//
// Trust: pid, user and unit are the agent's word, which stands on the host's
// measured state; only the digest can be held against what the kernel
// measured. argv, environment and the process's name prove nothing and are
// not part of it. The codec promises that what Parse accepts has one meaning, and
// that Encode gives it back byte for byte, with optional facts of a newer agent
// that Parse doesn't know.
package process

import (
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
	MaxEncoded     = 512 << 10
	MaxExecutables = 16
	MaxMappings    = 2048
	MaxGroups      = 1024
	maxString      = 4096
)

// A Program is one instance of a program: what is known of it on every system,
// and what its system adds. One that Parse returned is not changed afterwards: it
// is encoded as it came.
type Program struct {
	Boot  string `json:"boot"`            // id of the boot, from the kernel
	PID   int    `json:"pid,omitempty"`   // 0 while a service starts
	Start uint64 `json:"start,omitempty"` // of the process, in the system's ticks from boot
	User  string `json:"user"`            // the account's name on the host, or its number

	// Executables are the files that make up the program. The first has the role
	// Main; the others say what Main was given to run.
	Executables []Executable `json:"executables"`

	// Starting is set while the service is not yet running its program:
	// Executables are then those that it will run.
	Starting bool `json:"starting,omitempty"`

	// Mappings are executable mappings of files other than Executables, and of
	// memory that belongs to no file.
	Mappings []Mapping `json:"mappings,omitempty"`

	Parent *Parent `json:"parent,omitempty"`

	// One of these is what the host's system adds; both nil: nothing.
	Linux   *Linux   `json:"linux,omitempty"`
	Windows *Windows `json:"windows,omitempty"`

	encoded []byte // as Parse read it; nil: made here
}

// An Executable is a file that a program runs. Its digest is of what runs, read
// through the process and not through the path.
type Executable struct {
	Path   string          `json:"path"` // absolute, as the kernel resolved it
	Role   Role            `json:"role"`
	SHA256 evidence.Digest `json:"sha256"`
}

// A Role is what a file is to its program. Those that a reader doesn't know are
// optional facts.
type Role string

// Roles.
const (
	Main   Role = "main"   // the file that the process runs: of a script its interpreter
	Script Role = "script" // a script that Main interprets
)

// OneFile is the Executables of a program that is one file.
func OneFile(path string, sha256 evidence.Digest) []Executable {
	return []Executable{{Path: path, Role: Main, SHA256: sha256}}
}

// Linux is what a Linux host adds.
type Linux struct {
	UID        uint32   `json:"uid"`
	GID        uint32   `json:"gid"`
	Groups     []uint32 `json:"groups,omitempty"`
	Cgroup     string   `json:"cgroup,omitempty"`     // path in the system manager's hierarchy
	Unit       string   `json:"unit,omitempty"`       // of the system manager, never of a user's
	Invocation string   `json:"invocation,omitempty"` // 32 hex digits, from the manager
}

// Windows is what a Windows host adds. No agent collects it yet.
type Windows struct {
	SID     string `json:"sid"`               // of the account
	Service string `json:"service,omitempty"` // its name at the service control manager
}

// A Mapping is executable memory of a program. Device and Inode say which file it
// is, as the kernel shows it, where Path doesn't.
type Mapping struct {
	Path    string `json:"path"`              // of the file on the host; or one of the forms below
	Deleted bool   `json:"deleted,omitempty"` // the file is gone, or was replaced
	Device  string `json:"device,omitempty"`
	Inode   uint64 `json:"inode,omitempty"`
}

// Anonymous is the Path of executable memory that no file backs.
const Anonymous = "[anonymous]"

// Folders before the path of a file that is another on the host, or none. They are part of
// the path, so that readers that don't know them take it for no system folder's.
const (
	// Foreign is before a path that anybody may have made up, by mounts of his own.
	Foreign = "/[foreign]"
	// Private is before the path of a file that it means where the host's root set up the
	// program's mounts, as by PrivateTmp=.
	Private = "/[private]"
)

// A Parent is the process that a program's parent pid named.
type Parent struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
	Exe   string `json:"exe,omitempty"` // empty where it can't be read
}

// Main returns the file that the process runs; it is zero where p says none.
func (p Program) Main() Executable {
	if len(p.Executables) == 0 {
		return Executable{}
	}
	return p.Executables[0]
}

// Unit returns the system manager's unit that p is of, "" for none.
func (p Program) Unit() string {
	if p.Linux == nil {
		return ""
	}
	return p.Linux.Unit
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
	if p.Unit() != "" {
		return Instance{Boot: p.Boot, Unit: p.Linux.Unit, Invocation: p.Linux.Invocation}
	}
	return Instance{Boot: p.Boot, PID: p.PID, Start: p.Start}
}

func (i Instance) String() string {
	if i.Unit != "" {
		return i.Boot + "/" + i.Unit + "/" + i.Invocation
	}
	return fmt.Sprintf("%s/%d/%d", i.Boot, i.PID, i.Start)
}

// check holds a program's facts to their bounds.
func (p Program) check() error {
	if err := text("boot", p.Boot); err != nil {
		return err
	}
	if p.Boot == "" {
		return errors.New("program evidence: boot is missing")
	}
	if err := text("user", p.User); err != nil {
		return err
	}
	if err := checkExecutables(p.Executables); err != nil {
		return err
	}
	if err := p.Linux.check(); err != nil {
		return err
	}
	if err := p.Windows.check(); err != nil {
		return err
	}
	switch {
	case p.Linux != nil && p.Windows != nil:
		return errors.New("program evidence: a program runs on one system")
	case p.Starting && p.Unit() == "" && (p.Windows == nil || p.Windows.Service == ""):
		return errors.New("program evidence: only a unit or a service can be starting")
	case !p.Starting && (p.PID <= 0 || p.Start == 0):
		return errors.New("program evidence: a running program has a pid and a start time")
	}
	return checkMemory(p.Mappings, p.Parent)
}

func checkExecutables(list []Executable) error {
	if len(list) == 0 || len(list) > MaxExecutables {
		return fmt.Errorf("program evidence: %d executables; there are 1 to %d", len(list), MaxExecutables)
	}
	for i, e := range list {
		if err := file("exe", e.Path); err != nil {
			return err
		}
		if err := text("role", string(e.Role)); err != nil {
			return err
		}
		if e.SHA256.IsZero() {
			return errors.New("program evidence: sha256 is missing")
		}
		if (e.Role == Main) != (i == 0) {
			return errors.New("program evidence: the first executable, and no other, is the main one")
		}
	}
	return nil
}

func (l *Linux) check() error {
	if l == nil {
		return nil
	}
	for _, f := range []struct{ name, value string }{{"cgroup", l.Cgroup}, {"unit", l.Unit}, {"invocation", l.Invocation}} {
		if err := text(f.name, f.value); err != nil {
			return err
		}
	}
	switch {
	case (l.Unit == "") != (l.Invocation == ""):
		return errors.New("program evidence: unit and invocation must be set together")
	case l.Invocation != "" && !isHex(l.Invocation, 32):
		return errors.New("program evidence: an invocation has 32 lowercase hex digits")
	case len(l.Groups) > MaxGroups:
		return fmt.Errorf("program evidence: %d groups; at most %d", len(l.Groups), MaxGroups)
	}
	return nil
}

func (w *Windows) check() error {
	if w == nil {
		return nil
	}
	if err := text("service", w.Service); err != nil {
		return err
	}
	if !strings.HasPrefix(w.SID, "S-1-") || strings.Trim(w.SID[len("S-1-"):], "0123456789-") != "" {
		return errors.New("program evidence: a SID begins with S-1- and has digits and - only")
	}
	return text("sid", w.SID)
}

func checkMemory(mappings []Mapping, parent *Parent) error {
	if len(mappings) > MaxMappings {
		return fmt.Errorf("program evidence: %d executable mappings; at most %d", len(mappings), MaxMappings)
	}
	for _, m := range mappings {
		if err := text("device", m.Device); err != nil {
			return err
		}
		if m.Path == Anonymous {
			continue
		}
		if err := file("mapping", m.Path); err != nil {
			return err
		}
	}
	if parent != nil && parent.Exe != "" {
		return file("parent", parent.Exe)
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
