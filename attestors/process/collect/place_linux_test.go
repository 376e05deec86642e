package collect

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/test/check"
)

// A stage is a folder of root's with a program in it, and one of nobody's
// beside it.
type stage struct{ dir, exe, tmp string }

func newStage(t *testing.T) stage {
	t.Helper()
	dir, err := os.MkdirTemp("", "place-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := stage{dir: dir, exe: filepath.Join(dir, "bin", "billingd"), tmp: filepath.Join(dir, "tmp")}
	for _, one := range []string{dir, filepath.Dir(s.exe), s.tmp} {
		if err := errors.Join(os.MkdirAll(one, 0o755), os.Chmod(one, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(s.tmp, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	s.install(t)
	return s
}

// install puts the program in its place, as a package's new version.
func (s stage) install(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(s.exe+".new", b, 0o755), os.Rename(s.exe+".new", s.exe)); err != nil {
		t.Fatal(err)
	}
}

// play runs a shell script that starts the program, under how; EXE, DIR and TMP
// are the stage's. It answers the program's pid, once its path is as printed.
func (s stage) play(t *testing.T, how []string, script, printed string) int {
	t.Helper()
	args := append(how, "sh", "-ec", script)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "EXE="+s.exe, "DIR="+s.dir, "TMP="+s.tmp)
	var out strings.Builder
	cmd.Stderr = &out
	cmd.WaitDelay = time.Second
	stdin, err := cmd.StdinPipe() // its end ends the script
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 400 {
		if pid := s.find(printed); pid != 0 {
			t.Cleanup(func() {
				if p, err := os.FindProcess(pid); err == nil {
					_ = p.Kill()
				}
			})
			return pid
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("nothing runs as %s: %s", printed, out.String())
	return 0
}

func (s stage) find(printed string) int {
	all, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, link := range all {
		if exe, _ := os.Readlink(link); exe == printed {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(link)))
			return pid
		}
	}
	return 0
}

var (
	plain        = []string{"env"}
	asNobody     = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}
	nobodysUsers = append(asNobody, "unshare", "-Urm")
	ownMounts    = []string{"unshare", "-m"} // as the system manager does for PrivateTmp=
	ownUsers     = []string{"unshare", "-Ur"}
	ownBoth      = []string{"unshare", "-Urm"}
	ofUser       = append(ownMounts, asNobody...)
)

// A program whose file was replaced under it is still told by its path, in
// whichever namespaces the host's root put it.
func TestReplaced(t *testing.T) {
	check.Root(t)
	for name, tt := range map[string]struct {
		how    []string
		script string
	}{
		"plain":                       {plain, `exec "$EXE" 60`},
		"of a user":                   {asNobody, `exec "$EXE" 60`},
		"with mounts of its own":      {ownMounts, `mount -t tmpfs x "$TMP"; exec "$EXE" 60`},
		"and of a user":               {ofUser, `exec "$EXE" 60`},
		"with users of its own":       {ownUsers, `exec "$EXE" 60`},
		"beside mounts made later":    {plain, `"$EXE" 60 & sleep 0.2; exec unshare -m cat`},
		"in a folder that is a mount": {ownMounts, `mount --bind "$DIR/bin" "$DIR/bin"; exec "$EXE" 60`},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			pid := s.play(t, tt.how, tt.script, s.exe)
			if p, err := Process(pid); err != nil || p.Main().Path != s.exe {
				t.Fatalf("before: %s, %v", p.Main().Path, err)
			}
			s.install(t)
			if p, err := Process(pid); err != nil || p.Main().Path != s.exe {
				t.Errorf("after: %s, %v", p.Main().Path, err)
			}
		})
	}
}

// A file of somebody's own, whose mount is let go of once it runs.
const (
	own  = `mount -t tmpfs x "$TMP"; cd "$TMP"; mkdir -p "./$DIR/bin"; cp /bin/sleep "./$EXE"; `
	run  = `"./$EXE" 60 & while [ "$(readlink /proc/$!/exe)" = "$(readlink /proc/$$/exe)" ]; do sleep 0.01; done; umount -l "$TMP"; `
	gone = `rm "./$EXE"; cat`
)

// Nobody can have another program's path told for his own. Each of these runs a
// file that the kernel prints as the program's; the last is the program's, and
// can't be told from the others.
func TestForgedPath(t *testing.T) {
	check.Root(t)
	for name, tt := range map[string]struct {
		how     []string
		script  string
		deleted bool
		want    string
	}{
		"detached, in a user namespace":      {nobodysUsers, own + run + gone, true, "a user namespace of its own"},
		"detached and not removed":           {nobodysUsers, own + run + `cat`, false, "another file system than this host's"},
		"mounted over the folder":            {nobodysUsers, `mount -t tmpfs x "$DIR/bin"; cp /bin/sleep "$EXE"; "$EXE" 60 & sleep 0.2; rm "$EXE"; cat`, true, "a user namespace of its own"},
		"detached, in the host's namespaces": {plain, own + run + gone, true, "not, or no longer, at"},
		"detached, with mounts of its own":   {ownMounts, own + run + gone, true, "not, or no longer, at"},
		"root's container, over the folder":  {ownMounts, `mount -t tmpfs x "$DIR/bin"; cp /bin/sleep "$EXE"; "$EXE" 60 & sleep 0.2; rm "$EXE"; cat`, true, "another folder for the program"},
		"users of its own, copies of mounts": {ownBoth, `"$EXE" 60 & sleep 0.2; rm "$EXE"; cat`, true, "a user namespace of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			printed := s.exe
			if tt.deleted {
				printed += deleted
			}
			pid := s.play(t, tt.how, tt.script, printed)
			p, err := Process(pid)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("told as %s, %v; want %q", p.Main().Path, err, tt.want)
			}
			if pa := parent(pid); pa.Exe != "" {
				t.Errorf("a parent is told as %s", pa.Exe)
			}
		})
	}
}

// What stands at a path that a program chose is not opened.
func TestAPathIsNotOpened(t *testing.T) {
	check.Root(t)
	s := newStage(t)
	if err := errors.Join(os.Remove(s.exe), unix.Mkfifo(s.exe, 0o600)); err != nil {
		t.Fatal(err)
	}
	pid := s.play(t, nobodysUsers, own+run+`cat`, s.exe)
	done := make(chan error, 1)
	go func() { _, err := Process(pid); done <- err }()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "another file system than this host's") {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the agent waits for a FIFO's other end")
	}
}
