package files

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/test/check"
)

func two(t *testing.T) []*config.File {
	return set(t, []string{filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")})
}

func TestOwnerModeAndContent(t *testing.T) {
	check.Root(t)
	files := set(t, []string{filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")}, `owner = "nobody"`, `group = "daemon"`, `mode = "0640"`)
	for _, generation := range []string{"one", "two"} {
		must(t, files, generation)
		stands(t, files, generation)
		st, err := os.Stat(files[1].Path)
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := account.UID("nobody")
		gid, _ := account.GID("daemon")
		if sys := st.Sys().(*syscall.Stat_t); st.Mode() != 0o640 || int(sys.Uid) != uid || int(sys.Gid) != gid || sys.Nlink != 1 {
			t.Errorf("%v %d:%d, %d links", st.Mode(), sys.Uid, sys.Gid, sys.Nlink)
		}
	}
	if files := set(t, []string{filepath.Join(t.TempDir(), "a")}, `owner = "4711"`); true {
		must(t, files, "one")
		if st, err := os.Stat(files[0].Path); err != nil || st.Sys().(*syscall.Stat_t).Uid != 4711 {
			t.Errorf("a number as the owner: %v", err)
		}
	}
}

func TestRollbackAndDiscard(t *testing.T) {
	for _, old := range []string{"", "old"} {
		files := two(t)
		if old != "" {
			must(t, files, old)
		}
		s, err := New(files).Stage(fields("new"))
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Contents(); len(got) != 2 || string(got[1].Reveal()) != content(files[1].Path, "new") {
			t.Errorf("the new content can't be checked")
		}
		check.Silent(t, s.Finish(), "s3cret", "not committed")
		s.Discard()
		s.Discard()
		stands(t, files, old)

		if s, err = New(files).Stage(fields("new")); err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(); err != nil {
			t.Fatal(err)
		}
		check.Silent(t, s.Commit(), "s3cret", "not one that is prepared")
		if err := s.Rollback(); err != nil {
			t.Fatal(err)
		}
		s.Discard()
		stands(t, files, old)

		// Committed and let go of: the next agent's Recover sees it.
		if s, err = New(files).Stage(fields("new")); err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(); err != nil {
			t.Fatal(err)
		}
		s.Discard()
		s, committed, err := New(files).Recover()
		if err != nil || !committed {
			t.Fatalf("committed %v, %v", committed, err)
		}
		if err := s.Rollback(); err != nil {
			t.Fatal(err)
		}
		stands(t, files, old)
	}
}

// TestMissingFolderIsNothing: a folder in memory is gone after a reboot.
func TestMissingFolderIsNothing(t *testing.T) {
	files := set(t, []string{"/run/countersign-no-such-folder/a"})
	s, committed, err := New(files).Recover()
	if s == nil || committed || err != nil {
		t.Errorf("%v %v %v", s, committed, err)
	}
	if err := New(files).Withdraw(); err != nil {
		t.Error(err)
	}
	if New(files).Present() || New(files).Contents() != nil {
		t.Error("something stands in a folder that doesn't exist")
	}
}

func TestWithdrawAndPutBack(t *testing.T) {
	files := two(t)
	must(t, files, "old")
	if !New(files).Present() {
		t.Error("delivered, and not standing")
	}
	contents := New(files).Contents()
	if len(contents) != 2 || !contents[1].Equal([]byte(content(files[1].Path, "old"))) {
		t.Fatalf("read back: %v", contents)
	}
	// A swap that was not settled must not bring the old content back.
	s, err := New(files).Stage(fields("new"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
	s.Discard()
	if err := New(files).Withdraw(); err != nil {
		t.Fatal(err)
	}
	stands(t, files, "")
	if New(files).Present() || New(files).Contents() != nil {
		t.Error("withdrawn, and still standing")
	}
	if err := New(files).Withdraw(); err != nil {
		t.Error("twice:", err)
	}
	if _, err := New(files).PutBack(nil); err == nil {
		t.Error("contents for none of the files were taken")
	}
	if s, err = New(files).PutBack(contents); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Commit(), s.Finish()); err != nil {
		t.Fatal(err)
	}
	stands(t, files, "old")
}

// TestReadBackOfAnothersFile: the folder's owner links another file into the
// place, to have it read and written to him.
func TestReadBackOfAnothersFile(t *testing.T) {
	files := set(t, []string{filepath.Join(t.TempDir(), "a")})
	must(t, files, "old")
	if New(files).Contents() == nil {
		t.Fatal("the twin is not read back")
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("another's"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func() error{
		"hard link": func() error { return os.Link(other, files[0].Path) },
		"symlink":   func() error { return os.Symlink(other, files[0].Path) },
		"FIFO":      func() error { return unix.Mkfifo(files[0].Path, 0o600) },
		"owner": func() error {
			return errors.Join(os.WriteFile(files[0].Path, nil, 0o600), os.Chown(files[0].Path, 4711, 0))
		},
		"over 1 MiB":  func() error { return os.WriteFile(files[0].Path, make([]byte, deliver.MaxContent+1), 0o600) },
		"a directory": func() error { return os.Mkdir(files[0].Path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "owner" {
				check.Root(t)
			}
			if err := errors.Join(os.Remove(files[0].Path), plant()); err != nil {
				t.Fatal(err)
			}
			if c := New(files).Contents(); c != nil {
				t.Error("read back")
			}
		})
	}
}

// mount puts a small tmpfs on a new folder.
func mount(t *testing.T, options string) string {
	t.Helper()
	check.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal("mount tmpfs (run as root, with CAP_SYS_ADMIN):", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestErrors has two files; the second one's trouble must keep both.
func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name    string
		dir     func(t *testing.T) string
		trouble func(t *testing.T, dir, path string)
		edit    func(f *config.File)
		words   []string
		gone    bool // the old file can't be there
	}{
		{name: "missing folder", trouble: func(t *testing.T, dir, _ string) { check.Nil(t, os.RemoveAll(dir)) }, words: []string{"no such file", "create the folder"}, gone: true},
		{name: "unknown user", edit: func(f *config.File) { f.Owner = "no-such-user" }, words: []string{`"no-such-user"`, "/etc/passwd"}},
		{name: "unknown group", edit: func(f *config.File) { f.Group = "no-such-group" }, words: []string{`"no-such-group"`, "/etc/group"}},
		{name: "full disk", dir: func(t *testing.T) string { return mount(t, "size=64k") }, trouble: func(t *testing.T, dir, _ string) {
			f, err := os.Create(filepath.Join(dir, "fill"))
			check.Nil(t, err)
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			check.Nil(t, f.Close())
		}, words: []string{"no space left", "make room"}},
		{name: "read-only file system", dir: func(t *testing.T) string { return mount(t, "") }, trouble: func(t *testing.T, dir, _ string) {
			check.Nil(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		}, words: []string{"read-only file system", "ReadWritePaths"}},
		{name: "immutable folder", trouble: func(t *testing.T, dir, _ string) {
			check.Root(t)
			if out, err := exec.Command("chattr", "+i", dir).CombinedOutput(); err != nil {
				t.Fatalf("chattr: %v: %s", err, out)
			}
			t.Cleanup(func() { check.Nil(t, exec.Command("chattr", "-i", dir).Run()) })
		}, words: []string{"not permitted", "chattr"}},
		{name: "symlink as the folder", trouble: func(t *testing.T, dir, _ string) {
			check.Nil(t, os.Rename(dir, dir+"-real"), os.Symlink(dir+"-real", dir))
		}, words: []string{"is a symlink"}},
		{name: "symlink on the way", dir: func(t *testing.T) string {
			dir := filepath.Join(t.TempDir(), "way", "end")
			check.Nil(t, os.MkdirAll(dir, 0o755))
			return dir
		}, trouble: func(t *testing.T, dir, _ string) {
			way := filepath.Dir(dir)
			check.Nil(t, os.Rename(way, way+"-real"), os.Symlink(way+"-real", way))
		}, words: []string{"way: is a symlink"}},
		{name: "file as the folder", trouble: func(t *testing.T, dir, _ string) {
			check.Nil(t, os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
		}, words: []string{"not a directory", "a folder is wanted"}, gone: true},
		{name: "symlink in the file's place", trouble: func(t *testing.T, _, path string) {
			check.Nil(t, os.Rename(path, path+"-real"), os.Symlink(path+"-real", path))
		}, words: []string{"is a symlink"}},
		{name: "folder in the file's place", trouble: func(t *testing.T, _, path string) {
			check.Nil(t, os.Remove(path), os.Mkdir(path, 0o755))
		}, words: []string{"not a regular file"}, gone: true},
		{name: "folder in the new file's place", trouble: func(t *testing.T, dir, path string) {
			check.Nil(t, os.Mkdir(filepath.Join(dir, "."+filepath.Base(path)+".countersign-new"), 0o755))
		}, words: []string{"is a directory", "remove it"}},
		{name: "name too long", edit: func(f *config.File) { f.Path = filepath.Join(filepath.Dir(f.Path), strings.Repeat("x", 250)) }, words: []string{"too long", "shorten"}},
		{name: "template", edit: func(f *config.File) { f.Template = "{{ .nothing }}" }, words: []string{`"nothing"`, "password, username"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.dir != nil {
				dir = tt.dir(t)
			}
			files := set(t, []string{filepath.Join(t.TempDir(), "a"), filepath.Join(dir, "b")})
			old := files[1].Path
			must(t, files, "old")
			if tt.trouble != nil {
				tt.trouble(t, dir, old)
			}
			if tt.edit != nil {
				tt.edit(files[1])
			}
			_, err := New(files).Stage(fields("new"))
			check.Silent(t, err, "s3cret", append(tt.words, files[1].Path)...)
			stands(t, files[:1], "old")
			b, err := os.ReadFile(old)
			if !tt.gone && (err != nil || string(b) != content(old, "old")) {
				t.Errorf("the old file: %d bytes, %v", len(b), err)
			}
		})
	}
}

// TestHalfCommit: the second file can't be swapped, so neither is.
func TestHalfCommit(t *testing.T) {
	for name, trouble := range map[string]func(path string) error{
		"folder":   func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o755)) },
		"symlink":  func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/passwd", p)) },
		"new gone": func(p string) error { return os.Remove(filepath.Join(filepath.Dir(p), ".b.countersign-new")) },
		"new is another file": func(p string) error {
			n := filepath.Join(filepath.Dir(p), ".b.countersign-new")
			return errors.Join(os.Remove(n), os.Symlink("/etc/passwd", n))
		},
	} {
		t.Run(name, func(t *testing.T) {
			files := two(t)
			must(t, files, "old")
			s, err := New(files).Stage(fields("new"))
			check.Nil(t, err, trouble(files[1].Path))
			check.Silent(t, s.Commit(), "s3cret", files[1].Path, "the old credential stays")
			s.Discard()
			stands(t, files[:1], "old")
			if strings.HasPrefix(name, "new") {
				stands(t, files, "old")
			}
		})
	}
	t.Run("came into being", func(t *testing.T) {
		files := two(t)
		s, err := New(files).Stage(fields("new"))
		check.Nil(t, err)
		defer func() { step = func(string) {} }()
		step = func(name string) {
			if name == "keep-sync b" {
				check.Nil(t, os.WriteFile(files[1].Path, []byte("another's"), 0o600))
			}
		}
		check.Silent(t, s.Commit(), "s3cret", "came into being")
		stands(t, files[:1], "")
		if b, err := os.ReadFile(files[1].Path); err != nil || string(b) != "another's" {
			t.Errorf("%q %v", b, err)
		}
	})
}

// TestReader reads all the time, and sees whole files only.
func TestReader(t *testing.T) {
	top := mount(t, "") // in memory, for the many rounds
	files := set(t, []string{filepath.Join(top, "a"), filepath.Join(top, "b")})
	must(t, files, "x0")
	var stop atomic.Bool
	var reads atomic.Int64
	var wg sync.WaitGroup
	for _, f := range files {
		wg.Go(func() {
			for !stop.Load() {
				b, err := os.ReadFile(f.Path)
				if err != nil {
					t.Errorf("the file was away: %v", err)
					return
				}
				generation, _, _ := strings.Cut(strings.TrimPrefix(string(b), "user=u-"), " ")
				if string(b) != content(f.Path, generation) {
					t.Errorf("a mixture, or a part: %d bytes", len(b))
					return
				}
				reads.Add(1)
			}
		})
	}
	for i := range 1000 { // two swaps each
		s, err := New(files).Stage(fields(fmt.Sprintf("x%d", i+1)))
		check.Nil(t, err, s.Commit())
		if i%2 == 0 {
			check.Nil(t, s.Finish())
		} else {
			check.Nil(t, s.Rollback())
		}
	}
	stop.Store(true)
	wg.Wait()
	if reads.Load() < 1000 {
		t.Errorf("only %d reads: the test proves little", reads.Load())
	}
	stands(t, files, "x999")
}

// TestSymlinkRace: the folder's owner swaps the folder for a symlink, and plants
// symlinks under the names that are used, while root delivers.
func TestSymlinkRace(t *testing.T) {
	top := mount(t, "") // in memory, for the many rounds
	theirs, outside := filepath.Join(top, "theirs"), filepath.Join(top, "outside")
	check.Nil(t, os.Mkdir(theirs, 0o777), os.Mkdir(outside, 0o700), os.Mkdir(filepath.Join(theirs, "dir"), 0o777))
	victim := filepath.Join(outside, "a")
	check.Nil(t, os.WriteFile(victim, []byte("precious"), 0o600))
	before, err := os.Stat(victim)
	check.Nil(t, err)
	path := filepath.Join(theirs, "dir", "a")
	files := set(t, []string{path}, `owner = "nobody"`)

	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		dir, aside := filepath.Join(theirs, "dir"), filepath.Join(theirs, "aside")
		_ = os.Symlink(outside, aside)
		for !stop.Load() {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond) // let root get somewhere
			_ = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, aside, unix.RENAME_EXCHANGE)
			for _, d := range []string{dir, aside} {
				if st, err := os.Lstat(d); err != nil || !st.IsDir() {
					continue
				}
				for _, name := range []string{"a", ".a.countersign-new", ".a.countersign-old", ".a.countersign-none"} {
					planted := filepath.Join(d, name)
					if st, err := os.Lstat(planted); err == nil && st.Mode()&os.ModeSymlink != 0 {
						_ = os.Remove(planted)
					} else if rand.IntN(8) == 0 {
						_ = os.Remove(planted)
						_ = os.Symlink(victim, planted)
					}
				}
			}
		}
	})
	delivered, refused, rounds := 0, 0, 10_000
	if testing.Short() {
		rounds = 1000
	}
	for range rounds {
		s, err := New(files).Stage(fields("new"))
		if err == nil {
			if err = s.Commit(); err == nil {
				err = s.Finish()
			}
			s.Discard()
		}
		if err == nil {
			delivered++
		} else {
			refused++
			if strings.Contains(err.Error(), "s3cret") {
				t.Fatal("the error has the secret in it")
			}
		}
		_ = New(files).Contents()
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d delivered, %d refused", delivered, refused)
	if delivered == 0 || refused == 0 {
		t.Errorf("%d delivered, %d refused: there was no race", delivered, refused)
	}
	after, err := os.Stat(victim)
	check.Nil(t, err)
	b, err := os.ReadFile(victim)
	check.Nil(t, err)
	entries, err := os.ReadDir(outside)
	check.Nil(t, err)
	if string(b) != "precious" || len(entries) != 1 || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) || after.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("written outside: %q %v %v", b, entries, after)
	}
}

// Whoever reads a file that somebody has open for writing is a violation to
// IMA: what is prepared is held, and not for writing.
func TestNothingStaysOpenForWriting(t *testing.T) {
	files := two(t)
	s, err := New(files).Stage(fields("new"))
	if err != nil {
		t.Fatal(err)
	}
	var staged []string
	for _, f := range files {
		dir, name := filepath.Split(f.Path)
		staged = append(staged, dir+"."+name+".countersign-new")
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	held := 0
	for _, entry := range open {
		target, _ := os.Readlink("/proc/self/fd/" + entry.Name())
		if !slices.Contains(staged, target) {
			continue
		}
		held++
		info, err := os.ReadFile("/proc/self/fdinfo/" + entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		_, flags, _ := strings.Cut(string(info), "flags:\t")
		mode, err := strconv.ParseUint(strings.Fields(flags)[0], 8, 32)
		if err != nil || mode&unix.O_ACCMODE != unix.O_RDONLY || mode&unix.O_PATH == 0 {
			t.Errorf("%s is open with flags %o, %v", target, mode, err)
		}
	}
	if held != 2 {
		t.Errorf("%d of the 2 new files are held", held)
	}
	if err := s.Rollback(); err != nil {
		t.Error(err)
	}
}
