package collect

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// The kernel prints /proc/PID/exe relative to whatever tree the file's mount
// hangs in, which need not be this host's: anybody can mount a file system of
// his own in a user namespace, and once he has detached it (umount -l) its files
// are printed relative to its own root, as /opt/billing/bin/billingd, say. So a
// path is told only after it was found to mean the program's file here too:
//
//   - While the file is there, it is the same file under that path on this host,
//     and nothing else matters.
//   - Of one that was replaced since it was started, as every package update
//     does, its mount must be the one that covers the path's folder, so that
//     the printed path was one in that tree and no other: in the agent's own
//     tree, or, for a service to which the system manager gave a mount
//     namespace (PrivateTmp=, ProtectSystem=), whose mounts are copies, in the
//     program's tree, where the folder must be the same as here.
//
// The program's tree is believed only if the host's root made it: the program
// is in the agent's user namespace, and its mount namespace belongs to that one.
// A program with a user namespace of its own (PrivateUsers=) and with copies of
// the mounts is therefore told again only when it was restarted on its new file.

// isHostFile refuses a program whose path does not mean its file on this host.
func (d *dir) isHostFile(e executable) error {
	if e.deleted {
		return d.wasHostFile(e)
	}
	var here, runs unix.Stat_t
	// A kernel's path has no symlink in it. The file isn't opened: what stands
	// there may be anything.
	if err := unix.Lstat(e.path, &here); err != nil {
		return fmt.Errorf("%s runs, but is not on this host: it is in a container or a chroot (%w)", e.path, err)
	}
	if err := unix.Fstat(int(e.file.Fd()), &runs); err != nil {
		return err
	}
	if here.Dev != runs.Dev || here.Ino != runs.Ino {
		return fmt.Errorf("%s runs from another file system than this host's: it is in a container or a chroot", e.path)
	}
	return nil
}

// wasHostFile is isHostFile of a file that has lost its name.
func (d *dir) wasHostFile(e executable) error {
	folder := filepath.Dir(e.path)
	runs, err := mountID(e.file)
	if err != nil {
		return err
	}
	here, err := openAt(unix.AT_FDCWD, folder)
	if err != nil {
		return fmt.Errorf("%s is not on this host: the program is in a container or a chroot (%w)", folder, err)
	}
	defer func() { _ = here.Close() }()
	if id, err := mountID(here); err != nil || id == runs {
		return err
	}
	if err := d.inHostNamespaces(); err != nil {
		return fmt.Errorf("%s was replaced or removed, and can't be told by its path: %w", e.path, err)
	}
	there, err := openAt(d.fd, "root"+folder)
	if err != nil {
		return goneOr(d.pid, err)
	}
	defer func() { _ = there.Close() }()
	id, err := mountID(there)
	if err != nil {
		return err
	}
	if id != runs {
		return fmt.Errorf("%s was replaced or removed, and can't be told by its path: it runs from a mount that is not, or no longer, at %s", e.path, folder)
	}
	same, err := sameFile(here, there)
	if err == nil && !same {
		err = fmt.Errorf("%s is another folder for the program than for this host: it is in a container, or under a mount of its own", folder)
	}
	return err
}

// inHostNamespaces says whether only the host's root can have made what the
// process sees as file system.
func (d *dir) inHostNamespaces() error {
	ours, err := os.Stat("/proc/self/ns/user")
	if err != nil {
		return err
	}
	user, err := d.open("ns/user")
	if err != nil {
		return err
	}
	defer func() { _ = user.Close() }()
	mounts, err := d.open("ns/mnt")
	if err != nil {
		return err
	}
	defer func() { _ = mounts.Close() }()
	fd, err := unix.IoctlRetInt(int(mounts.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return fmt.Errorf("whose its mount namespace is can't be seen: %w", err)
	}
	owner := os.NewFile(uintptr(fd), "owner of "+mounts.Name())
	defer func() { _ = owner.Close() }()
	for _, ns := range []*os.File{user, owner} {
		theirs, err := ns.Stat()
		if err != nil {
			return err
		}
		if !os.SameFile(ours, theirs) {
			return fmt.Errorf("pid %d is in a user namespace of its own, where it can mount what it likes: restart it", d.pid)
		}
	}
	return nil
}

// openAt opens a place without touching what is there.
func openAt(dir int, path string) (*os.File, error) {
	fd, err := unix.Openat(dir, path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// mountID names the mount that a file was opened on; while it is open, no other
// mount gets that number.
func mountID(f *os.File) (int, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if id, ok := bytes.CutPrefix(line, []byte("mnt_id:")); ok {
			return strconv.Atoi(string(bytes.TrimSpace(id)))
		}
	}
	return 0, fmt.Errorf("/proc/self/fdinfo has no mnt_id of %s", f.Name())
}
