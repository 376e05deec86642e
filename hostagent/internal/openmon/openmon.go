// Package openmon sees who opens the files of the credentials that the agent
// delivered, and tells the broker of programs that are not the credential's own.
//
// It asks the kernel to wait with each open of such a file until it was looked
// at (fanotify's FAN_OPEN_PERM): of a program that reads a file and ends, a mere
// notice would come too late to say who it was. It is a sensor and never a gate.
// Each open is let through, whatever was seen, and the kernel lets all through
// when the agent ends. The look reads /proc alone, of the process and at most
// maxAncestors of its line, and so waits for no disk, no network and no lock that
// is held while a file is opened; all else is done after the answer. What it can't promise is that
// nobody waits while the whole agent is stopped (SIGSTOP, a freezer): the
// service's watchdog bounds that.
//
// It trusts the kernel for pid, executable, user and control group of who opens,
// and the config and the Runner for whose file it is. Where a credential's
// program is found by its unit, its own are the processes in the unit;
// otherwise those that run its executable, the process that was attested, and
// what descends from either. The agent's own are the agent and its commands.
//
// A folder's owner may put any file in a credential's place. What isn't as it was
// delivered is never marked, so that nobody's opens of another's file wait or are
// told, and a mark goes when its file leaves the place. Nothing that the agent
// itself waits for while it can't answer may be marked: it starts no program but
// its own (package deliver's command).
//
// What it doesn't see: what root hides, a descriptor that was opened before the
// mark was set or handed on, an open in the moment after a file was replaced
// (markEvery at most), and a file that was moved out of its place. A hard link
// made after the mark is the same file and is seen; a copy is another.
package openmon

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// A Credential is one whose files are watched.
type Credential struct {
	Config *config.Credential
	// Held is the lease whose credential stands in the files, "" for none, and
	// the program that it is for as it was last seen, nil for none.
	Held func() (lease string, program *process.Program)
}

// Options are what Run needs.
type Options struct {
	Credentials []Credential
	Tell        func(context.Context, []attest.FileOpen) error // the broker
	Log         *slog.Logger
	Now         func() time.Time
}

// markEvery is how often the files are looked up anew: a mark is the inode's,
// and a file that is replaced has another one.
const markEvery = 250 * time.Millisecond

// maxAncestors bounds how far up its line an opener is followed.
const maxAncestors = 32

// A visitor is who opens a file.
type visitor struct {
	pid  int // 0: in no pid namespace that the agent sees
	uid  int // -1: not known
	exe  string
	unit string
	line []relative // itself first
}

type relative struct {
	pid int
	exe string
}

// nobody is a visitor that nothing is known of.
var nobody = visitor{uid: -1}

// owns says whether a credential's file is the visitor's to open.
func owns(p config.Process, program *process.Program, agent int, v visitor) bool {
	if slices.ContainsFunc(v.line, func(r relative) bool { return r.pid == agent }) {
		return true
	}
	if p.Unit != "" {
		return v.unit == p.Unit
	}
	return slices.ContainsFunc(v.line, func(r relative) bool {
		return program != nil && r.pid == program.PID || p.Exe != "" && r.exe == p.Exe
	})
}

// maxText bounds a text that is told.
const maxText = 512

// text makes a path or name fit the wire, which takes only valid UTF-8: any
// user may give a program any name.
func text(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "\uFFFD") }
