package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// A disk has folders in memory, and fails or dies at its at-th operation. After a
// loss of power each folder has what was synced, and any of the operations since.
type disk struct {
	folders map[string]*memory
	at      int
	trouble string // die, fail: nothing is done and an error is told; lose: it is done and an error is told
	dead    bool
}

type memory struct {
	disk    *disk
	entries map[string]*inode
	synced  map[string]*inode
	since   []func(map[string]*inode)
}

type inode struct{ content string }

func (*inode) Close() error { return nil }

var (
	errDied  = errors.New("died")
	errFault = errors.New("an input/output error")
)

func newDisk(folders ...string) *disk {
	d := &disk{folders: map[string]*memory{}}
	for _, f := range folders {
		d.folders[f] = &memory{disk: d, entries: map[string]*inode{}, synced: map[string]*inode{}}
	}
	return d
}

// clone is another disk with the same on it; inodes never change.
func (d *disk) clone() *disk {
	c := newDisk()
	for name, m := range d.folders {
		c.folders[name] = &memory{disk: c, entries: maps.Clone(m.entries), synced: maps.Clone(m.synced), since: append([]func(map[string]*inode){}, m.since...)}
	}
	return c
}

// losses are the disks that a loss of power may leave of d.
func (d *disk) losses() []*disk {
	all := []*disk{d.clone()}
	for name := range d.folders {
		var next []*disk
		for _, one := range all {
			for kept := range 1 << len(one.folders[name].since) { // a bit for each
				c := one.clone()
				m := c.folders[name]
				for i, do := range m.since {
					if kept>>i&1 == 1 {
						do(m.synced)
					}
				}
				m.entries, m.since = maps.Clone(m.synced), nil
				next = append(next, c)
			}
		}
		all = next
	}
	return all
}

func (d *disk) open(path string) (folder, error) {
	m := d.folders[path]
	if m == nil {
		return nil, fs.ErrNotExist
	}
	return m, d.turn(nil)
}

// turn does an operation, if the disk still works.
func (d *disk) turn(do func() error) error {
	if d.dead {
		return errDied
	}
	d.at--
	if d.at == 0 && d.trouble == "die" {
		d.dead = true
		return errDied
	}
	if d.at == 0 && d.trouble == "fail" {
		return errFault
	}
	var err error
	if do != nil {
		err = do()
	}
	if d.at == 0 && d.trouble == "lose" {
		return errFault
	}
	return err
}

// change changes the names, on disk when it is synced.
func (m *memory) change(do func(map[string]*inode)) error {
	return m.disk.turn(func() error {
		do(m.entries)
		m.since = append(m.since, do)
		return nil
	})
}

func (m *memory) look(name string) (bool, error) { return m.present(name) }
func (m *memory) present(name string) (bool, error) {
	_, ok := m.entries[name]
	return ok, m.disk.turn(nil)
}
func (m *memory) write(name string, data secret.Bytes, _ *config.File) (io.Closer, error) {
	made := &inode{string(data.Reveal())}
	return made, m.change(func(e map[string]*inode) { e[name] = made })
}
func (m *memory) mark(name string) error {
	return m.change(func(e map[string]*inode) { e[name] = &inode{} })
}
func (m *memory) is(name string, held io.Closer) bool {
	return m.disk.turn(nil) == nil && m.entries[name] == held.(*inode)
}
func (m *memory) link(name, second string) error {
	old := m.entries[name]
	if old == nil {
		return fs.ErrNotExist
	}
	return m.change(func(e map[string]*inode) { e[second] = old })
}
func (m *memory) rename(from, to string) error {
	moved := m.entries[from]
	if moved == nil {
		return fs.ErrNotExist
	}
	if m.entries[to] == moved {
		return m.disk.turn(nil) // as rename(2) of two links of one file
	}
	return m.change(func(e map[string]*inode) { delete(e, from); e[to] = moved })
}
func (m *memory) renameNew(from, to string) error {
	if m.entries[to] != nil {
		return fs.ErrExist
	}
	return m.rename(from, to)
}
func (m *memory) remove(name string) error {
	return m.change(func(e map[string]*inode) { delete(e, name) })
}
func (m *memory) read(name string, _ *config.File) (secret.Bytes, error) {
	if m.entries[name] == nil {
		return secret.Bytes{}, fs.ErrNotExist
	}
	return secret.New([]byte(m.entries[name].content)), m.disk.turn(nil)
}
func (m *memory) sync() error {
	return m.disk.turn(func() error {
		m.synced, m.since = maps.Clone(m.entries), nil
		return nil
	})
}
func (m *memory) Close() error { return nil }

