//go:build !linux

package notify

import (
	"context"
	"errors"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
)

var errNotHere = errors.New("programs are told on Linux only so far")

// Check can't be run.
func Check(context.Context, *config.OnChange, []string) error { return errNotHere }

// Notify can't be done.
func Notify(context.Context, *config.OnChange, process.Program) error { return errNotHere }
