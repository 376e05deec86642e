package files

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

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
//	Prepare   open(new, O_CREAT|O_EXCL|O_NOFOLLOW, 0600) write fchown fchmod fsync
//	Commit    link(NAME, old) or open(none, O_CREAT|O_EXCL) · rename(new, NAME)
//	Finish    unlink(old), unlink(none)
//	Rollback  last file first: rename(old, NAME), or unlink(NAME) unlink(none);
//	          for a file that still has its new: unlink(old), unlink(none); and
//	          when all this is done: unlink(new)
//
// What stands after a crash, for a set of three (N: new, with or without old;
// K: old or none, without new; -: neither):
//
//	N - -   N N -    died in Prepare                    Recover rolls back
//	N N N   K N N    died in Commit                     Recover rolls back
//	- N N   - - N    died rolling back a Commit         Recover rolls back
//	K K K            committed                          the caller's choice
//	- K K   - - K    died in Finish                     Recover finishes
//	K K -   K - -    died in Rollback                   Recover rolls back
//	- - -            before Prepare, or all is done     nothing to do
//
// So a new anywhere means that the set isn't committed, and is the last thing
// to go; and without any, the first file says which way the set was going.

// The states of a Swap.
type state int

const (
	done state = iota
	prepared
	committed
)

// A Swap is the replacing of a set of files by another. It holds no secret.
type Swap struct {
	targets []*target // in the config's order
	state   state
}

// A target is one file of a Swap.
type target struct {
	path string
	name string
	dir  *os.File // nil: the folder doesn't exist
	made *os.File // the new content: open, so that its inode isn't used again
}

func (t *target) fd() int      { return int(t.dir.Fd()) }
func (t *target) new() string  { return "." + t.name + ".countersign-new" }
func (t *target) old() string  { return "." + t.name + ".countersign-old" }
func (t *target) none() string { return "." + t.name + ".countersign-none" }

// step is called between system calls by the tests that die there.
var step = func(string) {}

func openTarget(f *config.File) (*target, error) {
	dir, err := openFolder(filepath.Dir(f.Path))
	t := &target{path: f.Path, name: filepath.Base(f.Path), dir: dir}
	return t, err
}