// A layout is where files lie, and which of them is new.
type layout struct {
	paths []string
	fresh int // -1: none
}

var layouts = map[string]layout{
	"folders of their own": {[]string{"/z/f", "/y/f", "/x/f"}, 1},
	"the last is new":      {[]string{"/z/f", "/y/f", "/x/f"}, 0},
	"the first is new":     {[]string{"/z/f", "/y/f", "/x/f"}, 2},
	"one folder":           {[]string{"/d/c", "/d/b", "/d/a"}, 1},
	"one file":             {[]string{"/d/f"}, -1},
	"a new file":           {[]string{"/d/f"}, 0},
}

func (l layout) way(d *disk) *Way {
	var list []*config.File
	for _, path := range l.paths {
		list = append(list, &config.File{Path: path, Template: "{{ .password }} in " + path})
	}
	return &Way{list, d.open}
}

// disk has the old generation on it.
func (l layout) disk() *disk {
	d := newDisk()
	for i, path := range l.paths {
		dir := filepath.Dir(path)
		if d.folders[dir] == nil {
			maps.Copy(d.folders, newDisk(dir).folders)
			d.folders[dir].disk = d
		}
		if m := d.folders[dir]; i != l.fresh {
			m.entries[filepath.Base(path)] = &inode{"old in " + path}
			m.synced = maps.Clone(m.entries)
		}
	}
	return d
}

// generation is which one stands, whole; "" is none.
func (l layout) generation(d *disk) string {
	seen := map[string]int{}
	for i, path := range l.paths {
		switch f := d.folders[filepath.Dir(path)].entries[filepath.Base(path)]; {
		case f == nil && i == l.fresh:
			seen["old"]++
		case f == nil:
		default:
			generation, of, _ := strings.Cut(f.content, " in ")
			if of == path {
				seen[generation]++
			}
		}
	}
	for generation, n := range seen {
		if n == len(l.paths) {
			return generation
		}
	}
	return ""
}

// left is what stands beside the files.
func (l layout) left(d *disk) (names []string) {
	for dir, m := range d.folders {
		for name := range m.entries {
			if strings.Contains(name, "countersign") {
				names = append(names, dir+"/"+name)
			}
		}
	}
	return names
}

// deliver delivers the new generation and ends it as end says; reached is how
// far it got without an error.
func (l layout) deliver(d *disk, end string) (reached string) {
	s, err := l.way(d).Stage(map[string]secret.Bytes{"password": secret.New([]byte("new"))})
	if err != nil {
		return "nothing"
	}
	defer s.Discard()
	if s.Commit() != nil {
		if !d.dead && l.generation(d) != "old" {
			return "half committed"
		}
		return "staged"
	}
	if end == "rollback" {
		if s.Rollback() != nil {
			return "rolling back"
		}
		return "rolled back"
	}
	if s.Finish() != nil {
		return "committed"
	}
	return "finished"
}

// settle recovers, and ends a swap that is committed in the way that its
// delivery was to end.
func (l layout) settle(d *disk, end string) error {
	s, committed, err := l.way(d).Recover()
	if err != nil {
		return err
	}
	defer s.Discard()
	if got := l.generation(d); committed && got != "new" && !d.dead {
		return fmt.Errorf("taken for committed, and %q stands", got)
	}
	if committed && end == "rollback" {
		return s.Rollback()
	}
	return s.Finish()
}

