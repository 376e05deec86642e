package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Systemd is a real systemd in a container of its own, on an overlay of the
// machine's root that keeps every change in memory. It has unified cgroups and
// processes of its own, and shares the machine's network.
type Systemd struct {
	init    int
	cgroup  string
	process *process
}

//go:embed systemd.sh
var systemdScript string

// BootSystemd boots one, with its console's log in dir, and returns when it is
// up: with the journal, the system bus and logind, and none of the machine's own
// services. Each bind is a directory or socket of the machine to have in it, as
// "PATH" or "PATH:PATH INSIDE". It must be root.
//
// When this process dies without Poweroff, the container powers itself off.
func BootSystemd(ctx context.Context, dir string, binds ...string) (*Systemd, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("booting systemd in a container needs root")
	}
	for _, tool := range []string{"systemd-nspawn", "unshare", "nsenter", "setpriv"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: install systemd-container and util-linux, or run test/setup.sh", err)
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	name := cgroupPrefix + strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(newPassword()[:8])
	cgroups, err := cgroupMount()
	if err != nil {
		return nil, err
	}
	if err := removeStaleCgroups(cgroups); err != nil {
		return nil, err
	}
	args := []string{"--mount", "--propagation", "private", "sh", "-c", systemdScript, "systemd.sh", root, name}
	for _, bind := range binds {
		args = append(args, "--bind="+bind)
	}
	// unshare, the shell and nspawn are one process, one after the other. SIGTERM
	// makes nspawn ask the container's systemd to power off.
	p, err := startProcess(exec.Command("unshare", args...), filepath.Join(dir, "systemd.log"), syscall.SIGTERM)
	if err != nil {
		return nil, err
	}
	s := &Systemd{cgroup: filepath.Join(cgroups, name), process: p}
	if err := p.await(ctx, s.up); err != nil {
		return nil, errors.Join(fmt.Errorf("systemd doesn't boot: %w", err), s.end(p.stop(syscall.SIGTERM)))
	}
	return s, nil
}

// up finds the container's init and asks whether it has started.
func (s *Systemd) up(ctx context.Context) error {
	if s.init == 0 {
		init, err := initOf(s.process.cmd.Process.Pid)
		if err != nil {
			return err
		}
		s.init = init
	}
	out, err := s.Run(ctx, "systemctl", "is-system-running")
	// A degraded one is up: whoever needs the unit that failed will hear of it.
	if state := strings.TrimSpace(string(out)); state != "running" && state != "degraded" {
		return fmt.Errorf("systemd is %q: %w", state, err)
	}
	return nil
}

// PID returns the process id of the container's init on the machine.
func (s *Systemd) PID() int { return s.init }

// Command returns a command that runs in the container as root, in all its
// namespaces, with a plain environment. It dies with ctx.
func (s *Systemd) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(s.init),
		"--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd", "--", "setpriv", "--pdeathsig", "KILL", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run runs a command as Command does and returns its standard output. An error
// carries what it wrote to standard error.
func (s *Systemd) Run(ctx context.Context, args ...string) ([]byte, error) {
	return s.run(ctx, nil, args...)
}

// WriteFile writes a file in the container, with its parent directories.
func (s *Systemd) WriteFile(ctx context.Context, path string, data []byte, mode fs.FileMode) error {
	_, err := s.run(ctx, data, "install", "-D", "-m", strconv.FormatUint(uint64(mode.Perm()), 8), "/dev/stdin", path)
	return err
}

func (s *Systemd) run(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	cmd := s.Command(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(stdin), &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

// Poweroff shuts the container down in order and waits until it is gone, with
// its mounts and cgroups. It never kills it: when ctx ends first, that is an
// error, and Poweroff can be called again.
func (s *Systemd) Poweroff(ctx context.Context) error {
	select {
	case <-s.process.ended:
		return s.end(nil)
	default:
	}
	// The command is often cut off by the shutdown that it asks for.
	_, err := s.Run(ctx, "systemctl", "--no-block", "poweroff")
	select {
	case <-s.process.ended:
		return s.end(nil)
	case <-ctx.Done():
		return fmt.Errorf("systemd hasn't powered off: %w", errors.Join(ctx.Err(), err))
	}
}

// end removes the container's cgroups; the mounts went with its namespace.
func (s *Systemd) end(err error) error {
	return errors.Join(err, removeCgroup(s.cgroup))
}

// initOf returns the child of nspawn that is process 1 in its own namespace.
func initOf(nspawn int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", nspawn, nspawn))
	if err != nil {
		return 0, err
	}
	for _, child := range strings.Fields(string(data)) {
		status, err := os.ReadFile("/proc/" + child + "/status")
		if err != nil {
			continue // it has just ended
		}
		for line := range strings.Lines(string(status)) {
			if ids := strings.Fields(line); len(ids) == 3 && ids[0] == "NSpid:" && ids[2] == "1" {
				return strconv.Atoi(child)
			}
		}
	}
	return 0, errors.New("systemd-nspawn has not started an init yet")
}
