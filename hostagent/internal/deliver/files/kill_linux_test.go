package files

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/test/check"
)

// run has a child do what mode says and die at the n-th step. It returns the
// steps that the child reached; dead is false where it came to its end.
func run(t *testing.T, mode string, n int, files []*config.File) (steps []string, dead bool) {
	t.Helper()
	var paths []string
	for _, f := range files {
		paths = append(paths, f.Path)
	}
	exe, err := os.Executable()
	check.Nil(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", childMode+"="+mode, "DIE_AT="+strconv.Itoa(n), "PATHS="+strings.Join(paths, ":"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return strings.Fields(strings.ReplaceAll(string(out), " ", ":")), true
	}
	check.Nil(t, err)
	return nil, false
}

// TestKill kills a delivery of three files, one of which is new, at every step,
// and then its recovery at every step.
func TestKill(t *testing.T) {
	every := 1
	if testing.Short() {
		every = 4
	}
	for _, mode := range []string{"finish", "rollback"} {
		for n := 1; ; n += every {
			var dead bool
			t.Run(fmt.Sprintf("%s/%d", mode, n), func(t *testing.T) {
				dead = killAt(t, mode, n, 0)
			})
			if !dead || t.Failed() {
				break
			}
			for m := 1 + n%5; dead && m <= 2*n; m += 5 {
				t.Run(fmt.Sprintf("%s/%d/%d", mode, n, m), func(t *testing.T) { killAt(t, mode, n, m) })
			}
		}
	}
}

// killAt kills at step n, and unless m is 0 the first recovery at its step m.
func killAt(t *testing.T, mode string, n, m int) bool {
	top := mount(t, "") // in memory, for the many rounds
	var paths []string
	for _, dir := range []string{"z", "y", "x"} { // swapped in the other order
		check.Nil(t, os.Mkdir(filepath.Join(top, dir), 0o755))
		paths = append(paths, filepath.Join(top, dir, dir))
	}
	files := set(t, paths)
	old, fresh := []*config.File{files[0], files[2]}, files[1:2]
	must(t, old, "old")

	steps, dead := run(t, mode, n, files)
	if !dead {
		if n < 20 {
			t.Errorf("only %d steps", n)
		}
		return false
	}
	last := steps[len(steps)-1]
	for _, f := range files {
		b, err := os.ReadFile(f.Path)
		if string(b) != content(f.Path, "old") && string(b) != content(f.Path, "new") && !(f == fresh[0] && os.IsNotExist(err)) {
			t.Errorf("at %s: %s has neither the old nor the new content", last, f.Path)
		}
	}
	if m > 0 {
		if _, again := run(t, "recover", m, files); !again {
			return true // recovery has fewer steps
		}
	}
	s, committed, err := New(files).Recover()
	if err != nil {
		t.Fatalf("at %s: %v", last, err)
	}
	was := slices.Index(steps, "committed")
	began := was >= 0 && was < len(steps)-1 // to finish, or to roll back
	switch {
	case committed:
		if was < 0 && last != "rename-sync:z" && last != "rename:z" {
			t.Errorf("at %s: taken for committed", last)
		}
		if began && mode == "rollback" && last != "clear:.z.countersign-old" && !strings.HasPrefix(last, "restore") {
			t.Errorf("at %s of a rollback: taken for committed", last)
		}
		if n%2 == 0 && !began {
			check.Nil(t, s.Rollback())
			stands(t, old, "old")
			stands(t, fresh, "")
			return true
		}
		check.Nil(t, s.Finish())
		stands(t, files, "new")
	default:
		if began && mode == "finish" {
			if m == 0 && !strings.HasPrefix(last, "clear:.z.") {
				t.Errorf("at %s of a finish: taken for not committed", last)
			}
			stands(t, files, "new") // it was over
			return true
		}
		stands(t, old, "old")
		stands(t, fresh, "")
	}
	s.Discard()
	return true
}
