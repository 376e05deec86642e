//go:build !linux

package collect

import (
	"errors"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

var errSystem = errors.New("program evidence is not collected on this system yet")

// Process is not there on this system yet.
func Process(int) (process.Program, error) { return process.Program{}, errSystem }

// BootID is not there on this system yet.
func BootID() (string, error) { return "", errSystem }

// File is not there on this system yet.
func File(string) (string, evidence.Digest, error) { return "", evidence.Digest{}, errSystem }
