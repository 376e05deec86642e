package files

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// Place is the regular file that stands in a file's place, as a mere handle
// (O_PATH), which is neither read nor waited for.
func Place(f *config.File) (*os.File, error) {
	dir, err := openUnix(filepath.Dir(f.Path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	fd, err := openat(dir.fd(), filepath.Base(f.Path), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, explain(f.Path, err)
	}
	file := os.NewFile(uintptr(fd), f.Path)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = regular(st)
	}
	if err != nil {
		_ = file.Close()
		return nil, explain(f.Path, err)
	}
	return file, nil
}

// Delivered says what keeps an open file from being what was delivered: it is
// another's than the owner's, or has a second name, by which a folder's owner
// could have put any file here.
func Delivered(f *config.File, file *os.File) error {
	uid, err := account.UID(f.Owner)
	if err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return err
	}
	if err := regular(st); err != nil {
		return err
	}
	if int(st.Uid) != uid || st.Nlink != 1 {
		return fmt.Errorf("belongs to uid %d and has %d names; as it is delivered it belongs to %s and has one: look who put it there", st.Uid, st.Nlink, f.Owner)
	}
	return nil
}
