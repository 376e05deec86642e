// Package files is the way of delivery that puts a credential into files, which
// its program reads when it likes. Its blocks in the config are file.
//
// It trusts the config (paths, templates) and nothing that others can reach:
// the files' folders may belong to the program's user, who may put anything
// there at any time. It promises that each file is always the complete old or
// the complete new one, that a set of files ends whole after a crash at any
// point, that no symlink on the way is followed and nothing outside the named
// folders is written, and that no error has a byte of a secret in it.
//
// The swapping of a set is a state machine (swap.go) over what a system's
// folders can do (folder.go).
package files

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/internal/secret"
)

// A Way delivers to one credential's files. It is a [deliver.Push].
type Way struct {
	files []*config.File
	open  func(path string) (folder, error)
}

// Of is the [deliver.Kind].
func Of(c *config.Credential, _ deliver.Programs) deliver.Way {
	if len(c.Files) == 0 {
		return nil
	}
	return New(c.Files)
}

// New makes the Way of some files, which are swapped as one.
func New(files []*config.File) *Way { return &Way{files, openFolder} }

// Stage renders the files' templates over the credential's fields and writes the
// results beside the files, without touching them.
func (w *Way) Stage(fields map[string]secret.Bytes) (deliver.Staged, error) {
	data := make([]secret.Bytes, 0, len(w.files))
	for _, f := range w.files {
		b, err := deliver.Render(f.Template, fields)
		if err != nil {
			wipe(data)
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
		data = append(data, b)
	}
	s, err := w.prepare(data)
	if err != nil {
		wipe(data)
		return nil, err
	}
	s.contents = data
	return s, nil
}

// PutBack is Stage with contents that Contents returned, in the files' order.
func (w *Way) PutBack(contents []secret.Bytes) (deliver.Staged, error) {
	if len(contents) != len(w.files) {
		return nil, fmt.Errorf("%d contents for %d files", len(contents), len(w.files))
	}
	for i, d := range contents {
		if d.Len() > deliver.MaxContent {
			return nil, fmt.Errorf("%s: the content has %d bytes; at most %d are written", w.files[i].Path, d.Len(), deliver.MaxContent)
		}
	}
	s, err := w.prepare(contents)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Recover settles what a crash left of a swap of these files.
func (w *Way) Recover() (deliver.Staged, bool, error) { return w.recover() }

// Withdraw removes the files and what an interrupted swap left of them; it
// tries all of them.
func (w *Way) Withdraw() error {
	var errs []error
	for _, f := range w.files {
		if err := w.withdraw(f); err != nil {
			errs = append(errs, fmt.Errorf("%s: not removed: %w", f.Path, err))
		}
	}
	return errors.Join(errs...)
}

func (w *Way) withdraw(f *config.File) error {
	t, err := w.target(f)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = t.dir.Close() }()

	// The file first, and each of them whatever the others say: who owns the
	// folder can put there what can't be unlinked. What recover makes of the rest
	// after a crash is withdrawn once more.
	var errs []error
	for _, name := range []string{t.name, t.new(), t.old(), t.none()} {
		errs = append(errs, t.clear(name))
	}
	return errors.Join(errs...)
}

// Present reports whether all files are there.
func (w *Way) Present() bool {
	for _, f := range w.files {
		t, err := w.target(f)
		if err != nil {
			return false
		}
		there, err := t.dir.look(t.name)
		_ = t.dir.Close()
		if err != nil || !there {
			return false
		}
	}
	return true
}

// Contents is what stands in the files; nil unless all are there and still are
// what was delivered.
func (w *Way) Contents() []secret.Bytes {
	var out []secret.Bytes
	for _, f := range w.files {
		data, err := w.read(f)
		if err != nil {
			wipe(out)
			return nil
		}
		out = append(out, data)
	}
	return out
}

func (w *Way) read(f *config.File) (secret.Bytes, error) {
	t, err := w.target(f)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer func() { _ = t.dir.Close() }()
	return t.dir.read(t.name, f)
}

func wipe(data []secret.Bytes) {
	for _, d := range data {
		d.Wipe()
	}
}
