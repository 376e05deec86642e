package deliver

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/config"
)

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
		silent(t, err, words)
		if missing := errors.Is(err, unix.ENOENT); missing != (name == "missing") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
