//go:build !linux

package files

import (
	"errors"
	"fmt"
)

func openFolder(string) (folder, error) {
	return nil, errors.New("files are delivered on Linux only so far")
}

func explain(name string, err error) error { return fmt.Errorf("%s: %w", name, err) }
