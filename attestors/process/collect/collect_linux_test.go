package collect

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/test/check"
)

// start runs a copy of sleep under another name.
func start(t *testing.T, edit func(*exec.Cmd)) (*exec.Cmd, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "collect-") // where others reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "sl (eep) Z 1")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "60")
	if edit != nil {
		edit(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 200 { // until it has exec'ed, and its loader is through
		link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
		maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", cmd.Process.Pid))
		if link == exe && strings.Contains(string(maps), "libc") {
			return cmd, exe
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("it doesn't run")
	return nil, ""
}

func TestProcess(t *testing.T) {
	check.Root(t)
	cmd, exe := start(t, func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{4, 24}}}
	})
	p, err := Process(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if p.Main().Path != exe || p.Main().SHA256 != evidence.Sum(b) {
		t.Errorf("exe %s %s, want %s", p.Main().Path, p.Main().SHA256, exe)
	}
	if p.User != "nobody" || p.Linux.UID != 65534 || p.Linux.GID != 65534 || !slices.Equal(p.Linux.Groups, []uint32{4, 24}) {
		t.Errorf("runs as %s %d %d %v", p.User, p.Linux.UID, p.Linux.GID, p.Linux.Groups)
	}
	if p.Parent == nil || p.Parent.PID != os.Getpid() || p.Parent.Exe == "" || p.Start == 0 {
		t.Errorf("parent %+v, start %d", p.Parent, p.Start)
	}
	if !slices.ContainsFunc(p.Mappings, func(m process.Mapping) bool { return strings.Contains(m.Path, "libc") }) {
		t.Errorf("no libc among %v", p.Mappings)
	}
	if _, err := p.Encode(); err != nil {
		t.Error(err)
	}
	// Replaced on disk: the digest is still of what runs.
	if err := os.Remove(exe); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, []byte("another"), 0o755); err != nil {
		t.Fatal(err)
	}
	again, err := Process(cmd.Process.Pid)
	if slices.ContainsFunc(again.Mappings, func(m process.Mapping) bool { return m.Path == exe }) {
		t.Error("the program's own file counts as a foreign mapping once it was replaced")
	}
	if err != nil || again.Main().SHA256 != p.Main().SHA256 || again.Main().Path != exe {
		t.Errorf("after it was replaced: %s %s, %v", again.Main().Path, again.Main().SHA256, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, err := Process(cmd.Process.Pid); !errors.Is(err, ErrGone) {
		t.Errorf("after its end: %v, want ErrGone", err)
	}
}

// A zombie holds its pid and nothing else.
func TestZombie(t *testing.T) {
	cmd, _ := start(t, nil)
	_ = cmd.Process.Kill()
	var err error
	for range 100 {
		if _, err = Process(cmd.Process.Pid); err != nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if !errors.Is(err, ErrGone) {
		t.Errorf("a zombie: %v, want ErrGone", err)
	}
}

// A program that root starts through a set-id file runs between identities.
func TestSetID(t *testing.T) {
	check.Root(t)
	cmd, exe := start(t, nil)
	_ = cmd.Process.Kill()
	if err := os.Chown(exe, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(exe, os.ModeSetuid|0o755); err != nil {
		t.Fatal(err)
	}
	setid := exec.Command(exe, "60")
	if err := setid.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = setid.Process.Kill(); _ = setid.Wait() })
	time.Sleep(100 * time.Millisecond)
	if _, err := Process(setid.Process.Pid); err == nil || !strings.Contains(err.Error(), "several identities") {
		t.Errorf("a set-id program: %v", err)
	}
}

// A program in a chroot is told by its path on this host, not by its own.
func TestChroot(t *testing.T) {
	check.Root(t)
	root := t.TempDir()
	for _, dir := range []string{"bin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", filepath.Join(root, "bin", "sleep"), ".")
	build.Dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(build.Dir, "main.go"), []byte("package main\nimport \"time\"\nfunc main() { time.Sleep(time.Minute) }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(build.Dir, "go.mod"), []byte("module x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.Command("/bin/sleep")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	time.Sleep(100 * time.Millisecond)
	if p, err := Process(cmd.Process.Pid); err != nil || p.Main().Path != filepath.Join(root, "bin", "sleep") {
		t.Errorf("a program in a chroot is told as %s, %v", p.Main().Path, err)
	}
}

func TestDigestFollowsTheContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, content := range []string{"first", "other"} { // of one length
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second from the cache
			_, sum, err := File(path)
			if err != nil || sum != sha256.Sum256([]byte(content)) {
				t.Errorf("%s: %s, %v", content, sum, err)
			}
		}
		time.Sleep(20 * time.Millisecond) // past the clock that ctime is read from
	}
	if _, _, err := File(t.TempDir()); err == nil {
		t.Error("a folder has a digest")
	}
}

// The size says it: nothing is read.
func TestAFileTooLarge(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(maxExe + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := digests.of(f); err == nil || !strings.Contains(err.Error(), "is larger than") {
		t.Error(err)
	}
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != 0 {
		t.Errorf("%d bytes were read, %v", at, err)
	}
}

func TestParseStat(t *testing.T) {
	rest := " 17 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 90210 0 0"
	if s, err := parseStat([]byte("4 (a) S 1 (b)" + " S" + rest)); err != nil || s.ppid != 17 || s.start != 90210 {
		t.Errorf("a name with brackets: %+v, %v", s, err)
	}
	if _, err := parseStat([]byte("4 (a) Z" + rest)); !errors.Is(err, ErrGone) {
		t.Errorf("a zombie: %v", err)
	}
	for _, bad := range []string{"", "4 a S", "4 (a) S 1 2", "4 (a) S x" + rest[3:]} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestParseMaps(t *testing.T) {
	maps := `55e0-55e1 r-xp 00000000 fe:00 1  /opt/app
55e1-55e2 rw-p 00000000 fe:00 1  /opt/app
7f00-7f01 r-xp 00000000 fe:00 2  /lib/libc.so.6
7f01-7f02 r-xp 00000000 fe:00 2  /lib/libc.so.6
7f02-7f03 r-xp 00000000 fe:00 3  /tmp/ev il\012.so (deleted)
7f03-7f04 rwxp 00000000 00:00 0
7f04-7f05 rwxp 00000000 00:00 0  [heap]
7f05-7f06 r-xp 00000000 fe:00 4  /opt/app (deleted)
7ffe-7fff r-xp 00000000 00:00 0  [vdso]
0040b000-00000000 r-xp 00000000 00:1a 5  /x
`
	got, err := parseMaps([]byte(strings.ReplaceAll(maps, "00:00 0\n", "00:00 0 \n")))
	if err != nil {
		t.Fatal(err)
	}
	want := []region{
		{"55e0-55e1", "/opt/app", false, "fe:00", 1}, {"7f00-7f01", "/lib/libc.so.6", false, "fe:00", 2}, {"7f01-7f02", "/lib/libc.so.6", false, "fe:00", 2},
		{"7f02-7f03", `/tmp/ev il\012.so`, true, "fe:00", 3}, {span: "7f03-7f04"}, {span: "7f04-7f05"}, {"7f05-7f06", "/opt/app", true, "fe:00", 4}, {"40b000-0", "/x", false, "00:1a", 5},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func FuzzParseMaps(f *testing.F) {
	f.Add([]byte("7f00-7f01 r-xp 00000000 fe:00 2  /lib/libc.so.6\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseMaps(b) })
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("4 (a) S 17 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 90210 0 0"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStat(b) })
}
