// Package deliver puts a credential into the files that a program reads, and
// tells the program.
//
// It trusts the config (paths, templates, commands) and nothing that others
// can reach: the files' folders may belong to the program's user, who may put
// anything there at any time. It promises that each file is always the
// complete old or the complete new one, that a set of files ends whole after
// a crash at any point, that no symlink on the way is followed and nothing
// outside the named folders is written, and that no error has a byte of a
// secret in it.
package deliver

import (
	"errors"
	"fmt"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// maxContent bounds one file's content.
const maxContent = 1 << 20

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
		b, err := render(f.Template, fields)
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
		if d.Len() > maxContent {
			return nil, fmt.Errorf("%s: the content has %d bytes; at most %d are written", files[i].Path, d.Len(), maxContent)
		}
	}
	return prepare(files, data)
}

func wipe(data []secret.Bytes) {
	for _, d := range data {
		d.Wipe()
	}
}

// ErrEnded is Notify's answer where the program isn't there any more.
var ErrEnded = errors.New("the program has ended; its next start reads the new files")
