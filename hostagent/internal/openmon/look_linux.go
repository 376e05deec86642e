package openmon

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/program/proc"
	"github.com/countersign/countersign/hostagent/internal/program/systemd"
)

// Bounds of what is read in /proc. What is needed of status stands before its
// first part that a user can make long, the groups; a control group's path is
// at most a path long.
const (
	statusRead = 2 << 10
	cgroupRead = 16 << 10
)

// deleted is how the kernel marks a path whose file is gone.
const deleted = " (deleted)"

// look says who a thread is. It opens nothing outside /proc and waits for
// nothing: the thread that is looked at waits for it.
func look(thread int) visitor {
	v := nobody
	if thread <= 0 {
		return v
	}
	dir, err := unix.Open("/proc/"+strconv.Itoa(thread), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return v
	}
	defer func() { _ = unix.Close(dir) }()
	// The thread's own, as its process may have lost its first one.
	v.exe = exe(dir, "exe")
	v.pid, v.uid = identity(read(dir, "status", statusRead))
	v.unit = systemd.UnitOf(cgroup(read(dir, "cgroup", cgroupRead)))
	v.line = []relative{{v.pid, v.exe}}
	if v.pid > 0 {
		for _, pid := range proc.Ancestors(v.pid, maxAncestors) {
			v.line = append(v.line, relative{pid, exe(unix.AT_FDCWD, "/proc/"+strconv.Itoa(pid)+"/exe")})
		}
	}
	return v
}

// read is the beginning of a file in /proc, or as much of it as can be read.
func read(dir int, name string, most int) string {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Close(fd) }()
	b := make([]byte, most)
	n := 0
	for n < most {
		more, err := unix.Read(fd, b[n:])
		if err != nil || more <= 0 {
			break
		}
		n += more
	}
	return string(b[:n])
}

// exe is the path of what runs, "" where there is none.
func exe(dir int, name string) string {
	b := make([]byte, unix.PathMax+len(deleted))
	n, err := unix.Readlinkat(dir, name, b)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b[:n]), deleted)
}

// identity is the process of a thread, and the user by whom it opens files.
func identity(status string) (pid, uid int) {
	pid, uid = 0, -1
	for line := range strings.Lines(status) {
		name, rest, _ := strings.Cut(line, ":")
		f := strings.Fields(rest)
		switch {
		case name == "Tgid" && len(f) == 1:
			pid, _ = strconv.Atoi(f[0])
		case name == "Uid" && len(f) == 4:
			if n, err := strconv.ParseUint(f[3], 10, 32); err == nil {
				uid = int(n)
			}
		}
	}
	return pid, uid
}

// cgroup is the path in the system manager's hierarchy: the unified one, or
// where that is not in use, systemd's own.
func cgroup(list string) string {
	named := ""
	for line := range strings.Lines(list) {
		line = strings.TrimSuffix(line, "\n")
		if path, ok := strings.CutPrefix(line, "0::"); ok && path != "/" {
			return path
		}
		if _, path, ok := strings.Cut(line, ":name=systemd:"); ok {
			named = path
		}
	}
	return named
}
