package files

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/internal/secret"
)

// Withdraw removes the files and what an interrupted swap left of them; it
// tries all of them.
func Withdraw(files []*config.File) error {
	var errs []error
	for _, f := range files {
		if err := withdraw(f); err != nil {
			errs = append(errs, fmt.Errorf("%s: not removed: %w", f.Path, err))
		}
	}
	return errors.Join(errs...)
}

func withdraw(f *config.File) error {
	t, err := openTarget(f)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = t.dir.Close() }()
	// The file first, and each of them whatever the others say: who owns the
	// folder can put there what can't be unlinked. What Recover makes of the rest
	// after a crash is withdrawn once more.
	var errs []error
	for _, name := range []string{t.name, t.new(), t.old(), t.none()} {
		errs = append(errs, t.clear(name))
	}
	return errors.Join(errs...)
}

// Standing says whether all files are there.
func Standing(files []*config.File) bool {
	for _, f := range files {
		file, err := Place(f)
		if err != nil {
			return false
		}
		_ = file.Close()
	}
	return true
}

// Place is the regular file that stands in a file's place, as a mere handle
// (O_PATH), which is neither read nor waited for.
func Place(f *config.File) (*os.File, error) {
	t, err := openTarget(f)
	if err != nil {
		return nil, err
	}
	defer func() { _ = t.dir.Close() }()
	fd, err := openat(t.fd(), t.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
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
	uid, err := uidOf(f.Owner)
	if err != nil {
		return err
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

// ReadBack is what stands in the files; nil unless all are there and still are
// what was delivered.
func ReadBack(files []*config.File) []Content {
	var out []Content
	for _, f := range files {
		data, err := readBack(f)
		if err != nil {
			for _, c := range out {
				c.Data.Wipe()
			}
			return nil
		}
		out = append(out, Content{File: f, Data: data})
	}
	return out
}

func readBack(f *config.File) (secret.Bytes, error) {
	t, err := openTarget(f)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer func() { _ = t.dir.Close() }()
	fd, err := openat(t.fd(), t.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return secret.Bytes{}, err
	}
	file := os.NewFile(uintptr(fd), f.Path)
	defer func() { _ = file.Close() }()
	if err := Delivered(f, file); err != nil {
		return secret.Bytes{}, err
	}
	b, err := io.ReadAll(io.LimitReader(file, deliver.MaxContent+1))
	if err == nil && len(b) > deliver.MaxContent {
		err = errors.New("too large")
	}
	return secret.New(b), err
}
