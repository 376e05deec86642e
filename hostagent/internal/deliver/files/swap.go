package files

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// How a set is swapped. Beside a file NAME stand, under fixed names,
//
//	new   .NAME.countersign-new   the new content
//	old   .NAME.countersign-old   a second link to the old content
//	none  .NAME.countersign-none  empty: there was no old content
//
// and each step is durable (fsync of the folder) before the next one, file
// after file in the order of their paths:
//
//	Stage     open(new, O_CREAT|O_EXCL|O_NOFOLLOW, 0600) write fchown fchmod fsync
//	Commit    link(NAME, old) or open(none, O_CREAT|O_EXCL) · rename(new, NAME)
//	Finish    unlink(old), unlink(none)
//	Rollback  last file first: rename(old, NAME), or unlink(NAME) unlink(none);
//	          for a file that still has its new: unlink(old), unlink(none); and
//	          when all this is done: unlink(new)
//
// What stands after a crash, for a set of three (N: new, with or without old;
// K: old or none, without new; -: neither):
//
//	N - -   N N -    died in Stage                      Recover rolls back
//	N N N   K N N    died in Commit                     Recover rolls back
//	- N N   - - N    died rolling back a Commit         Recover rolls back
//	K K K            committed                          the caller's choice
//	K K K            (none, and no file) in Rollback    Recover rolls back
//	- K K   - - K    died in Finish                     Recover finishes
//	K K -   K - -    died in Rollback                   Recover rolls back
//	- - -            before Stage, or all is done       nothing to do
//
// So a new anywhere means that the set isn't committed, and is the last thing
// to go; and without any, the first file says which way the set was going.

// The states of a swap.
type state int

const (
	done state = iota
	prepared
	committed
)

// A swap is the replacing of a set of files by another.
type swap struct {
	targets  []*target      // in the config's order
	contents []secret.Bytes // what Stage rendered, in the same order, until Commit
	state    state
}

// A target is one file of a swap.
type target struct {
	path string
	name string
	dir  folder    // nil: it doesn't exist
	made io.Closer // the new content
}

func (t *target) new() string  { return "." + t.name + ".countersign-new" }
func (t *target) old() string  { return "." + t.name + ".countersign-old" }
func (t *target) none() string { return "." + t.name + ".countersign-none" }

func (t *target) beside(name string) string { return filepath.Join(filepath.Dir(t.path), name) }

// target is f's, with its folder open.
func (w *Way) target(f *config.File) (*target, error) {
	t := &target{path: f.Path, name: filepath.Base(f.Path)}
	dir, err := w.open(filepath.Dir(f.Path))
	if err == nil {
		t.dir = dir
	}
	return t, err
}

// prepare settles what an earlier swap left and writes the new contents.
func (w *Way) prepare(data []secret.Bytes) (_ *swap, err error) {
	left, _, err := w.recover()
	if err == nil {
		err = left.Finish()
	}
	left.Discard()
	if err != nil {
		return nil, err
	}

	s := &swap{state: prepared}
	defer func() {
		if err != nil {
			s.Discard()
		}
	}()
	for i, f := range w.files {
		t, err := w.target(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w; the old credential stays", f.Path, err)
		}
		s.targets = append(s.targets, t)
		if err := t.write(f, data[i]); err != nil {
			return nil, fmt.Errorf("%s: %w; the old credential stays", f.Path, err)
		}
		step("prepare " + t.name)
	}
	return s, nil
}

// write makes the new content, where it could take the old one's place.
func (t *target) write(f *config.File, data secret.Bytes) error {
	if _, err := t.dir.look(t.name); err != nil {
		return explain(t.path, err)
	}
	made, err := t.dir.write(t.new(), data, f)
	if err != nil {
		return explain(t.beside(t.new()), err)
	}
	t.made = made
	return t.dir.sync()
}

// Contents are the new ones, in the config's order.
func (s *swap) Contents() []secret.Bytes { return s.contents }

// ordered are the targets in the order in which they are swapped.
func (s *swap) ordered() []*target {
	return slices.SortedFunc(slices.Values(s.targets), func(a, b *target) int { return cmp.Compare(a.path, b.path) })
}

// Commit puts the new files in the old ones' place: all, or on an error none.
func (s *swap) Commit() error {
	if s.state != prepared {
		return errors.New("this swap is not one that is prepared")
	}
	wipe(s.contents)
	s.contents = nil
	for _, t := range s.ordered() {
		if err := t.swap(); err != nil {
			return errors.Join(fmt.Errorf("%s: %w; the old credential stays", t.path, err), s.back())
		}
	}
	s.state = committed
	return nil
}

func (t *target) swap() error {
	was, err := t.dir.look(t.name)
	if err != nil {
		return explain(t.path, err)
	}
	if err := t.keep(was); err != nil {
		return err
	}
	step("keep " + t.name)
	if err := t.dir.sync(); err != nil {
		return err
	}
	step("keep-sync " + t.name)

	into := t.dir.renameNew
	if was {
		into = t.dir.rename
	}
	err = into(t.new(), t.name)
	if errors.Is(err, fs.ErrExist) && !was {
		return errors.New("it came into being just now, made by somebody else: trying again")
	}
	if err != nil {
		return explain(t.path, err)
	}
	step("rename " + t.name)
	if !t.dir.is(t.name, t.made) {
		return fmt.Errorf("%w: look who can write to the folder", errReplaced)
	}
	if err := t.dir.sync(); err != nil {
		return err
	}
	step("rename-sync " + t.name)
	return nil
}

