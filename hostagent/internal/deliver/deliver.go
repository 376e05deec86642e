// Package deliver says what a way of delivery is, and makes of a credential's
// fields what a program reads, by the config's templates. The ways are in the
// folders below it; package ways names them.
//
// It trusts the config, and neither the fields' values, which a broker sent,
// nor the readers of what is written: a value stays inside its place. No error
// has a byte of a secret in it.
package deliver

import (
	"context"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// MaxContent bounds one file's content.
const MaxContent = 1 << 20

// A Way brings one credential to its program. It is a [Push] or a [Pull], and
// has a block type of its own in the config's credential block: the block says
// which way a credential takes.
type Way interface {
	// Withdraw takes the credential away, wherever this way has put it, and
	// whatever an interrupted delivery left. It tries everything, and can be
	// repeated after an error.
	Withdraw() error
}

// A Kind makes the way of a credential, or returns nil where the credential has
// no block of this kind. programs identifies the processes that a pull way finds.
type Kind func(c *config.Credential, programs Programs) Way

// Programs is what a way needs to know of what runs.
type Programs interface {
	// Find returns the evidence of the program that p describes, an error that
	// wraps program.ErrNotRunning while there is none. Of several it is the
	// instance named held, if that is one of them.
	Find(ctx context.Context, p config.Process, held string) (process.Program, error)
}

// A Push way puts a credential where its program will read it. It is delivered
// when it is committed.
type Push interface {
	Way

	// Stage makes the credential ready beside the one that stands, which it
	// doesn't touch. The fields are wiped when it has returned.
	Stage(fields map[string]secret.Bytes) (Staged, error)
	// PutBack is Stage with what Contents returned.
	PutBack(contents []secret.Bytes) (Staged, error)
	// Recover settles what a crash left. committed: the new credential stands,
	// and the caller finishes it or rolls it back. Otherwise the old one stands,
	// and the Staged is over. It is never nil.
	Recover() (s Staged, committed bool, err error)

	// Present reports whether a credential stands, whole.
	Present() bool
	// Contents returns what stands, nil unless it is whole and as it was delivered.
	Contents() []secret.Bytes
}

// Staged is a credential on its way to the place of another.
type Staged interface {
	// Paths are the files of what is staged, for a check before Commit, in the
	// config's order.
	Paths() []string
	// Commit puts the new credential in the old one's place: all of it, or on an
	// error none. The old one can still be brought back.
	Commit() error
	// Rollback brings the old credential back.
	Rollback() error
	// Finish removes the old credential.
	Finish() error
	// Discard lets go: what is only staged is removed; what is committed stays as
	// it is, for Recover.
	Discard()
}

// A Pull way hands a credential to a process that comes for it, and that it has
// identified itself. It is delivered when it is first read. A way keeps what it
// offers in memory: after the agent's restart a process has to come again.
type Pull interface {
	Way

	// Find returns the evidence of the process to serve: the one of the instance
	// held while that lives, else one that has come; an error that wraps
	// program.ErrNotRunning where there is neither.
	Find(ctx context.Context, held string) (process.Program, error)
	// Watch sends when Find or Asked may answer differently, until ctx ends.
	Watch(ctx context.Context) <-chan struct{}
	// Asked reports whether the process that Find returns waits, and nothing is
	// offered to it.
	Asked() bool
	// Offer serves a credential to the instance p from now on, and to no other. The
	// fields are wiped when it has returned.
	Offer(p process.Program, fields map[string]secret.Bytes) (Offer, error)
}

// An Offer is a credential that a process may read, and perhaps has read.
type Offer interface {
	// Read is closed when the process has read the credential for the first time.
	Read() <-chan struct{}
	// Keep ends the serving of what was offered before.
	Keep()
	// Retract ends the serving of this credential; what was kept before is
	// served again.
	Retract()
}
