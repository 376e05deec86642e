//go:build !linux

package notify

import (
	"context"
	"errors"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

var errNotHere = errors.New("programs are told on Linux only so far")

// Check can't be run.
func Check(context.Context, *config.Credential, string, []secret.Bytes) error { return errNotHere }

// Notify can't be done.
func Notify(context.Context, *config.OnChange, process.Program) error { return errNotHere }

// Clean finds nothing.
func Clean(string) error { return nil }
