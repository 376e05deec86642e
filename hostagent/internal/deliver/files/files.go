// Package files puts a credential into files that a program reads.
//
// It trusts the config (paths, templates) and nothing that others can reach:
// the files' folders may belong to the program's user, who may put anything
// there at any time. It promises that each file is always the complete old or
// the complete new one, that a set of files ends whole after a crash at any
// point, that no symlink on the way is followed and nothing outside the named
// folders is written, and that no error has a byte of a secret in it.
package files

import (
	"fmt"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/internal/secret"
)

// A Content is what one file holds.
type Content struct {
	File *config.File
	Data secret.Bytes
}

// Prepare renders the files' templates over the credential's fields and
// writes the results beside the files, without touching them.
func Prepare(files []*config.File, fields map[string]secret.Bytes) (*Swap, error) {
	data := make([]secret.Bytes, 0, len(files))
	defer func() { wipe(data) }()
	for _, f := range files {
		b, err := deliver.Render(f.Template, fields)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
		data = append(data, b)
	}
	return prepare(files, data)
}

// PutBack is Prepare with contents that ReadBack read, in the files' order.
func PutBack(files []*config.File, data []secret.Bytes) (*Swap, error) {
	if len(data) != len(files) {
		return nil, fmt.Errorf("%d contents for %d files", len(data), len(files))
	}
	for i, d := range data {
		if d.Len() > deliver.MaxContent {
			return nil, fmt.Errorf("%s: the content has %d bytes; at most %d are written", files[i].Path, d.Len(), deliver.MaxContent)
		}
	}
	return prepare(files, data)
}

func wipe(data []secret.Bytes) {
	for _, d := range data {
		d.Wipe()
	}
}
