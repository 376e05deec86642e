package notify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/rootonly"
	"github.com/countersign/countersign/internal/secret"
)

// commandPath is the PATH of commands, and with the names of a check's files all of
// their environment.
var commandPath = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// fileVariable is what the variables are called that name a check's files, less their number.
const fileVariable = "COUNTERSIGN_FILE_"

// environment is that of a command before its files. Root finds no program in a folder
// that others can write to.
func environment(as *account.Account) []string {
	var folders []string
	for _, dir := range commandPath {
		if as == nil || as.UID != 0 || rootonly.Alone(dir) == nil {
			folders = append(folders, dir)
		}
	}
	return []string{"PATH=" + strings.Join(folders, ":")}
}

// accountOf is whom a command runs as; nil where the agent isn't root.
func accountOf(user, group string) (*account.Account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	as, err := account.Of(user, group)
	return &as, err
}

// Check runs the config's check over copies of the new files, which it keeps below runDir
// for as long; no check is fine.
func Check(ctx context.Context, c *config.Credential, runDir string, contents []secret.Bytes) error {
	o := c.OnChange
	if o == nil || len(o.Check) == 0 {
		return nil
	}
	if err := try(ctx, c, runDir, contents); err != nil {
		return fmt.Errorf("check: %w; the old credential stays", err)
	}
	return nil
}

func try(ctx context.Context, c *config.Credential, runDir string, contents []secret.Bytes) (err error) {
	as, err := accountOf(c.CheckUser(), c.Files[0].Group)
	if err != nil {
		return fmt.Errorf("whom it runs as: %w", err)
	}
	reader := account.Account{UID: os.Geteuid(), GID: os.Getegid()}
	if as != nil {
		reader = *as
	}
	copied, err := copyFiles(runDir, c, reader, contents)
	if err != nil {
		return fmt.Errorf("copy the new files for it: %w", err)
	}
	defer func() { err = errors.Join(err, copied.remove()) }()

	env := environment(as)
	for i, path := range copied.paths {
		env = append(env, fmt.Sprintf("%s%d=%s", fileVariable, i, path))
	}
	if err := run(ctx, task{Argv: c.OnChange.Check, Limit: c.OnChange.Limit(), As: as}, env); err != nil {
		return err
	}
	return copied.unchanged(contents)
}

// Notify tells the program that its files are new, and waits until it is told:
// for a restart or a reload until the unit's job is done.
func Notify(ctx context.Context, o *config.OnChange, p process.Program) error {
	switch {
	case o == nil:
		return nil
	case o.Signal != "":
		return signal(o.Signal, p)
	case o.Restart, o.Reload:
		return job(ctx, o, p.Unit())
	case len(o.Exec) > 0:
		if err := execute(ctx, o); err != nil {
			return fmt.Errorf("exec: %w", err)
		}
	}
	return nil
}

// execute runs the config's exec. Only root's may leave a daemon behind: of another user's it would
// count as the agent's.
func execute(ctx context.Context, o *config.OnChange) error {
	as, err := accountOf(o.ExecUser(), o.ExecUser())
	if err != nil {
		return fmt.Errorf("whom it runs as: %w", err)
	}
	return run(ctx, task{Argv: o.Exec, Limit: o.Limit(), As: as, Daemons: as == nil || as.UID == 0}, environment(as))
}

// signal reaches the process that p describes, or none.
func signal(name string, p process.Program) error {
	number := unix.SignalNum(name)
	if number == 0 {
		return fmt.Errorf("signal: there is no %q; write it as SIGHUP", name)
	}
	if p.PID <= 0 {
		return fmt.Errorf("signal %s: the program has no main process", name)
	}
	// The descriptor first: if the process that it means began when p did, it
	// is p's, and can't become another one's.
	fd, err := unix.PidfdOpen(p.PID, 0)
	switch err {
	case nil:
		defer func() { _ = unix.Close(fd) }()
	case unix.ESRCH:
		return fmt.Errorf("signal %s: %w", name, ErrEnded)
	case unix.ENOSYS: // before Linux 5.3
		fd = -1
	default:
		return fmt.Errorf("signal %s: pid %d: %w", name, p.PID, err)
	}
	start, err := startOf(p.PID)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || err == nil && start != p.Start {
		return fmt.Errorf("signal %s: %w", name, ErrEnded)
	}
	if err != nil {
		return fmt.Errorf("signal %s: pid %d: %w", name, p.PID, err)
	}
	if fd >= 0 {
		err = unix.PidfdSendSignal(fd, number, nil, 0)
	} else {
		err = unix.Kill(p.PID, number)
	}
	if err == unix.ESRCH {
		err = ErrEnded
	}
	if err != nil {
		return fmt.Errorf("signal %s: pid %d: %w", name, p.PID, err)
	}
	return nil
}

// startOf is a process's start time, in clock ticks from boot.
func startOf(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The name may hold spaces and parentheses; after its last one stand fields
	// 3 and following.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, errors.New("stat of the process is cut short")
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// job restarts or reloads a unit.
func job(ctx context.Context, o *config.OnChange, unit string) error {
	what := "restart"
	if o.Reload {
		what = "reload"
	}
	if unit == "" {
		return fmt.Errorf("%s: the program is not a unit's", what)
	}
	ctx, cancel := context.WithTimeout(ctx, o.Limit())
	defer cancel()
	manager, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("%s %s: no way to systemd: %w", what, unit, err)
	}
	defer manager.Close()
	result := make(chan string, 1)
	if o.Reload {
		_, err = manager.ReloadUnitContext(ctx, unit, "replace", result)
	} else {
		_, err = manager.RestartUnitContext(ctx, unit, "replace", result)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, unit, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("%s %s: the job ended as %q: see journalctl -u %s", what, unit, r, unit)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %s: not done after %v; systemd goes on with it: %w", what, unit, o.Limit(), ctx.Err())
	}
}
