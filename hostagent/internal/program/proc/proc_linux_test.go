package proc

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/test/check"
)

// A pid file is its program's user's: whatever stands there is answered at once.
func TestPIDFile(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.pid")
	if err := os.WriteFile(good, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		put  func(path string) error
		want string
	}{
		"its pid":   {func(path string) error { return os.Link(good, path) }, ""},
		"FIFO":      {func(path string) error { return unix.Mkfifo(path, 0o644) }, "not a regular file"},
		"folder":    {func(path string) error { return os.Mkdir(path, 0o755) }, "not a regular file"},
		"symlink":   {func(path string) error { return os.Symlink(good, path) }, "is a symlink"},
		"long":      {func(path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o644) }, "holds no pid"},
		"empty":     {func(path string) error { return os.WriteFile(path, nil, 0o644) }, "is empty"},
		"not there": {func(string) error { return nil }, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			if err := tt.put(path); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { _, err := readPIDFile(path); done <- err }()
			select {
			case err := <-done:
				if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
			case <-time.After(10 * time.Second):
				t.Error("it is waited for")
			}
		})
	}
}

// nobody is a manager without services.
type nobody struct{}

func (nobody) Name(context.Context, *process.Program) error { return nil }

// Another user's process of the same exe takes nothing from the instance that
// has the credential, nor hides its end.
func TestACopyBesideTheHolder(t *testing.T) {
	check.Root(t)
	dir, err := os.MkdirTemp("", "finder-") // where others reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "billingd")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(exe, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	run := func(uid uint32) *exec.Cmd {
		cmd := exec.Command(exe, "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if err := cmd.Start(); err != nil { // it has exec'ed then
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	f, loose := New(nobody{}), config.Process{Exe: exe}
	holder := run(1)
	p, err := f.Find(t.Context(), loose, "")
	if err != nil || p.PID != holder.Process.Pid {
		t.Fatalf("alone: %d, %v", p.PID, err)
	}
	held := p.Instance().String()
	for range 2 {
		run(65534)
	}
	if _, err := f.Find(t.Context(), loose, ""); err == nil || errors.Is(err, program.ErrNotRunning) || !strings.Contains(err.Error(), "more than one process") {
		t.Errorf("nothing held: %v", err)
	}
	if _, err := f.Find(t.Context(), loose, "another-boot"+held[strings.Index(held, "/"):]); !errors.Is(err, program.ErrNotRunning) {
		t.Errorf("held since another boot: %v", err)
	}
	if p, err := f.Find(t.Context(), loose, held); err != nil || p.Instance().String() != held {
		t.Errorf("held: %d, %v", p.PID, err)
	}
	if p, err := f.Find(t.Context(), config.Process{Exe: exe, User: "daemon"}, ""); err != nil || p.PID != holder.Process.Pid {
		t.Errorf("by its user: %d, %v", p.PID, err)
	}
	_ = holder.Process.Kill()
	_ = holder.Wait()
	if _, err := f.Find(t.Context(), loose, held); !errors.Is(err, program.ErrNotRunning) {
		t.Errorf("the holder ended: %v", err)
	}
}
