// Package deliver defines ways of delivery, and renders the config's templates. The
// ways themselves are packages below this folder; package ways lists them.
//
// It trusts the config. It doesn't trust the values of fields, which a broker sent: an
// encoder keeps a value inside its place in the file. Errors contain no secrets.
package deliver

import (
	"context"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// MaxContent bounds one file's content.
const MaxContent = 1 << 20

// A Way delivers one credential to its program. It is a [Push] or a [Pull]. Each kind of
// way has its own block inside the config's credential block.
type Way interface {
	// Withdraw removes the credential and what an interrupted delivery left. After an
	// error it goes on with the rest, and it can be called again.
	Withdraw() error
}

// A Kind returns the way of a credential, or nil if the credential has no block of this
// kind. A pull way identifies processes by programs.
type Kind func(c *config.Credential, programs Programs) Way

// Programs finds programs for ways.
type Programs interface {
	// Find returns the evidence of the program that p describes, or an error that
	// wraps program.ErrNotRunning. If several match, it returns the instance held
	// if that is among them.
	Find(ctx context.Context, p config.Process, held string) (process.Program, error)
}

// A Push way writes a credential to where the program reads it. The credential counts as
// delivered when it is committed.
type Push interface {
	Way

	// Stage prepares the credential without touching the current one. The caller
	// wipes the fields after it returned.
	Stage(fields map[string]secret.Bytes) (Staged, error)
	// PutBack is Stage for what Contents returned.
	PutBack(contents []secret.Bytes) (Staged, error)
	// Recover cleans up after a crash. If it reports committed, the new credential
	// is in place and the caller has to finish it or roll it back. Otherwise the
	// old one is in place, and nothing is left to do. The Staged is never nil.
	Recover() (s Staged, committed bool, err error)

	// Present reports whether a complete credential is in place.
	Present() bool
	// Contents returns the credential in place, or nil if it isn't complete or was
	// changed since the delivery.
	Contents() []secret.Bytes
}

// Staged is a credential that is about to replace the current one.
type Staged interface {
	// Contents returns what is staged, in the order of the config's files, for a check
	// before Commit, which wipes it as Discard does.
	Contents() []secret.Bytes
	// Commit replaces the old credential by the new one, completely or, on an error,
	// not at all. Rollback is still possible.
	Commit() error
	// Rollback restores the old credential.
	Rollback() error
	// Finish removes the old credential.
	Finish() error
	// Discard ends the use of s. It removes what is only staged. What is committed
	// and not finished stays for Recover.
	Discard()
}

// A Pull way gives a credential to a process that asks for it, after identifying that
// process. The credential counts as delivered when it is first read. It is kept in memory
// only: after a restart of the agent the process has to ask again.
type Pull interface {
	Way

	// Find returns the evidence of the process to serve: the instance held while it
	// runs, otherwise one that has asked. If there is neither, the error wraps
	// program.ErrNotRunning.
	Find(ctx context.Context, held string) (process.Program, error)
	// Watch returns a channel that receives when the results of Find or Asked may have
	// changed, until ctx ends.
	Watch(ctx context.Context) <-chan struct{}
	// Asked reports whether the process that Find returns is waiting and has no offer.
	Asked() bool
	// Offer serves a credential to the instance p, and to no other, from now on. The
	// caller wipes the fields after it returned.
	Offer(p process.Program, fields map[string]secret.Bytes) (Offer, error)
}

// An Offer is a credential that a process may read.
type Offer interface {
	// Read is closed when the process has read the credential for the first time.
	Read() <-chan struct{}
	// Keep stops serving the previous credential.
	Keep()
	// Retract stops serving this credential and serves the previous one again, if it
	// was kept.
	Retract()
}
