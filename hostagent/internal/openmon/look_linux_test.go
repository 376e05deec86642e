package openmon

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/test/check"
)

// openerEnv has the test's own program be one whose first thread ends, and that
// opens a file by another.
const openerEnv = "WITNESS_TEST_OPENS"

func TestMain(m *testing.M) {
	path := os.Getenv(openerEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread()
	go func() {
		runtime.LockOSThread()
		time.Sleep(100 * time.Millisecond)
		b, err := os.ReadFile(path)
		if err != nil {
			fmt.Println(err)
		}
		_, _ = os.Stdout.Write(b)
		os.Exit(0)
	}()
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // this thread alone
}

// A process whose first thread ended shows no executable; the thread that opens
// does.
func TestWithoutItsFirstThread(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	self := check.Must(os.ReadFile(check.Must(os.Executable())(t)))(t)
	opener := b.dir + "/opener"
	check.Nil(t, os.WriteFile(opener, self, 0o755))
	if got := b.orphan(t, openerEnv+"="+b.file+" "+opener); got != "s3cret" {
		t.Errorf("it read %q", got)
	}
	if o := b.seen(t, opener); o.User != "root" || o.PID <= 1 {
		t.Errorf("%+v", o)
	}
}

func TestLook(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "60")
	check.Nil(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	v := look(cmd.Process.Pid)
	if v.pid != cmd.Process.Pid || v.uid != os.Geteuid() || !strings.HasSuffix(v.exe, "/sleep") || len(v.line) < 2 ||
		v.line[0] != (relative{v.pid, v.exe}) || v.line[1] != (relative{os.Getpid(), check.Must(os.Executable())(t)}) {
		t.Errorf("%+v", v)
	}
	for _, none := range []int{0, -1, 1 << 30} {
		if v := look(none); v.pid != 0 || v.uid != -1 || v.exe != "" || v.unit != "" || len(v.line) != 0 {
			t.Errorf("%d: %+v", none, v)
		}
	}
}

func TestIdentity(t *testing.T) {
	for in, want := range map[string][2]int{
		"Name:\tcat\nTgid:\t12\nPid:\t13\nUid:\t1\t2\t3\t4\n":   {12, 4},
		"Name:\tUid:\\nTgid:\t9\nTgid:\t12\nUid:\t0\t0\t0\t0\n": {12, 0},
		"Tgid:\t12\nUid:\t1\t2\n":                               {12, -1},
		"Tgid:\tx\nUid:\t1\t2\t3\t-4\n":                         {0, -1},
		"":                                                      {0, -1},
	} {
		if pid, uid := identity(in); [2]int{pid, uid} != want {
			t.Errorf("%q: %d, %d", in, pid, uid)
		}
	}
}

func TestCgroup(t *testing.T) {
	for in, want := range map[string]string{
		"0::/system.slice/a.service\n":                                              "/system.slice/a.service",
		"9:name=systemd:/system.slice/a.service\n1:cpu:/x\n0::/\n":                  "/system.slice/a.service",
		"9:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n":      "/system.slice/b.service",
		"12:cpu:/:name=systemd:/system.slice/a.service\n0::/system.slice/b.service": "/system.slice/b.service",
		"0::/\n": "", "": "",
	} {
		if got := cgroup(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