// prepare settles what an earlier swap left and writes the new contents.
func prepare(files []*config.File, data []secret.Bytes) (_ *Swap, err error) {
	left, _, err := Recover(files)
	if err == nil {
		err = left.Finish()
	}
	left.Discard()
	if err != nil {
		return nil, err
	}
	s := &Swap{state: prepared}
	defer func() {
		if err != nil {
			s.Discard()
		}
	}()
	for i, f := range files {
		t, err := openTarget(f)
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

// write makes the new content. Owner and mode are set by descriptor, on a file
// that nobody else made.
func (t *target) write(f *config.File, data secret.Bytes) error {
	uid, err := uidOf(f.Owner)
	if err != nil {
		return err
	}
	gid, err := gidOf(f.Group)
	if err != nil {
		return err
	}
	if st, err := lstat(t.fd(), t.name); err == nil {
		if err := regular(st); err != nil {
			return explain(t.path, err)
		}
	} else if err != unix.ENOENT {
		return explain(t.path, err)
	}
	if t.made, err = t.create(t.new()); err != nil {
		return explain(t.beside(t.new()), err)
	}
	step("create " + t.name)
	fd := int(t.made.Fd())
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && (st.Nlink != 1 || regular(st) != nil) {
		err = errors.New("somebody else has hold of the new file")
	}
	if err == nil {
		_, err = t.made.Write(data.Reveal())
	}
	step("write " + t.name)
	if err == nil {
		err = unix.Fchown(fd, uid, gid)
	}
	if err == nil {
		err = unix.Fchmod(fd, uint32(f.FileMode().Perm()))
	}
	step("chmod " + t.name)
	if err == nil {
		err = t.made.Sync()
	}
	if err != nil {
		// *os.PathError would say the same name once more.
		var pathErr *os.PathError
		if errors.As(err, &pathErr) {
			err = pathErr.Err
		}
		return explain(t.beside(t.new()), err)
	}
	if err := t.hold(); err != nil {
		return explain(t.beside(t.new()), err)
	}
	return nil
}

// hold has the new content open no longer for writing: to IMA, whoever reads a
// file that can still be written is a violation. The inode is kept from being
// used again as before.
func (t *target) hold() error {
	fd, err := openat(t.fd(), t.new(), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	held := os.NewFile(uintptr(fd), t.new())
	var written, now unix.Stat_t
	err = errors.Join(unix.Fstat(int(t.made.Fd()), &written), unix.Fstat(fd, &now))
	if err == nil && (written.Ino != now.Ino || written.Dev != now.Dev) {
		err = errors.New("somebody put another file in the new one's place")
	}
	if err != nil {
		return errors.Join(err, held.Close())
	}
	err = t.made.Close()
	t.made = held
	return err
}

func (t *target) beside(name string) string { return filepath.Join(filepath.Dir(t.path), name) }

// create makes a file that wasn't there. One that the folder's owner put there
// is removed, once: where he keeps doing it, he does without.
func (t *target) create(name string) (*os.File, error) {
	for again := true; ; again = false {
		fd, err := openat(t.fd(), name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if err != unix.EEXIST || !again {
			return nil, err
		}
		if err := unlink(t.fd(), name); err != nil {
			return nil, err
		}
	}
}

// Paths are the new files, for a check before Commit, in the config's order.
func (s *Swap) Paths() []string {
	var out []string
	for _, t := range s.targets {
		out = append(out, t.beside(t.new()))
	}
	return out
}

// ordered are the targets in the order in which they are swapped.
func (s *Swap) ordered() []*target {
	return slices.SortedFunc(slices.Values(s.targets), func(a, b *target) int { return cmp.Compare(a.path, b.path) })
}

// Commit puts the new files in the old ones' place: all, or on an error none.
func (s *Swap) Commit() error {
	if s.state != prepared {
		return errors.New("this swap is not one that is prepared")
	}
	for _, t := range s.ordered() {
		if err := t.swap(); err != nil {
			return errors.Join(fmt.Errorf("%s: %w; the old credential stays", t.path, err), s.back())
		}
	}
	s.state = committed
	return nil
}

func (t *target) swap() error {
	st, err := lstat(t.fd(), t.name)
	was := err == nil
	switch {
	case was:
		if err := regular(st); err != nil {
			return explain(t.path, err)
		}
		if err = t.link(); err != nil {
			return explain(t.beside(t.old()), err)
		}
	case err == unix.ENOENT:
		marker, err := t.create(t.none())
		if err != nil {
			return explain(t.beside(t.none()), err)
		}
		if err := marker.Close(); err != nil {
			return explain(t.beside(t.none()), err)
		}
	default:
		return explain(t.path, err)
	}
	step("keep " + t.name)
	if err := t.dir.Sync(); err != nil {
		return err
	}
	step("keep-sync " + t.name)
	if was {
		err = unix.Renameat(t.fd(), t.new(), t.fd(), t.name)
	} else {
		err = unix.Renameat2(t.fd(), t.new(), t.fd(), t.name, unix.RENAME_NOREPLACE)
		if err == unix.EINVAL || err == unix.ENOSYS { // NFS, among others
			err = unix.Renameat(t.fd(), t.new(), t.fd(), t.name)
		}
	}
	if err == unix.EEXIST {
		return errors.New("it came into being just now, made by somebody else: trying again")
	}
	if err != nil {
		return explain(t.path, err)
	}
	step("rename " + t.name)
	if !t.isMade(t.name) {
		return errors.New("somebody put another file in the new one's place: look who can write to the folder")
	}
	if err := t.dir.Sync(); err != nil {
		return err
	}
	step("rename-sync " + t.name)
	return nil
}

// isMade says whether name is the new content.
func (t *target) isMade(name string) bool {
	var made unix.Stat_t
	err := unix.Fstat(int(t.made.Fd()), &made)
	st, statErr := lstat(t.fd(), name)
	return err == nil && statErr == nil && st.Ino == made.Ino && st.Dev == made.Dev
}

// link keeps the old content under a second name.
func (t *target) link() error {
	if err := unlink(t.fd(), t.old()); err != nil {
		return err
	}
	return unix.Linkat(t.fd(), t.name, t.fd(), t.old(), 0)
}

// Finish removes the old content.
func (s *Swap) Finish() error {
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
		if err := unlink(t.fd(), name); err != nil {
			return explain(t.beside(name), err)
		}
		step("clear " + name)
	}
	return t.dir.Sync()
}

// Rollback brings the old files back, and removes those that were none.
func (s *Swap) Rollback() error {
	if s.state == done {
		return nil
	}
	return s.back()
}

// back rolls back from every state that a crash can leave. It stops at the
// first error: what it leaves then is again such a state.
func (s *Swap) back() error {
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
	if err := unix.Renameat(t.fd(), t.old(), t.fd(), t.name); err != nil {
		return explain(t.path, err)
	}
	step("restore " + t.name)
	return t.clear(t.old()) // there still, if it was one file with the new
}

// Discard lets go of a swap: what is only prepared is removed; what is
// committed stays as it is, for Recover.
func (s *Swap) Discard() {
	if s.state == prepared {
		_ = s.back() // what stays is Recover's
	}
	s.end()
}

func (s *Swap) end() {
	for _, t := range s.targets {
		for _, f := range []*os.File{t.dir, t.made} {
			if f != nil {
				_ = f.Close() // what matters was synced
			}
		}
	}
	s.targets, s.state = nil, done
}

// The marks are what stands beside a file.
type marks struct{ new, old, none bool }

func (t *target) marks() (m marks, err error) {
	if t.dir == nil {
		return m, nil
	}
	for name, there := range map[string]*bool{t.new(): &m.new, t.old(): &m.old, t.none(): &m.none} {
		switch _, err := lstat(t.fd(), name); err {
		case nil:
			*there = true
		case unix.ENOENT:
		default:
			return m, explain(t.beside(name), err)
		}
	}
	return m, nil
}

// Recover settles what a crash left of a swap of these files. committed says
// that the new files stand; the caller then finishes the swap or, unless that
// had begun, rolls it back. Otherwise the old files stand, and the swap is
// over. The Swap is never nil.
func Recover(files []*config.File) (_ *Swap, isCommitted bool, err error) {
	s := &Swap{}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	for _, f := range files {
		t, err := openTarget(f)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return s, false, fmt.Errorf("%s: %w", f.Path, err)
		}
		s.targets = append(s.targets, t)
	}
	var news int
	var kept []bool
	for _, t := range s.ordered() {
		has, err := t.marks()
		if err != nil {
			return s, false, fmt.Errorf("%s: %w", t.path, err)
		}
		if has.new {
			news++
		}
		kept = append(kept, has.old || has.none)
	}
	switch {
	case news == 0 && !slices.Contains(kept, true):
		s.end()
		return s, false, nil
	case news == 0 && !slices.Contains(kept, false):
		s.state = committed
		return s, true, nil
	case news == 0 && !kept[0]:
		s.state = committed
		return s, true, s.Finish()
	}
	return s, false, s.back()
}
