package files

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/internal/secret"
)

// A unixFolder is a folder by its descriptor.
type unixFolder struct{ dir *os.File }

// openUnix opens a folder from / down, one name at a time and each without
// following: what openat2 does with RESOLVE_NO_SYMLINKS, on every kernel, and
// it knows which name was the symlink.
func openUnix(name string) (*unixFolder, error) {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, explain("/", err)
	}
	at := "/"
	for rest := strings.Trim(name, "/"); rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		at = path.Join(at, part)
		flags := unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		if rest == "" {
			flags |= unix.O_RDONLY // fsync wants it
		} else {
			flags |= unix.O_PATH
		}
		next, err := openat(fd, part, flags, 0)
		if err != nil {
			if st, statErr := lstat(fd, part); statErr == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
				err = errSymlink
			}
			_ = unix.Close(fd)
			return nil, explain(at, err)
		}
		_ = unix.Close(fd)
		fd = next
	}
	return &unixFolder{os.NewFile(uintptr(fd), name)}, nil
}

func openFolder(name string) (folder, error) {
	u, err := openUnix(name)
	if err != nil {
		return nil, err
	}
	return u, nil
}

func (u *unixFolder) fd() int      { return int(u.dir.Fd()) }
func (u *unixFolder) Close() error { return u.dir.Close() }
func (u *unixFolder) sync() error  { return u.dir.Sync() }

func (u *unixFolder) look(name string) (bool, error) {
	st, err := lstat(u.fd(), name)
	switch err {
	case nil:
		return true, regular(st)
	case unix.ENOENT:
		return false, nil
	}
	return false, err
}

func (u *unixFolder) present(name string) (bool, error) {
	_, err := lstat(u.fd(), name)
	if err == unix.ENOENT {
		return false, nil
	}
	return err == nil, err
}

// write makes the file for root alone; owner and mode are set by descriptor, on
// a file that nobody else made.
func (u *unixFolder) write(name string, data secret.Bytes, f *config.File) (_ io.Closer, err error) {
	uid, err := account.UID(f.Owner)
	if err != nil {
		return nil, fmt.Errorf("owner: %w", err)
	}
	gid, err := account.GID(f.Group)
	if err != nil {
		return nil, fmt.Errorf("group: %w", err)
	}
	made, err := u.create(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = made.Close()
		}
	}()
	step("create " + name)

	fd := int(made.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Nlink != 1 || regular(st) != nil {
		return nil, errors.New("somebody else has hold of the new file")
	}
	if _, err := made.Write(data.Reveal()); err != nil {
		return nil, bare(err)
	}
	step("write " + name)
	if err := unix.Fchown(fd, uid, gid); err != nil {
		return nil, err
	}
	if err := unix.Fchmod(fd, uint32(f.FileMode().Perm())); err != nil {
		return nil, err
	}
	step("chmod " + name)
	if err := made.Sync(); err != nil {
		return nil, bare(err)
	}
	return u.hold(name, made)
}

// bare is the cause of an error that names the file, which explain does.
func bare(err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// hold has the new content open no longer for writing: to IMA, whoever reads a
// file that can still be written is a violation. The inode is kept from being
// used again as before.
func (u *unixFolder) hold(name string, made *os.File) (*os.File, error) {
	fd, err := openat(u.fd(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	held := os.NewFile(uintptr(fd), name)
	var written, now unix.Stat_t
	err = errors.Join(unix.Fstat(int(made.Fd()), &written), unix.Fstat(fd, &now))
	if err == nil && (written.Ino != now.Ino || written.Dev != now.Dev) {
		err = errReplaced
	}
	if err == nil {
		err = made.Close()
	}
	if err != nil {
		return nil, errors.Join(err, held.Close())
	}
	return held, nil
}

// create makes a file that wasn't there. One that the folder's owner put there
// is removed, once: where he keeps doing it, he does without.
func (u *unixFolder) create(name string) (*os.File, error) {
	for again := true; ; again = false {
		fd, err := openat(u.fd(), name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if err != unix.EEXIST || !again {
			return nil, err
		}
		if err := u.remove(name); err != nil {
			return nil, err
		}
	}
}

func (u *unixFolder) mark(name string) error {
	marker, err := u.create(name)
	if err != nil {
		return err
	}
	return marker.Close()
}

func (u *unixFolder) is(name string, held io.Closer) bool {
	var made unix.Stat_t
	err := unix.Fstat(int(held.(*os.File).Fd()), &made)
	st, statErr := lstat(u.fd(), name)
	return err == nil && statErr == nil && st.Ino == made.Ino && st.Dev == made.Dev
}

func (u *unixFolder) link(name, second string) error {
	if err := u.remove(second); err != nil {
		return err
	}
	return unix.Linkat(u.fd(), name, u.fd(), second, 0)
}

func (u *unixFolder) rename(from, to string) error {
	return unix.Renameat(u.fd(), from, u.fd(), to)
}

func (u *unixFolder) renameNew(from, to string) error {
	err := unix.Renameat2(u.fd(), from, u.fd(), to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS { // NFS, among others
		return u.rename(from, to)
	}
	return err
}

func (u *unixFolder) remove(name string) error {
	if err := unix.Unlinkat(u.fd(), name, 0); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

func (u *unixFolder) read(name string, f *config.File) (secret.Bytes, error) {
	fd, err := openat(u.fd(), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
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

func openat(dir int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func lstat(dir int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

// regular says of an lstat's answer why it can't be swapped.
func regular(st unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return nil
	case unix.S_IFLNK:
		return errSymlink
	}
	return errNotRegular
}

// explain says what to do about a failed system call.
func explain(name string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = ": create the folder, as the agent makes none"
	case errors.Is(err, unix.ENOTDIR):
		hint = ": a folder is wanted here"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		hint = ": make room on its file system"
	case errors.Is(err, unix.EROFS):
		hint = ": mount it writable, or add the folder to the agent unit's ReadWritePaths="
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		hint = ": run the agent as root with CAP_CHOWN, CAP_FOWNER and CAP_DAC_OVERRIDE, and look for chattr +i and at the security module's log"
	case errors.Is(err, unix.EISDIR):
		hint = ": remove it"
	case errors.Is(err, unix.ENAMETOOLONG):
		hint = ": shorten the file's name, to which .countersign-new is added"
	}
	return fmt.Errorf("%s: %w%s", name, err, hint)
}
