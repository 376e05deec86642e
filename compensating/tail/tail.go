// Package tail reads files that others append to, through rotation, truncation and
// restarts, and gives every line once.
//
// A file is known by its device and inode, so one that was renamed is read to its
// end beside its successor. Places say how far each was read; who keeps them with
// what came of the lines has seen each line once, whenever it is killed. Bytes just
// before a place are kept, too: where they aren't there any more the file was
// written anew, and is read from its start.
//
// Reading is the caller's to pace: a call stops between two lines when it is told to.
// A round over the files reads each up to the size that it had when its turn came, so a
// log that grows as fast as it is read keeps no other from its turn.
//
// What can't be helped: of a file that is copied and truncated, what was written
// between the last look and the truncation is lost; have it renamed. A file that was
// renamed, compressed and removed while nobody read is lost from its place on. Lost
// returns the files of which that is known.
package tail

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxLine bounds a line; of a longer one the beginning is given.
	MaxLine = 4 << 20
	// MaxFiles bounds the files that are followed at once.
	MaxFiles = 256
	chunk    = 256 << 10
	// linger is how long a renamed file is watched for what its writer still adds.
	linger = time.Minute
	checks = 32
)

// A Place is how far a file was read: to the end of its last whole line.
type Place struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Path   string `json:"path"` // when it was last seen
	Offset int64  `json:"offset"`
	Line   int64  `json:"line"`             // lines before Offset
	Skip   bool   `json:"skip,omitempty"`   // Offset is in a line that was too long, and given
	Before []byte `json:"before,omitempty"` // the bytes before Offset, up to 32
}

// A Line is one line of a file, without its end.
type Line struct {
	Path   string
	Number int64
	Text   []byte // good until the callback returns
	// Since is a time at which the line was already in the file, by the reader's clock
	// and not by the log's: whoever wrote it had written it by then.
	Since time.Time
}

type id struct{ device, inode uint64 }

// idOf returns what names a file whatever its path is. The width of a device's
// number differs between systems.
func idOf(st *unix.Stat_t) id { return id{uint64(st.Dev), st.Ino} }

type file struct {
	Place
	f     *os.File
	rest  []byte // of a line that isn't whole
	gone  time.Time
	found bool
	// The file had size bytes at seen. A pass reads up to there, and no further: the
	// files take turns.
	size int64
	seen time.Time
}

// A Tail follows the files of one pattern. It is not safe for concurrent use.
type Tail struct {
	pattern string
	files   map[id]*file
	pass    []*file // what is still to be read of this round, oldest first
	lost    []string
	buffer  []byte
	now     func() time.Time
}

// New follows the files that pattern (filepath.Match) names, from the places that
// are given; those of other files from their start.
func New(pattern string, places []Place, now func() time.Time) (*Tail, error) {
	if _, err := filepath.Match(pattern, ""); err != nil || !filepath.IsAbs(pattern) {
		return nil, fmt.Errorf("path %q: want an absolute path, or a pattern of them", pattern)
	}
	t := &Tail{pattern: pattern, files: map[id]*file{}, buffer: make([]byte, chunk), now: now}
	for _, p := range places {
		p.Before = slices.Clone(p.Before)
		t.files[id{p.Device, p.Inode}] = &file{Place: p}
	}
	// A file may have been renamed since: its neighbours are looked at once.
	dir, err := os.ReadDir(filepath.Dir(pattern))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, entry := range dir {
		if _, err := t.open(filepath.Join(filepath.Dir(pattern), entry.Name()), false); err != nil {
			return nil, err
		}
	}
	for key, f := range t.files {
		if f.f == nil {
			t.lost = append(t.lost, f.Path)
			delete(t.files, key)
		}
	}
	return t, nil
}

// Lost returns the paths of files that held bytes which nobody can read any more: files
// that weren't found again, and files that were truncated before they were read to the
// end. Each path is returned once.
func (t *Tail) Lost() []string {
	lost := t.lost
	t.lost = nil
	return lost
}

// open begins or goes on to read path. Unless fresh, only where it has a place.
func (t *Tail) open(path string, fresh bool) (*file, error) {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return nil, nil // gone meanwhile, or no log
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, nil
	}
	key := idOf(&st)
	f := t.files[key]
	if f == nil && (!fresh || len(t.files) >= MaxFiles) {
		return nil, nil
	}
	if f != nil && f.f != nil {
		f.Path = path
		return f, nil
	}
	open, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Fstat(int(open.Fd()), &st); err != nil || idOf(&st) != key {
		_ = open.Close()
		return nil, err // renamed just now: the next look finds it
	}
	if f == nil {
		f = &file{Place: Place{Device: key.device, Inode: key.inode}}
		t.files[key] = f
	}
	f.f, f.Path = open, path
	return f, nil
}

// Poll gives the whole lines that are new; of one that is longer than MaxLine the
// beginning, and more of it to rest. It asks before each line, and between the parts of
// a long one, whether it may read on; when more returns false it stops there, and the
// next Poll goes on from there.
//
// It reports whether it read anything, and whether it left something that it could have
// read. An error names the file; the others are read all the same.
func (t *Tail) Poll(more func() bool, line func(Line), rest func(part []byte)) (some, behind bool, err error) {
	failed := t.find()

	if len(t.pass) == 0 {
		t.begin()
	}
	for len(t.pass) > 0 && more() {
		f := t.pass[0]
		grew, whole, lost, err := f.read(t, more, line, rest)
		if lost {
			t.lost = append(t.lost, f.Path)
		}
		failed = errors.Join(failed, err)
		some = some || grew
		if err == nil && !whole {
			break
		}
		t.pass = t.pass[1:]
		t.left(f, grew, line)
	}
	return some, len(t.pass) > 0, failed
}

