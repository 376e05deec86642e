package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func boot(t *testing.T, binds ...string) *Systemd {
	t.Helper()
	started := time.Now()
	s, err := BootSystemd(within(t, time.Minute), t.TempDir(), binds...)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("up after %v", time.Since(started).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := s.Poweroff(within(t, time.Minute)); err != nil {
			t.Error(err)
		}
	})
	return s
}

// run runs a command that must succeed and returns its trimmed output.
func run(t *testing.T, s *Systemd, args ...string) string {
	t.Helper()
	out, err := s.Run(within(t, time.Minute), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// property returns one property of a unit, as its manager says it.
func property(t *testing.T, s *Systemd, unit, name string) string {
	t.Helper()
	return run(t, s, "systemctl", "show", "--value", "--property", name, unit)
}

func write(t *testing.T, s *Systemd, path, data string, mode os.FileMode) {
	t.Helper()
	if err := s.WriteFile(within(t, time.Minute), path, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatal("not seen: " + what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func TestSystemdUnit(t *testing.T) {
	shared := t.TempDir()
	s := boot(t, shared+":/shared")
	run(t, s, "useradd", "--system", "legacy")
	if passwd, err := os.ReadFile("/etc/passwd"); err != nil || strings.Contains(string(passwd), "\nlegacy:") {
		t.Errorf("a user added in the container is the machine's too (%v)", err)
	}
	write(t, s, "/etc/systemd/system/legacy.service", `[Service]
User=legacy
ExecStartPre=+/bin/sh -c 'id -u >/shared/pre; echo $INVOCATION_ID >>/shared/pre'
ExecStart=/bin/sleep infinity
`, 0o644)
	run(t, s, "systemctl", "daemon-reload")
	run(t, s, "systemctl", "start", "legacy")

	pid := property(t, s, "legacy", "MainPID")
	if exe := run(t, s, "readlink", "/proc/"+pid+"/exe"); exe != "/usr/bin/sleep" {
		t.Errorf("MainPID %s runs %s", pid, exe)
	}
	if owner := run(t, s, "stat", "-c", "%U", "/proc/"+pid); owner != "legacy" {
		t.Errorf("MainPID belongs to %s", owner)
	}
	first := property(t, s, "legacy", "InvocationID")
	pre, err := os.ReadFile(filepath.Join(shared, "pre"))
	if err != nil || string(pre) != "0\n"+first+"\n" {
		t.Errorf("ExecStartPre=+ wrote %q (%v), want uid 0 and %s", pre, err, first)
	}
	run(t, s, "systemctl", "restart", "legacy")
	if second := property(t, s, "legacy", "InvocationID"); len(second) != 32 || second == first {
		t.Errorf("InvocationID %s after a restart, %s before", second, first)
	}
}

// Directories and sockets of the machine can be had inside, under their own
// paths too, where the container mounts a file system of its own over /tmp.
func TestSystemdBinds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "tpm.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = conn.Close()
		}
		accepted <- err
	}()
	s := boot(t, socket)
	_, _ = s.Run(within(t, time.Minute), "busctl", "--address=unix:path="+socket, "list") // connects, then finds no bus there
	select {
	case err := <-accepted:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a program inside couldn't connect to the socket")
	}
}

func TestSystemdCgroupEvents(t *testing.T) {
	s := boot(t)
	run(t, s, "systemd-run", "--unit=job", "--remain-after-exit", "--property=Slice=lab.slice", "sleep", "infinity")
	events := "/sys/fs/cgroup" + property(t, s, "job", "ControlGroup") + "/cgroup.events"
	if got := run(t, s, "cat", events); !strings.Contains(got, "populated 1") {
		t.Errorf("%s of a running unit: %s", events, got)
	}
	// The manager removes the unit's cgroup once it is empty; its slice's stays.
	parent := filepath.Join(filepath.Dir(filepath.Dir(events)), "cgroup.events")
	run(t, s, "kill", property(t, s, "job", "MainPID"))
	eventually(t, "populated 0", func() bool { return strings.Contains(run(t, s, "cat", parent), "populated 0") })
}

func TestSystemdUserManager(t *testing.T) {
	s := boot(t)
	run(t, s, "useradd", "--create-home", "alice")
	run(t, s, "loginctl", "enable-linger", "alice")
	manager := "user@" + run(t, s, "id", "-u", "alice") + ".service"
	eventually(t, "a user manager", func() bool { return property(t, s, manager, "ActiveState") == "active" })
	run(t, s, "systemd-run", "--machine=alice@.host", "--user", "--unit=job", "sleep", "infinity")
	pid := run(t, s, "systemctl", "--machine=alice@.host", "--user", "show", "--value", "--property=MainPID", "job")
	want := manager + "/app.slice/job.service"
	if cgroup := run(t, s, "cat", "/proc/"+pid+"/cgroup"); !strings.Contains(cgroup, want) {
		t.Errorf("the unit's cgroup is %s, want %s", cgroup, want)
	}
}

func TestSystemdLeavesNothing(t *testing.T) {
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for range 2 {
		s, err := BootSystemd(within(t, time.Minute), dir)
		if err != nil {
			t.Fatal(err)
		}
		write(t, s, "/etc/countersign-lab", "inside", 0o600)
		if err := s.Poweroff(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(s.cgroup); !os.IsNotExist(err) {
			t.Errorf("its cgroup is still there: %v", err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.PID())); !os.IsNotExist(err) {
			t.Errorf("its init is still there: %v", err)
		}
		if _, err := os.Stat("/etc/countersign-lab"); !os.IsNotExist(err) {
			t.Errorf("a file written inside is on the machine: %v", err)
		}
	}
	after, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Errorf("mounts after:\n%s\nbefore:\n%s", after, before)
	}
}

func TestSystemdErrorsCarryStderr(t *testing.T) {
	s := boot(t)
	_, err := s.Run(context.Background(), "systemctl", "start", "absent.service")
	if err == nil || !strings.Contains(err.Error(), "Unit absent.service not found") {
		t.Errorf("starting a unit that isn't there: %v", err)
	}
}
