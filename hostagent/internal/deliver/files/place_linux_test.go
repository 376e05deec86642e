package files

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/test/check"
)

// What was delivered is the owner's alone, under one name.
func TestDelivered(t *testing.T) {
	check.Root(t)
	for name, tt := range map[string]struct {
		change func(path string) error
		owner  string
		words  string
	}{
		"as it was":       {func(string) error { return nil }, "nobody", ""},
		"another owner's": {func(path string) error { return os.Chown(path, 0, 0) }, "nobody", "belongs to uid 0 and has 1 names"},
		"a second name":   {func(path string) error { return os.Link(path, path+".2") }, "nobody", "has 2 names"},
		"a pipe": {func(path string) error {
			return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600), os.Chown(path, 65534, 65534))
		}, "nobody", "not a regular file"},
		"no such owner": {func(string) error { return nil }, "no-such-user", "no-such-user"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			if err := errors.Join(os.WriteFile(path, []byte("x"), 0o600), os.Chown(path, 65534, 65534), tt.change(path)); err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Open(path, unix.O_PATH, 0)
			if err != nil {
				t.Fatal(err)
			}
			file := os.NewFile(uintptr(fd), path)
			defer func() { _ = file.Close() }()
			f := &config.File{Path: path, Owner: tt.owner}
			back := New([]*config.File{f}).Contents()
			if err := Delivered(f, file); tt.words != "" {
				check.Silent(t, err, "s3cret", tt.words)
			} else if err != nil || len(back) != 1 {
				t.Errorf("%v, %d read back", err, len(back))
			}
			if tt.words != "" && back != nil {
				t.Error("it is read back")
			}
		})
	}
}

// What stands in a file's place is a regular file, reached over no symlink.
func TestPlace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "real", "file")
	if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("x"), 0o600), os.Symlink(path, filepath.Join(dir, "link")),
		os.Symlink(filepath.Dir(path), filepath.Join(dir, "folder")), unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	file, err := Place(&config.File{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	_ = file.Close()
	for name, words := range map[string]string{"link": "symlink", "folder/file": "symlink", "fifo": "not a regular file", "real": "not a regular file", "missing": "no such file"} {
		_, err := Place(&config.File{Path: filepath.Join(dir, name)})
		check.Silent(t, err, "s3cret", words)
		if missing := errors.Is(err, unix.ENOENT); missing != (name == "missing") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
