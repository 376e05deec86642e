package files

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openFolder opens a folder from / down, one name at a time and each without
// following: what openat2 does with RESOLVE_NO_SYMLINKS, on every kernel, and
// it knows which name was the symlink.
func openFolder(name string) (*os.File, error) {
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
	return os.NewFile(uintptr(fd), name), nil
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

// unlink removes a name; missing is fine.
func unlink(dir int, name string) error {
	if err := unix.Unlinkat(dir, name, 0); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

var (
	errSymlink    = errors.New("is a symlink, and symlinks are not followed here: name the place itself in the config, or remove the symlink")
	errNotRegular = errors.New("is there and is not a regular file: remove it")
)

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

// uidOf and gidOf take a name of /etc/passwd and /etc/group, or a number.
func uidOf(name string) (int, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if n, ok := number(name); ok {
			return n, nil
		}
		return 0, fmt.Errorf("owner: no user %q in /etc/passwd: create it, or give the number of one that a directory service knows", name)
	}
	return strconv.Atoi(u.Uid)
}

func gidOf(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		if n, ok := number(name); ok {
			return n, nil
		}
		return 0, fmt.Errorf("group: no group %q in /etc/group: create it, or give the number of one that a directory service knows", name)
	}
	return strconv.Atoi(g.Gid)
}

func number(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err == nil
}