// find opens what the pattern names: a file that is renamed or removed before its turn
// is read all the same.
func (t *Tail) find() (failed error) {
	paths, err := filepath.Glob(t.pattern)
	if err != nil {
		return err
	}
	for _, f := range t.files {
		f.found = false
	}
	for _, path := range paths {
		f, err := t.open(path, true)
		if f == nil && err == nil && len(t.files) >= MaxFiles {
			err = fmt.Errorf("%s: %d files are followed already, and this one isn't", path, MaxFiles)
		}
		if err != nil {
			failed = errors.Join(failed, err)
		}
		if f != nil {
			f.found = true
		}
	}
	return failed
}

// begin starts a round over all files, oldest first: what one session wrote goes on in
// the next file.
func (t *Tail) begin() {
	for _, f := range t.files {
		t.pass = append(t.pass, f)
	}
	slices.SortFunc(t.pass, func(a, b *file) int {
		if a.found != b.found && !a.found {
			return -1
		} else if a.found != b.found {
			return 1
		}
		return cmp.Compare(a.Path, b.Path)
	})
}

// left lets go of a file that has had no name for long, once it was read to its end.
func (t *Tail) left(f *file, grew bool, line func(Line)) {
	switch {
	case f.found || grew:
		f.gone = time.Time{}
	case f.gone.IsZero():
		f.gone = t.now()
	case t.now().Sub(f.gone) > linger:
		if len(f.rest) > 0 { // the writer ended in the middle of a line
			line(Line{f.Path, f.Line + 1, f.rest, f.seen})
		}
		_ = f.f.Close()
		delete(t.files, id{f.Device, f.Inode})
	}
}

// read gives lines up to the size that the file had when this began, and reports
// whether it came to there. Where the file was written anew it begins anew, and reports
// whether it had known of bytes that are lost thereby.
func (f *file) read(t *Tail, more func() bool, line func(Line), rest func([]byte)) (grew, whole, lost bool, err error) {
	info, err := f.f.Stat()
	if err != nil {
		return false, false, false, err
	}
	if info.Size() < f.Offset+int64(len(f.rest)) || !f.unchanged() {
		lost = f.size > f.Offset+int64(len(f.rest))
		f.Place = Place{Device: f.Device, Inode: f.Inode, Path: f.Path}
		f.rest, f.size = nil, 0
	}
	if f.Offset+int64(len(f.rest)) >= f.size {
		f.size, f.seen = info.Size(), t.now()
	}

	for {
		at := f.Offset + int64(len(f.rest))
		left := f.size - at
		if left <= 0 {
			return grew, true, lost, nil
		}
		if !more() {
			return grew, false, lost, nil
		}
		n, err := f.f.ReadAt(t.buffer[:min(left, chunk)], at)
		if n > 0 {
			grew = true
			if !f.take(t.buffer[:n], more, line, rest) {
				return grew, false, lost, nil
			}
		}
		if errors.Is(err, io.EOF) {
			return grew, true, lost, nil // truncated just now: the next look finds it
		}
		if err != nil {
			return grew, false, lost, fmt.Errorf("%s: %w", f.Path, err)
		}
	}
}

// unchanged says whether what was read last is still there.
func (f *file) unchanged() bool {
	if len(f.Before) == 0 {
		return true
	}
	b := make([]byte, len(f.Before))
	n, err := f.f.ReadAt(b, f.Offset-int64(len(b)))
	return n == len(b) && (err == nil || errors.Is(err, io.EOF)) && bytes.Equal(b, f.Before)
}

// take gives the lines that are whole now, and reports whether it took all of b.
func (f *file) take(b []byte, more func() bool, line func(Line), rest func([]byte)) bool {
	give := func(text []byte) { line(Line{f.Path, f.Line + 1, text, f.seen}) }
	for first := true; len(b) > 0; first = false {
		if !first && !more() {
			return false
		}
		end := bytes.IndexByte(b, '\n')
		switch {
		case end < 0 && f.Skip:
			rest(b)
			f.advance(b)
			return true
		case end < 0:
			f.rest = append(f.rest, b...)
			if len(f.rest) > MaxLine {
				give(f.rest[:MaxLine])
				rest(f.rest[MaxLine:])
				f.advance(f.rest)
				f.rest, f.Skip = nil, true
			}
			return true
		case f.Skip:
			rest(b[:end])
			f.Skip = false
		case len(f.rest) > 0:
			f.rest = append(f.rest, b[:end]...)
			give(f.rest)
			f.advance(f.rest)
			f.rest = f.rest[:0]
			f.advance(b[end : end+1])
			f.Line++
			b = b[end+1:]
			continue
		default:
			give(b[:end])
		}
		f.advance(b[:end+1])
		f.Line++
		b = b[end+1:]
	}
	return true
}

// advance moves the place behind b.
func (f *file) advance(b []byte) {
	f.Offset += int64(len(b))
	if len(b) >= checks {
		f.Before = append(f.Before[:0], b[len(b)-checks:]...)
		return
	}
	f.Before = append(f.Before, b...)
	if n := len(f.Before) - checks; n > 0 {
		f.Before = append(f.Before[:0], f.Before[n:]...)
	}
}

// Places are how far the files were read.
func (t *Tail) Places() []Place {
	out := make([]Place, 0, len(t.files))
	for _, f := range t.files {
		p := f.Place
		p.Before = slices.Clone(p.Before)
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Place) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Inode, b.Inode)) })
	return out
}

// Close closes the files.
func (t *Tail) Close() {
	for _, f := range t.files {
		_ = f.f.Close()
	}
}
