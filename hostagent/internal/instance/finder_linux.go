package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/process/collect"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// pollEvery is how often what sends no signal is looked at: a process that is
// yet to come, and a unit whose main process ended before its last one.
const pollEvery = 2 * time.Second

// A Finder is safe for concurrent use.
type Finder struct {
	manager manager

	mu       sync.Mutex
	watchers map[string][]chan struct{}       // guarded by mu; by unit
	looks    map[config.Process]chan struct{} // guarded by mu; held by who looks
}

// New makes a Finder; the system manager is asked when a unit is.
func New() *Finder {
	f := &Finder{watchers: map[string][]chan struct{}{}, looks: map[config.Process]chan struct{}{}}
	f.manager.changed = f.changed
	return f
}

// Close ends the connection to the system manager.
func (f *Finder) Close() { f.manager.close() }

// Find is the evidence of the program that p describes. Of several that answer
// to exe or user it is the instance named held, if that is one of them.
func (f *Finder) Find(ctx context.Context, p config.Process, held string) (process.Program, error) {
	return f.look(ctx, p, func() (process.Program, error) {
		if p.Unit != "" {
			return f.unit(ctx, p.Unit)
		}
		pid, err := findPID(p, held)
		if err != nil {
			return process.Program{}, err
		}
		return f.inspect(ctx, pid)
	})
}

// Inspect is the evidence of one process; with its unit, where it is a
// service's main process.
func (f *Finder) Inspect(ctx context.Context, pid int) (process.Program, error) {
	return f.look(ctx, config.Process{PID: pid}, func() (process.Program, error) { return f.inspect(ctx, pid) })
}

// look comes back when ctx ends, whatever the kernel does: a file may lie on a
// file system that its user keeps from answering. A look that hangs is the only
// one at its program until it is over.
func (f *Finder) look(ctx context.Context, p config.Process, see func() (process.Program, error)) (process.Program, error) {
	f.mu.Lock()
	turn := f.looks[p]
	if turn == nil {
		turn = make(chan struct{}, 1)
		f.looks[p] = turn
	}
	f.mu.Unlock()
	var program process.Program
	err := errors.New("an earlier look at the program hangs")
	select {
	case <-ctx.Done():
		return program, errors.Join(err, ctx.Err())
	case turn <- struct{}{}:
	}
	type seen struct {
		program process.Program
		err     error
	}
	done := make(chan seen, 1)
	go func() {
		defer func() { <-turn }()
		program, err := see()
		done <- seen{program, err}
	}()
	select {
	case <-ctx.Done():
		return program, fmt.Errorf("the look at the program takes too long: does a file system hang? %w", ctx.Err())
	case s := <-done:
		return s.program, s.err
	}
}

func (f *Finder) inspect(ctx context.Context, pid int) (process.Program, error) {
	program, err := collect.Process(pid)
	if err != nil {
		return program, notRunning(err)
	}
	name, ok := serviceOf(program.Cgroup)
	if !ok {
		return program, nil
	}
	u, err := f.manager.unit(ctx, name)
	if err != nil {
		return program, fmt.Errorf("pid %d is in unit %s's control group, and the system manager can't be asked: %w", pid, name, err)
	}
	if u.mainPID == pid && u.cgroup == program.Cgroup {
		program.Unit, program.Invocation = name, u.invocation
	}
	return program, nil
}

// serviceOf is the system manager's service that a control group is of. The
// groups of a user's manager lie below its own service, and are none.
func serviceOf(cgroup string) (string, bool) {
	name := filepath.Base(cgroup)
	if !strings.HasSuffix(name, ".service") || strings.HasPrefix(cgroup, "/user.slice/") || strings.Contains(filepath.Dir(cgroup), ".service/") || strings.HasSuffix(filepath.Dir(cgroup), ".service") {
		return "", false
	}
	return name, true
}

// UnitOf is the system manager's unit, a service's or a scope's, say, that a
// control group is of or lies in: the first name that is no slice. What a unit
// or a user's manager makes below its own group doesn't change it.
func UnitOf(cgroup string) string {
	for name := range strings.SplitSeq(cgroup, "/") {
		if name == "" || strings.HasSuffix(name, ".slice") {
			continue
		}
		if i := strings.LastIndexByte(name, '.'); i > 0 {
			return strings.TrimPrefix(name, "_") // the manager's escape
		}
		return ""
	}
	return ""
}

func notRunning(err error) error {
	if errors.Is(err, collect.ErrGone) {
		return fmt.Errorf("%w: %w", ErrNotRunning, err)
	}
	return err
}

// unit is the evidence of a unit: of its main process while it has one, of
// what it will run while it starts.
func (f *Finder) unit(ctx context.Context, name string) (process.Program, error) {
	u, err := f.manager.unit(ctx, name)
	if err != nil {
		return process.Program{}, err
	}
	switch {
	case u.mainPID != 0:
		return f.mainProcess(ctx, name, u)
	case u.active == "activating":
		return starting(name, u)
	case populated(u.cgroup):
		return process.Program{}, fmt.Errorf("unit %s has lost its main process, and others of it still run", name)
	}
	return process.Program{}, fmt.Errorf("%w: unit %s is %s", ErrNotRunning, name, u.active)
}

