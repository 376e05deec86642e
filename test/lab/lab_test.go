package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// within returns a context for one part's start, well inside go test's own limit.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// victimDir, in the environment, makes the test binary the program that
// TestNothingOutlivesItsStarter kills.
const victimDir = "COUNTERSIGN_LAB_VICTIM"

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimDir); dir != "" {
		if err := beVictim(dir); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// started is what the victim says of itself.
type started struct {
	PIDs  []int
	Data  string // PostgreSQL's data directory
	Group string // the container's cgroup
}

func beVictim(dir string) error {
	ctx := context.Background()
	v, err := StartVault(ctx, filepath.Join(dir, "vault"))
	if err != nil {
		return err
	}
	pg, err := StartPostgres(ctx, filepath.Join(dir, "postgres"))
	if err != nil {
		return err
	}
	s, err := BootSystemd(ctx, filepath.Join(dir, "systemd"))
	if err != nil {
		return err
	}
	says := started{
		PIDs:  []int{v.process.cmd.Process.Pid, pg.process.cmd.Process.Pid, s.process.cmd.Process.Pid, s.PID()},
		Data:  pg.data,
		Group: s.cgroup,
	}
	if err := json.NewEncoder(os.Stdout).Encode(says); err != nil {
		return err
	}
	select {}
}

func TestNothingOutlivesItsStarter(t *testing.T) {
	victim := exec.Command(os.Args[0])
	victim.Env = append(os.Environ(), victimDir+"="+t.TempDir())
	victim.Stderr = os.Stderr
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	var parts started
	if err := errors.Join(err, json.Unmarshal(line, &parts)); err != nil {
		t.Fatal(err, victim.Wait())
	}
	t.Cleanup(func() { os.RemoveAll(parts.Data) })
	for _, pid := range parts.PIDs {
		if err := syscall.Kill(pid, 0); err != nil {
			t.Fatalf("%d doesn't run: %v", pid, err)
		}
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // says that it was killed
	for _, pid := range parts.PIDs {
		eventually(t, "the end of a part", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	}
	// The next boot removes the cgroup, which nobody could any more.
	if _, err := os.Stat(parts.Group); err != nil {
		t.Fatal(err)
	}
	boot(t)
	if _, err := os.Stat(parts.Group); !os.IsNotExist(err) {
		t.Errorf("the killed process's cgroup is still there: %v", err)
	}
}
