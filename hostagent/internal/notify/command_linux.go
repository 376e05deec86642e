package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/rootonly"
)

// What processes of the agent's own program are called that run commands:
//
//	agent → keeper → runner, which becomes the command
//
// The keeper is root, and the parent of whatever the command leaves behind: it ends that, and
// ends the command at its limit or when the agent is gone. The runner becomes the command's user.
//
// A command's program may be a file that the agent itself holds up opens of (package openmon):
// its owner can give a delivered file any name. While Go starts a program the agent can't answer,
// and so it starts none but its own, and the execve that may wait is another process's.
const (
	keeperName = "countersign-command-keeper"
	runnerName = "countersign-command"
)

// The descriptors of a keeper and of a runner.
const (
	answerFD = 3 // a pipe: the outcome
	agentFD  = 4 // the keeper's: a pipe that ends when the agent is gone, or wants no more
)

// endingTakes bounds how long a keeper tries to end what a command left.
const endingTakes = 10 * time.Second

// A task is what a command is, and as whom it runs.
type task struct {
	Argv  []string
	Limit time.Duration
	// As is whom the command runs as; nil: the agent's own user, if that isn't root.
	As *account.Account
	// Daemons lets processes that the command started live on after it.
	Daemons bool
}

// An outcome says what became of a command. The zero value is a success.
type outcome struct {
	Errno  syscall.Errno `json:",omitempty"` // it couldn't be run
	Failed string        `json:",omitempty"` // why else it wasn't run, or how it ended
	Late   bool          `json:",omitempty"`
}

// Keepers and runners do their part before anything else of the program.
func init() {
	if len(os.Args) != 2 || os.Args[0] != keeperName && os.Args[0] != runnerName {
		return
	}
	unix.CloseOnExec(answerFD)
	var j task
	var out outcome
	err := json.Unmarshal([]byte(os.Args[1]), &j)
	switch {
	case err != nil:
		out.Failed = err.Error()
	case os.Args[0] == keeperName:
		out = keep(j)
	default:
		err := become(j)
		if !errors.As(err, &out.Errno) {
			out.Failed = err.Error()
		}
	}
	_ = json.NewEncoder(os.NewFile(answerFD, "answer")).Encode(out)
	os.Exit(0)
}

// run runs a command and waits for its end. What it prints goes nowhere: a check reads the secret.
func run(ctx context.Context, j task, env []string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	answer, answerW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = answer.Close() }()
	alive, aliveW, err := os.Pipe()
	if err != nil {
		_ = answerW.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = aliveW.Close() })
	defer func() {
		if stop() {
			_ = aliveW.Close()
		}
	}()

	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{keeperName, string(text)}, Env: env, Dir: "/", ExtraFiles: []*os.File{answerW, alive},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	err = cmd.Start()
	_, _ = answerW.Close(), alive.Close()
	if err != nil {
		return fmt.Errorf("%s: the agent can't start itself for it: %w", j.Argv[0], err)
	}
	overdue := time.AfterFunc(j.Limit+2*endingTakes, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	said, _ := io.ReadAll(io.LimitReader(answer, 64<<10))
	waited := cmd.Wait()

	var out outcome
	err = json.Unmarshal(said, &out)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("%s: the process that keeps it ended: %w", j.Argv[0], errors.Join(waited, err))
	}
	return out.error(j)
}

func (o outcome) error(j task) error {
	switch {
	case o.Late:
		return fmt.Errorf("%s was not done after %v, and was killed: make it faster, or set on_change's timeout", j.Argv[0], j.Limit)
	case o.Errno != 0:
		return &os.PathError{Op: "exec", Path: j.Argv[0], Err: o.Errno}
	case o.Failed != "":
		return fmt.Errorf("%s: %s", j.Argv[0], o.Failed)
	}
	return nil
}