func (f *Finder) mainProcess(ctx context.Context, name string, u unit) (process.Program, error) {
	program, err := collect.Process(u.mainPID)
	if err != nil {
		return program, notRunning(err)
	}
	if program.Cgroup != u.cgroup {
		return program, fmt.Errorf("unit %s's main process %d is in control group %s, not in the unit's %s", name, u.mainPID, program.Cgroup, u.cgroup)
	}
	// The manager is asked again: what was read is of this invocation only if
	// it still is.
	again, err := f.manager.unit(ctx, name)
	if err != nil {
		return program, err
	}
	if again.mainPID != u.mainPID || again.invocation != u.invocation {
		return program, fmt.Errorf("%w: unit %s was restarted while it was looked at", ErrNotRunning, name)
	}
	program.Unit, program.Invocation = name, u.invocation
	return program, nil
}

// Starting is the evidence of a unit that waits for its credential in an
// ExecStartPre.
func (f *Finder) Starting(ctx context.Context, name string) (process.Program, error) {
	return f.look(ctx, config.Process{Unit: name}, func() (process.Program, error) { return f.starting(ctx, name) })
}

func (f *Finder) starting(ctx context.Context, name string) (process.Program, error) {
	u, err := f.manager.unit(ctx, name)
	if err != nil {
		return process.Program{}, err
	}
	if u.active != "activating" || u.mainPID != 0 {
		return process.Program{}, fmt.Errorf("unit %s is %s, not starting: `ready` belongs into its ExecStartPre", name, u.active)
	}
	return starting(name, u)
}

func starting(name string, u unit) (process.Program, error) {
	if u.execStart == "" || u.invocation == "" {
		return process.Program{}, fmt.Errorf("unit %s has no ExecStart", name)
	}
	p := process.Program{Unit: name, Invocation: u.invocation, Cgroup: u.cgroup, Starting: true}
	var err error
	if p.Boot, err = collect.BootID(); err != nil {
		return p, err
	}
	if p.Exe, p.SHA256, err = collect.File(u.execStart); err != nil {
		return p, fmt.Errorf("unit %s: ExecStart: %w", name, err)
	}
	p.User, p.UID, p.GID, err = identity(u.user, u.group)
	return p, err
}

// populated says whether any process is left in a control group.
func populated(cgroup string) bool {
	if cgroup == "" {
		return false
	}
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		b, err := os.ReadFile(root + cgroup + "/cgroup.events")
		if err == nil {
			return strings.Contains(string(b), "populated 1")
		}
	}
	b, err := os.ReadFile("/sys/fs/cgroup/systemd" + cgroup + "/cgroup.procs")
	return err == nil && len(b) > 0
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
				err = fmt.Errorf("%w: what had the credential ended, and %w", ErrNotRunning, err)
			}
			return 0, err
		}
		if found == 0 {
			found = pid
		}
	}
	if found == 0 {
		return 0, ErrNotRunning
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
		if _, uid, _, err := identity(p.User, ""); err != nil || uid != st.Uid {
			return false
		}
	}
	return true
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
		return 0, fmt.Errorf("%w: %w", ErrNotRunning, err)
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
		return 0, fmt.Errorf("%w: %s is empty", ErrNotRunning, path)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s holds no pid", path)
	}
	return pid, nil
}

// Watch sends when Find may answer differently, until ctx ends.
func (f *Finder) Watch(ctx context.Context, p config.Process) <-chan struct{} {
	out := make(chan struct{}, 1)
	tell := func() {
		select {
		case out <- struct{}{}:
		default:
		}
	}
	if p.Unit != "" {
		f.mu.Lock()
		f.watchers[p.Unit] = append(f.watchers[p.Unit], out)
		f.mu.Unlock()
		go f.watchUnit(ctx, p.Unit, tell)
		return out
	}
	go watchProcess(ctx, p, tell)
	return out
}

// changed is called by the manager's signals, with "" for all units.
func (f *Finder) changed(unit string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, list := range f.watchers {
		if unit != "" && unit != name {
			continue
		}
		for _, w := range list {
			select {
			case w <- struct{}{}:
			default:
			}
		}
	}
}

// watchUnit covers what the manager sends no signal for: that it can't be
// reached, and that the last process of a unit without a main one ended.
func (f *Finder) watchUnit(ctx context.Context, name string, tell func()) {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	waiting := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if !f.manager.connected() {
			f.manager.connect(ctx)
			waiting = true
		}
		cgroup := f.manager.lastCgroup(name)
		if now := cgroup == "" || !populated(cgroup); now != waiting {
			waiting = now
			tell()
		}
	}
}

// watchProcess waits for a process to come by looking, and for its end by a
// pidfd.
func watchProcess(ctx context.Context, p config.Process, tell func()) {
	for ctx.Err() == nil {
		pid, err := findPID(p, "")
		if !errors.Is(err, ErrNotRunning) {
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
