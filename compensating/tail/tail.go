// Package tail reads files that others append to, through rotation, truncation and
// restarts, and gives every line once.
//
// A file is known by its device and inode, so one that was renamed is read to its
// end beside its successor. Places say how far each was read; who keeps them with
// what came of the lines has seen each line once, whenever it is killed. Bytes just
// before a place are kept, too: where they aren't there any more the file was
// written anew, and is read from its start.
//
// What can't be helped: of a file that is copied and truncated, what was written
// between the last look and the truncation is lost; have it renamed. A file that was
// renamed, compressed and removed while nobody read is lost from its place on, and
// Lost says so.
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

type id struct{ device, inode uint64 }

type file struct {
	Place
	f     *os.File
	rest  []byte // of a line that isn't whole
	gone  time.Time
	found bool
}

// A Tail follows the files of one pattern. It is not safe for concurrent use.
type Tail struct {
	pattern string
	files   map[id]*file
	lost    []string
	now     func() time.Time
}

// New follows the files that pattern (filepath.Match) names, from the places that
// are given; those of other files from their start.
func New(pattern string, places []Place, now func() time.Time) (*Tail, error) {
	if _, err := filepath.Match(pattern, ""); err != nil || !filepath.IsAbs(pattern) {
		return nil, fmt.Errorf("path %q: want an absolute path, or a pattern of them", pattern)
	}
	t := &Tail{pattern: pattern, files: map[id]*file{}, now: now}
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

// Lost are the paths of files that were not found again, with what they may have
// had behind their places.
func (t *Tail) Lost() []string { return t.lost }

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
	key := id{st.Dev, st.Ino}
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
	if err := unix.Fstat(int(open.Fd()), &st); err != nil || (id{st.Dev, st.Ino}) != key {
		_ = open.Close()
		return nil, err // renamed just now: the next look finds it
	}
	if f == nil {
		f = &file{Place: Place{Device: st.Dev, Inode: st.Ino}}
		t.files[key] = f
	}
	f.f, f.Path = open, path
	return f, nil
}

// Poll gives the whole lines that are new; of one that is longer than MaxLine the
// beginning, and more of it to rest. It returns whether there were any. An error names
// the file; the others are read all the same.
func (t *Tail) Poll(line func(path string, number int64, line []byte), rest func(part []byte)) (bool, error) {
	paths, err := filepath.Glob(t.pattern)
	if err != nil {
		return false, err
	}
	for _, f := range t.files {
		f.found = false
	}
	var failed error
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
	some := false
	// Oldest first: what one session wrote goes on in the next file.
	list := make([]*file, 0, len(t.files))
	for _, f := range t.files {
		list = append(list, f)
	}
	slices.SortFunc(list, func(a, b *file) int {
		if a.found != b.found && !a.found {
			return -1
		} else if a.found != b.found {
			return 1
		}
		return cmp.Compare(a.Path, b.Path)
	})
	for _, f := range list {
		grew, err := f.read(line, rest)
		failed = errors.Join(failed, err)
		some = some || grew
		switch {
		case f.found || grew:
			f.gone = time.Time{}
		case f.gone.IsZero():
			f.gone = t.now()
		case t.now().Sub(f.gone) > linger:
			if len(f.rest) > 0 { // the writer ended in the middle of a line
				line(f.Path, f.Line+1, f.rest)
			}
			_ = f.f.Close()
			delete(t.files, id{f.Device, f.Inode})
		}
	}
	return some, failed
}

func (f *file) read(line func(string, int64, []byte), rest func([]byte)) (grew bool, err error) {
	info, err := f.f.Stat()
	if err != nil {
		return false, err
	}
	at := f.Offset + int64(len(f.rest))
	if info.Size() == at {
		return false, nil
	}
	if info.Size() < at || !f.unchanged() {
		f.Place = Place{Device: f.Device, Inode: f.Inode, Path: f.Path}
		f.rest = nil
	}
	buffer := make([]byte, chunk)
	for {
		n, err := f.f.ReadAt(buffer, f.Offset+int64(len(f.rest)))
		if n > 0 {
			grew = true
			f.take(buffer[:n], line, rest)
		}
		if errors.Is(err, io.EOF) {
			return grew, nil
		}
		if err != nil {
			return grew, fmt.Errorf("%s: %w", f.Path, err)
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

// take gives the lines that are whole now.
func (f *file) take(b []byte, line func(string, int64, []byte), rest func([]byte)) {
	for len(b) > 0 {
		end := bytes.IndexByte(b, '\n')
		switch {
		case end < 0 && f.Skip:
			rest(b)
			f.advance(b)
			return
		case end < 0:
			f.rest = append(f.rest, b...)
			if len(f.rest) > MaxLine {
				line(f.Path, f.Line+1, f.rest[:MaxLine])
				rest(f.rest[MaxLine:])
				f.advance(f.rest)
				f.rest, f.Skip = nil, true
			}
			return
		case f.Skip:
			rest(b[:end])
			f.Skip = false
		case len(f.rest) > 0:
			f.rest = append(f.rest, b[:end]...)
			line(f.Path, f.Line+1, f.rest)
			f.advance(f.rest)
			f.rest = f.rest[:0]
			f.advance(b[end : end+1])
			f.Line++
			b = b[end+1:]
			continue
		default:
			line(f.Path, f.Line+1, b[:end])
		}
		f.advance(b[:end+1])
		f.Line++
		b = b[end+1:]
	}
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
