//go:build !linux

package files

import (
	"errors"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

var errNotHere = errors.New("files are delivered on Linux only so far")

// A Swap can't be made here.
type Swap struct{}

func prepare([]*config.File, []secret.Bytes) (*Swap, error) { return nil, errNotHere }

// Paths are none.
func (*Swap) Paths() []string { return nil }

// Commit can't be.
func (*Swap) Commit() error { return errNotHere }

// Rollback has nothing to bring back.
func (*Swap) Rollback() error { return nil }

// Finish has nothing to remove.
func (*Swap) Finish() error { return nil }

// Discard has nothing to let go of.
func (*Swap) Discard() {}

// Recover finds nothing: nothing was delivered.
func Recover([]*config.File) (*Swap, bool, error) { return &Swap{}, false, nil }

// Withdraw has nothing to remove.
func Withdraw([]*config.File) error { return nil }

// Standing is false.
func Standing([]*config.File) bool { return false }

// ReadBack is nil.
func ReadBack([]*config.File) []Content { return nil }
