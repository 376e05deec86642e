package notify

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stub is what a process of the agent's own program is called that is about to
// become a command.
const stub = "countersign-command"

// failed is the stub's end of a pipe by which it says why it didn't become one.
const failed = 3

// A command's program may be a file that the agent itself holds up opens of
// (package openmon): its owner can give a delivered file any name. While Go
// starts a program the agent can't answer, and so it starts none but its own,
// and the execve that may wait is another process's. It is the first thing that
// process does, before main.
func init() {
	if len(os.Args) < 2 || os.Args[0] != stub {
		return
	}
	unix.CloseOnExec(failed)
	err := syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
	if errno, ok := err.(syscall.Errno); ok {
		_, _ = unix.Write(failed, []byte{byte(errno)})
	}
	os.Exit(1)
}

// command runs argv in a process group of its own, which is killed at the
// limit. What it prints goes nowhere: a check reads the secret.
func command(ctx context.Context, argv, env []string, limit time.Duration) error {
	why, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = why.Close() }()
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: append([]string{stub}, argv...), Env: env, Dir: "/", ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true}}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("%s: the agent can't start itself for it: %w", argv[0], err)
	}
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	pid := cmd.Process.Pid
	exited := make(chan struct{})
	go func() {
		// Without reaping it, so that its number stays its own until the kill.
		for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
		close(exited)
	}()
	select {
	case <-exited:
	case <-bounded.Done():
		_ = unix.Kill(-pid, unix.SIGKILL) // it is there: not reaped
		<-exited
		_ = cmd.Wait()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s was not done after %v, and was killed: make it faster, or set on_change's timeout", argv[0], limit)
	}
	if err := cmd.Wait(); err != nil {
		errno := make([]byte, 1)
		if n, _ := why.Read(errno); n == 1 {
			return &os.PathError{Op: "exec", Path: argv[0], Err: syscall.Errno(errno[0])}
		}
		return fmt.Errorf("%s: %w; run it by hand to see what it says", argv[0], err)
	}
	return nil
}