// keep gives the old content a second name, or notes that there is none.
func (t *target) keep(was bool) error {
	if !was {
		if err := t.dir.mark(t.none()); err != nil {
			return explain(t.beside(t.none()), err)
		}
		return nil
	}
	if err := t.dir.link(t.name, t.old()); err != nil {
		return explain(t.beside(t.old()), err)
	}
	return nil
}

// Finish removes the old content.
func (s *swap) Finish() error {
	switch s.state {
	case prepared:
		return errors.New("this swap is not committed")
	case committed:
		for _, t := range s.ordered() {
			if err := t.clear(t.old(), t.none()); err != nil {
				return fmt.Errorf("%s: the old content is not removed: %w", t.path, err)
			}
		}
		s.end()
	}
	return nil
}

// clear removes names beside a file, durably.
func (t *target) clear(names ...string) error {
	if t.dir == nil {
		return nil
	}
	for _, name := range names {
		if err := t.dir.remove(name); err != nil {
			return explain(t.beside(name), err)
		}
		step("clear " + name)
	}
	return t.dir.sync()
}

// Rollback brings the old files back, and removes those that were none.
func (s *swap) Rollback() error {
	if s.state == done {
		return nil
	}
	return s.back()
}

// back rolls back from every state that a crash can leave. It stops at the
// first error: what it leaves then is again such a state.
func (s *swap) back() error {
	backwards := s.ordered()
	slices.Reverse(backwards)
	var unswapped []*target
	for _, t := range backwards {
		has, err := t.marks()
		if err == nil {
			switch {
			case has.new:
				unswapped = append(unswapped, t)
			case has.old:
				err = t.restore()
			case has.none:
				if err = t.clear(t.name); err == nil {
					err = t.clear(t.none())
				}
			}
		}
		if err != nil {
			return fmt.Errorf("%s: the old credential is not back: %w", t.path, err)
		}
	}
	for _, t := range unswapped {
		if err := t.clear(t.old(), t.none()); err != nil {
			return fmt.Errorf("%s: %w", t.path, err)
		}
	}
	for _, t := range unswapped {
		if err := t.clear(t.new()); err != nil {
			return fmt.Errorf("%s: %w", t.path, err)
		}
	}
	s.end()
	return nil
}

func (t *target) restore() error {
	if err := t.dir.rename(t.old(), t.name); err != nil {
		return explain(t.path, err)
	}
	step("restore " + t.name)
	if err := t.dir.sync(); err != nil {
		return err
	}
	return t.clear(t.old()) // there still, if it was one file with the new
}

// Discard lets go of a swap: what is only prepared is removed; what is
// committed stays as it is, for Recover.
func (s *swap) Discard() {
	if s.state == prepared {
		_ = s.back() // what stays is Recover's
	}
	s.end()
}

func (s *swap) end() {
	for _, t := range s.targets {
		if t.made != nil {
			_ = t.made.Close() // what matters was synced
		}
		if t.dir != nil {
			_ = t.dir.Close()
		}
	}
	wipe(s.contents)
	s.targets, s.contents, s.state = nil, nil, done
}

// sync has on disk what is there, before more is built on it: the last step of
// an agent that died may be in memory alone, and a loss of power would take it
// back while the steps that followed stay.
func (s *swap) sync() error {
	for _, t := range s.targets {
		if t.dir == nil {
			continue
		}
		if err := t.dir.sync(); err != nil {
			return fmt.Errorf("%s: %w", t.path, err)
		}
	}
	return nil
}

// The marks are what stands beside a file, and whether itself does.
type marks struct{ new, old, none, file bool }

// kept reports whether the file's old content can be brought back.
func (m marks) kept() bool { return m.old || m.none }

// swapped reports whether the new content stands: of a file that was none, a
// Rollback removes the file first.
func (m marks) swapped() bool { return m.old || m.none && m.file }

func (t *target) marks() (m marks, err error) {
	if t.dir == nil {
		return m, nil
	}
	for name, there := range map[string]*bool{t.new(): &m.new, t.old(): &m.old, t.none(): &m.none, t.name: &m.file} {
		if *there, err = t.dir.present(name); err != nil {
			return m, explain(t.beside(name), err)
		}
	}
	return m, nil
}

// recover settles what a crash left of a swap; see [deliver.Push]. The swap is
// never nil.
func (w *Way) recover() (_ *swap, isCommitted bool, err error) {
	s := &swap{}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	for _, f := range w.files {
		t, err := w.target(f)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, false, fmt.Errorf("%s: %w", f.Path, err)
		}
		s.targets = append(s.targets, t)
	}

	var all []marks
	for _, t := range s.ordered() {
		has, err := t.marks()
		if err != nil {
			return s, false, fmt.Errorf("%s: %w", t.path, err)
		}
		all = append(all, has)
	}
	isNew := func(m marks) bool { return m.new }
	if !slices.ContainsFunc(all, isNew) && !slices.ContainsFunc(all, marks.kept) {
		s.end()
		return s, false, nil
	}
	if err := s.sync(); err != nil {
		return s, false, err
	}
	switch {
	case slices.ContainsFunc(all, isNew): // rolled back below
	case !slices.ContainsFunc(all, func(m marks) bool { return !m.swapped() }):
		s.state = committed
		return s, true, nil
	case !all[0].kept():
		s.state = committed
		return s, true, s.Finish()
	}
	return s, false, s.back()
}
