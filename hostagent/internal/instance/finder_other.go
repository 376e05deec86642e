//go:build !linux

package instance

import (
	"context"
	"errors"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
)

var errSystem = errors.New("programs are not found on this system yet")

// A Finder finds nothing on this system yet.
type Finder struct{}

// New makes a Finder.
func New() *Finder { return &Finder{} }

// Close does nothing.
func (*Finder) Close() {}

// Find is not there on this system yet.
func (*Finder) Find(context.Context, config.Process, string) (process.Program, error) {
	return process.Program{}, errSystem
}

// Inspect is not there on this system yet.
func (*Finder) Inspect(context.Context, int) (process.Program, error) {
	return process.Program{}, errSystem
}

// Starting is not there on this system yet.
func (*Finder) Starting(context.Context, string) (process.Program, error) {
	return process.Program{}, errSystem
}

// Watch sends nothing.
func (*Finder) Watch(context.Context, config.Process) <-chan struct{} { return nil }