// A swap that dies at any operation, whose recovery dies at any operation, with
// and without a loss of power each time, leaves the whole old or the whole new
// set: the new one for certain when it was committed and wanted.
func TestEveryDeath(t *testing.T) {
	for name, l := range layouts {
		for _, end := range []string{"finish", "rollback"} {
			t.Run(name+"/"+end, func(t *testing.T) {
				t.Parallel()
				everyDeath(t, l, end)
			})
		}
	}
}

func everyDeath(t *testing.T, l layout, end string) {
	cases := 0
	settled := func(what string, d *disk, reached string) {
		cases++
		d.dead, d.trouble = false, ""
		if err := l.settle(d, end); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		want := map[string]string{"nothing": "old", "staged": "either", "committed": "new", "finished": "new", "rolling back": "old", "rolled back": "old"}[reached]
		if end == "rollback" && reached == "staged" {
			want = "old"
		}
		got := l.generation(d)
		if got == "" || want != "either" && got != want {
			t.Errorf("%s: %q stands, want %s", what, got, want)
		}
		if left := l.left(d); len(left) > 0 {
			t.Errorf("%s: left over: %v", what, left)
		}
	}
	for n := 1; !t.Failed(); n++ {
		first := l.disk()
		first.at, first.trouble = n, "die"
		reached := l.deliver(first, end)
		if !first.dead {
			if n < 12*len(l.paths) {
				t.Errorf("only %d operations", n)
			}
			break
		}
		for i, d := range append(first.losses(), first) {
			what := fmt.Sprintf("operation %d (%s), disk %d", n, reached, i)
			d.dead = false
			settled(what, d.clone(), reached)
			for m := 1; ; m++ {
				again := d.clone()
				again.at, again.trouble = m, "die"
				_ = l.settle(again, end)
				if !again.dead {
					break
				}
				for k, e := range append(again.losses(), again) {
					settled(fmt.Sprintf("%s, recovery's operation %d, disk %d", what, m, k), e, reached)
				}
			}
		}
	}
	if cases < 200*len(l.paths) {
		t.Errorf("only %d cases", cases)
	}
}

// An operation that fails, done or not, is told; and what is there afterwards is
// what was told.
func TestEveryFailure(t *testing.T) {
	for name, l := range layouts {
		for _, end := range []string{"finish", "rollback"} {
			for _, trouble := range []string{"fail", "lose"} {
				for n := 1; ; n++ {
					what := fmt.Sprintf("%s, %s, operation %d is to %s", name, end, n, trouble)
					d := l.disk()
					d.at, d.trouble = n, trouble
					reached := l.deliver(d, end)
					if d.at > 0 {
						break
					}
					want := "old"
					if reached == "committed" || reached == "finished" {
						want = "new"
					}
					if err := l.settle(d, end); err != nil {
						t.Errorf("%s: %v", what, err)
					}
					if got := l.generation(d); got != want || reached == "half committed" || len(l.left(d)) > 0 {
						t.Errorf("%s: reached %s; %q stands, left over %v", what, reached, got, l.left(d))
					}
				}
			}
		}
	}
}

// A withdrawal that can't remove one file removes the others, and can be repeated.
func TestEveryWithdrawal(t *testing.T) {
	for name, l := range layouts {
		for n := 1; ; n++ {
			d := l.disk()
			s, err := l.way(d).Stage(map[string]secret.Bytes{"password": secret.New([]byte("new"))})
			if err := errors.Join(err, s.Commit()); err != nil {
				t.Fatal(err)
			}
			d.at, d.trouble = n, "fail"
			err = l.way(d).Withdraw()
			if d.at > 0 {
				break
			}
			left := 0
			for _, m := range d.folders {
				left += len(m.entries)
			}
			if err == nil || left > 3 {
				t.Errorf("%s, operation %d: %d names are left, %v", name, n, left, err)
			}
			if err := l.way(d).Withdraw(); err != nil || l.way(d).Present() || len(l.left(d)) > 0 {
				t.Errorf("%s, operation %d, once more: %v", name, n, err)
			}
		}
	}
}
