// Package proc finds programs that are processes of their own: by a pid, a pid
// file, the file that they run, their user.
//
// It trusts the kernel's /proc. What processes say of themselves, argv and
// environment, is not looked at, and a pid file only names a process, which is
// held to nothing but what the kernel says of it.
package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/process/collect"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/program"
)

// pollEvery is how often a process that is yet to come is looked for.
const pollEvery = 2 * time.Second

// Manager is what starts services, which are processes, too.
type Manager interface {
	// Name adds to p the service that it is the main process of, if it is one.
	Name(ctx context.Context, p *process.Program) error
}

// A Kind is a [program.Kind].
type Kind struct{ manager Manager }

// New makes a Kind. Services among the processes are named by manager.
func New(manager Manager) *Kind { return &Kind{manager} }

// Close has nothing to end.
func (*Kind) Close() {}

// Describes reports whether p describes a process.
func (*Kind) Describes(p config.Process) bool { return p.Unit == "" }

// Find returns the evidence of the process that p describes. Of several that
// answer to exe or user it is the instance named held, if that is one of them.
func (k *Kind) Find(ctx context.Context, p config.Process, held string) (process.Program, error) {
	pid, err := findPID(p, held)
	if err != nil {
		return process.Program{}, err
	}
	found, err := program.Process(pid)
	if err != nil {
		return found, err
	}
	return found, k.manager.Name(ctx, &found)
}

// Watch sends when Find may answer differently, until ctx ends.
func (k *Kind) Watch(ctx context.Context, p config.Process) <-chan struct{} {
	out := make(chan struct{}, 1)
	go watchProcess(ctx, p, func() {
		select {
		case out <- struct{}{}:
		default:
		}
	})
	return out
}

// findPID looks for the one process that answers to p, or the one of several
// that is of the instance held. Anybody may start another of the same exe: that
// takes nothing from the one that has the credential, nor from its end.
func findPID(p config.Process, held string) (int, error) {
	switch {
	case p.PID != 0:
		return p.PID, nil
	case p.PIDFile != "":
		return readPIDFile(p.PIDFile)
	}
	if pid, ok := pidOf(held); ok && answers(pid, p) {
		return pid, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	found := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if !answers(pid, p) {
			continue
		}
		if found != 0 && !descends(pid, found) {
			if descends(found, pid) {
				found = pid
				continue
			}
			err := fmt.Errorf("more than one process answers to the description (pids %d and %d): use a unit or a pid_file, or say the user", found, pid)
			if held != "" {
				err = fmt.Errorf("%w: what had the credential ended, and %w", program.ErrNotRunning, err)
			}
			return 0, err
		}
		if found == 0 {
			found = pid
		}
	}
	if found == 0 {
		return 0, program.ErrNotRunning
	}
	return found, nil
}

// pidOf is the pid of an instance that is a process of this boot.
func pidOf(instance string) (int, bool) {
	boot, rest, _ := strings.Cut(instance, "/")
	number, _, _ := strings.Cut(rest, "/")
	pid, err := strconv.Atoi(number)
	if err != nil {
		return 0, false
	}
	now, err := collect.BootID()
	return pid, err == nil && boot == now
}

// answers is cheap: it reads no file's content.
func answers(pid int, p config.Process) bool {
	folder := "/proc/" + strconv.Itoa(pid)
	if p.Exe != "" {
		exe, err := os.Readlink(folder + "/exe")
		if err != nil || strings.TrimSuffix(exe, " (deleted)") != p.Exe {
			return false
		}
	}
	if p.User != "" {
		var st unix.Stat_t
		if unix.Stat(folder, &st) != nil {
			return false
		}
		if uid, err := uidOf(p.User); err != nil || uid != st.Uid {
			return false
		}
	}
	return true
}

// uidOf is a user's, by name or by number.
func uidOf(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return 0, err
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	return uint32(uid), err
}

// descends says whether pid is a child of ancestor, at any depth: workers of a
// program that forks are not programs of their own.
func descends(pid, ancestor int) bool { return slices.Contains(Ancestors(pid, 64), ancestor) }

// Ancestors are a process's parent, its parent's parent and so on up to init,
// which is left out; most bounds how many.
func Ancestors(pid, most int) (line []int) {
	for len(line) < most {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			break
		}
		i := strings.LastIndexByte(string(b), ')')
		f := strings.Fields(string(b[i+1:]))
		if len(f) < 2 {
			break
		}
		if pid, err = strconv.Atoi(f[1]); err != nil || pid <= 1 {
			break
		}
		line = append(line, pid)
	}
	return line
}

func readPIDFile(path string) (int, error) {
	// The file is the program's user's, who may put anything there.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%w: %w", program.ErrNotRunning, err)
	}
	if errors.Is(err, unix.ELOOP) {
		return 0, fmt.Errorf("%s is a symlink, which is not followed: name the file itself", path)
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return 0, errors.Join(fmt.Errorf("%s is not a regular file", path), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, err
	}
	if len(b) == 0 {
		return 0, fmt.Errorf("%w: %s is empty", program.ErrNotRunning, path)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s holds no pid", path)
	}
	return pid, nil
}

// watchProcess waits for a process to come by looking, and for its end by a
// pidfd.
func watchProcess(ctx context.Context, p config.Process, tell func()) {
	for ctx.Err() == nil {
		pid, err := findPID(p, "")
		if !errors.Is(err, program.ErrNotRunning) {
			tell()
		}
		if err == nil && waitEnd(ctx, pid) {
			tell()
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// waitEnd waits for a process to end; false where that can't be waited for.
func waitEnd(ctx context.Context, pid int) bool {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	// The runtime's poller waits without a thread.
	f := os.NewFile(uintptr(fd), "pidfd")
	defer func() { _ = f.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	_ = raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		ended = err == nil && n == 1
		return ended
	})
	return ended
}