// keep is the keeper: it starts the runner, and leaves no process behind that it may not.
func keep(j task) outcome {
	unix.CloseOnExec(agentFD)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return outcome{Failed: err.Error()}
	}
	answer, w, err := os.Pipe()
	if err != nil {
		return outcome{Failed: err.Error()}
	}
	// A session of its own: no way to a terminal of root's.
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{runnerName, os.Args[1]}, Env: os.Environ(), Dir: "/", ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return outcome{Failed: err.Error()}
	}

	gone := make(chan struct{})
	go func() {
		_, _ = os.NewFile(agentFD, "agent").Read(make([]byte, 1))
		close(gone)
	}()
	exited := make(chan struct{})
	go func() {
		// Without reaping it, so that its number stays its own until the kill.
		for unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
		close(exited)
	}()
	late := time.NewTimer(j.Limit)
	defer late.Stop()
	all := false
	var out outcome
	select {
	case <-exited:
	case <-late.C:
		out.Late, all = true, true
	case <-gone:
		all = true
	}
	if all || !j.Daemons {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // it is there: not reaped
	}
	err = cmd.Wait()
	if (all || !j.Daemons) && !endChildren() {
		return outcome{Failed: "it left processes that don't end"}
	}
	if out.Late {
		return out
	}
	if said, _ := io.ReadAll(io.LimitReader(answer, 64<<10)); len(said) > 0 {
		if err := json.Unmarshal(said, &out); err != nil {
			out.Failed = err.Error()
		}
		return out
	}
	if err != nil {
		out.Failed = err.Error() + "; run it by hand to see what it says"
	}
	return out
}

// endChildren kills the keeper's children until it has none. The orphans of those that it kills
// become its own.
func endChildren() bool {
	for deadline := time.Now().Add(endingTakes); time.Now().Before(deadline); {
		lists, _ := filepath.Glob("/proc/self/task/*/children")
		for _, list := range lists {
			b, _ := os.ReadFile(list)
			for _, pid := range strings.Fields(string(b)) {
				if n, err := strconv.Atoi(pid); err == nil {
					_ = unix.Kill(n, unix.SIGKILL) // a child that isn't reaped: the number is its own
				}
			}
		}
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.ECHILD {
				return true
			}
			if pid == 0 {
				time.Sleep(time.Millisecond)
			}
			if pid <= 0 && err != unix.EINTR {
				break
			}
		}
	}
	return false
}

// become is the runner: it becomes the command, or says why not.
func become(j task) error {
	env := os.Environ()
	switch {
	case j.As == nil:
	case j.As.UID == 0:
		// All that is on the way is root's alone, so that execve finds what was looked at.
		if err := rootonly.Command(j.Argv); err != nil {
			var loose *rootonly.LooseError
			if errors.As(err, &loose) {
				return fmt.Errorf("it would run as root, and %w: set user in on_change, or make it and its folders root's alone", loose)
			}
			return err
		}
	default:
		folders := foldersOf(env)
		if err := drop(j.As); err != nil {
			return fmt.Errorf("become uid %d: %w", j.As.UID, err)
		}
		env = reachable(env, folders)
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil { // the keeper's
		return err
	}
	return syscall.Exec(j.Argv[0], j.Argv, env)
}

// drop makes the process another user's for good.
func drop(as *account.Account) error {
	err := errors.Join(syscall.Setgroups(as.Groups), syscall.Setresgid(as.GID, as.GID, as.GID), syscall.Setresuid(as.UID, as.UID, as.UID))
	if err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// foldersOf opens the folders of the files that env names.
func foldersOf(env []string) map[string]int {
	folders := map[string]int{}
	for _, e := range env {
		name, file, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, fileVariable) {
			continue
		}
		if fd, err := unix.Open(filepath.Dir(file), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			folders[name] = fd
		}
	}
	return folders
}

// reachable names files by their open folder if the user can't reach them by path, because a
// folder above the agent's is closed to it.
func reachable(env []string, folders map[string]int) []string {
	var out []string
	for _, e := range env {
		name, file, _ := strings.Cut(e, "=")
		if fd, ok := folders[name]; ok && unix.Access(file, unix.R_OK) != nil {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err == nil {
				e = fmt.Sprintf("%s=/proc/self/fd/%d/%s", name, fd, filepath.Base(file))
			}
		}
		out = append(out, e)
	}
	return out
}
