package notify

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// onChange parses an on_change block.
func onChange(t *testing.T, text string) *config.OnChange {
	t.Helper()
	return credential(t, text, "/x").OnChange
}

// credential parses a credential's block.
func credential(t *testing.T, onChange string, files ...string) *config.Credential {
	t.Helper()
	a, err := config.Parse("test.hcl", []byte(configText(onChange, files...)))
	check.Nil(t, err)
	return a.Credentials[0]
}

// configText is a config of files, each a path and its attributes, separated by a space.
func configText(onChange string, files ...string) string {
	text := "broker {\n addresses = [\"https://b:1\"]\n ca_sha256 = \"" + strings.Repeat("0", 64) + "\"\n}\n" +
		"credential \"c\" {\n process { unit = \"x.service\" }\n on_change {\n" + onChange + "\n}\n"
	for _, f := range files {
		path, attributes, _ := strings.Cut(f, " ")
		text += fmt.Sprintf("file %q {\n template = \"\"\n %s\n}\n", path, attributes)
	}
	return text + "}\n"
}

func secrets(contents ...string) (out []secret.Bytes) {
	for _, c := range contents {
		out = append(out, secret.New([]byte(c)))
	}
	return out
}

// script writes an executable.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	check.Nil(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700))
	return path
}

func TestCheck(t *testing.T) {
	t.Setenv("AGENT_SECRET", "s3cret")
	contents := secrets("user=u-new password=s3cret", "user=u-new password=s3cret")
	two := []string{"/etc/a.conf", "/etc/b.conf"}
	ctx := context.Background()
	runDir := t.TempDir()
	try := func(onChange string) error { return Check(ctx, credential(t, onChange, two...), runDir, contents) }
	seen := filepath.Join(t.TempDir(), "seen")
	ok := script(t, `grep -q u-new "$COUNTERSIGN_FILE_0" && grep -q u-new "$COUNTERSIGN_FILE_1" || exit 9; for f in /proc/$$/fd/[3-9]; do test -e $f && exit 8; done; tr '\0' '\n' </proc/self/environ >`+seen+"; pwd >>"+seen)
	check.Nil(t, try(""))
	check.Nil(t, try("check = [\""+ok+"\"]"))
	b, err := os.ReadFile(seen)
	check.Nil(t, err)
	for line := range strings.Lines(string(b)) {
		name, _, _ := strings.Cut(line, "=")
		switch strings.TrimSpace(name) {
		case "PATH", "COUNTERSIGN_FILE_0", "COUNTERSIGN_FILE_1", "PWD", "OLDPWD", "_", "SHLVL", "/":
		default:
			t.Errorf("the check's environment has %s", line)
		}
	}
	if left := check.Must(os.ReadDir(filepath.Join(runDir, "check")))(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}

	bad := script(t, `cat "$COUNTERSIGN_FILE_0"; cat "$COUNTERSIGN_FILE_0" >&2; exit 3`)
	check.Silent(t, try("check = [\""+bad+"\"]"), "s3cret", bad, "exit status 3", "the old credential stays")
	missing := try(`check = ["/no/such/check"]`)
	check.Silent(t, missing, "s3cret", "check: exec /no/such/check: no such file", "the old credential stays")
	if !errors.Is(missing, os.ErrNotExist) {
		t.Errorf("%v", missing)
	}
	check.Nil(t, os.Chmod(bad, 0o600))
	check.Silent(t, try("check = [\""+bad+"\"]"), "s3cret", "exec "+bad+": permission denied")
}

// TestLimit: at the limit the command's whole group ends.
func TestLimit(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	check.Nil(t, unix.Mkfifo(pipe, 0o600))
	// The child of the child holds the pipe open for as long as it lives.
	hang := script(t, "(exec 3>"+pipe+"; echo here >&3; sleep 1000) & sleep 1000")
	held, err := os.OpenFile(pipe, os.O_RDONLY|unix.O_NONBLOCK, 0)
	check.Nil(t, err)
	defer func() { _ = held.Close() }()
	c := credential(t, "exec = [\""+hang+"\"]\ncheck = [\""+hang+"\"]\ntimeout = \"1s\"", "/x")
	o := c.OnChange
	for name, run := range map[string]func(context.Context) error{
		"check": func(ctx context.Context) error { return Check(ctx, c, t.TempDir(), secrets("")) },
		"exec":  func(ctx context.Context) error { return Notify(ctx, o, process.Program{}) },
	} {
		check.Silent(t, run(context.Background()), "s3cret", name, "not done after 1s", "timeout")
		if line, err := bufio.NewReader(held).ReadString('\n'); err != nil || line != "here\n" {
			t.Errorf("%s: the grandchild was not there: %q %v", name, line, err)
		}
		check.Nil(t, held.SetReadDeadline(time.Now().Add(10*time.Second)))
		if n, err := held.Read(make([]byte, 9)); n != 0 || err != io.EOF {
			t.Errorf("%s: the grandchild lives on: %d %v", name, n, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Check(ctx, c, t.TempDir(), secrets("")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestSignal(t *testing.T) {
	cmd := exec.Command("sh", "-c", `trap 'echo got; exit 0' USR1; echo ready; while :; do sleep 0.05; done`)
	out, err := cmd.StdoutPipe()
	check.Nil(t, err)
	check.Nil(t, cmd.Start())
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatal("the program didn't start")
	}
	p := process.Program{PID: cmd.Process.Pid}
	p.Start, err = startOf(p.PID)
	check.Nil(t, err)

	o := onChange(t, `signal = "SIGKILL"`)
	ctx := context.Background()
	other := p
	other.Start++
	if err := Notify(ctx, o, other); !errors.Is(err, ErrEnded) {
		t.Errorf("a reused pid: %v", err)
	}
	check.Silent(t, Notify(ctx, onChange(t, `signal = "HUP"`), p), "s3cret", `"HUP"`, "SIGHUP")
	check.Silent(t, Notify(ctx, o, process.Program{}), "s3cret", "no main process")
	check.Nil(t, Notify(ctx, nil, p), Notify(ctx, onChange(t, ""), p), Notify(ctx, onChange(t, `signal = "SIGUSR1"`), p))
	if !lines.Scan() || lines.Text() != "got" {
		t.Errorf("the program was not told: %q", lines.Text())
	}
	check.Nil(t, cmd.Wait())
	if err := Notify(ctx, o, p); !errors.Is(err, ErrEnded) {
		t.Errorf("an ended program: %v", err)
	}
}

// notifyChild is what the child of the tests below does: tell a unit.
func notifyChild() error {
	if os.Getenv("HIDE_RUN") != "" { // in a mount namespace of its own
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "")); err != nil {
			return err
		}
	}
	a, err := config.Parse("test.hcl", []byte(configText(os.Getenv("ON_CHANGE"), "/x")))
	if err != nil {
		return err
	}
	return Notify(context.Background(), a.Credentials[0].OnChange, process.Program{Linux: &process.Linux{Unit: os.Getenv("UNIT")}})
}

// TestNoManager: where there is no systemd the error says so, and nothing hangs.
func TestNoManager(t *testing.T) {
	exe, err := os.Executable()
	check.Nil(t, err)
	for _, what := range []string{"restart", "reload"} {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childMode+"=notify", "HIDE_RUN=1", "UNIT=x.service", "ON_CHANGE="+what+" = true")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), what+" x.service: no way to systemd") {
			t.Errorf("%s: %v: %s", what, err, out)
		}
		check.Silent(t, Notify(context.Background(), onChange(t, what+" = true"), process.Program{}), "s3cret", "not a unit's")
	}
}

// TestUnits restarts and reloads units of a real systemd.
func TestUnits(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	exe, err := os.Executable()
	check.Nil(t, err)
	b, err := os.ReadFile(exe)
	check.Nil(t, err)
	bin := t.TempDir()
	check.Nil(t, os.WriteFile(filepath.Join(bin, "deliver.test"), b, 0o700))
	s, err := lab.BootSystemd(ctx, t.TempDir(), bin+":/countersign-test")
	check.Nil(t, err)
	defer func() { check.Nil(t, s.Poweroff(ctx)) }()

	units := map[string]string{
		"good":  "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/touch /run/reloaded\n",
		"bad":   "[Service]\nType=oneshot\nExecStart=/bin/false\n",
		"slow":  "[Service]\nExecStartPre=/bin/sleep 60\nExecStart=/bin/sleep infinity\n",
		"plain": "[Service]\nExecStart=/bin/sleep infinity\n",
	}
	for name, text := range units {
		check.Nil(t, s.WriteFile(ctx, "/etc/systemd/system/"+name+".service", []byte(text), 0o644))
	}
	run := func(args ...string) string {
		out, err := s.Run(ctx, args...)
		check.Nil(t, err)
		return strings.TrimSpace(string(out))
	}
	run("systemctl", "daemon-reload")
	run("systemctl", "start", "good", "plain")
	invocation := func() string { return run("systemctl", "show", "--value", "--property", "InvocationID", "good") }
	tell := func(unit, text string) string {
		_, err := s.Run(ctx, "env", childMode+"=notify", "UNIT="+unit+".service", "ON_CHANGE="+text, "/countersign-test/deliver.test")
		if err == nil {
			return ""
		}
		return err.Error()
	}
	first := invocation()
	if got := tell("good", "reload = true"); got != "" || invocation() != first {
		t.Errorf("reload: %s", got)
	}
	run("test", "-e", "/run/reloaded")
	if got := tell("good", "restart = true"); got != "" || invocation() == first {
		t.Errorf("restart: %s", got)
	}
	for _, tt := range []struct{ unit, text, words string }{
		{"bad", "restart = true", `the job ended as "failed": see journalctl -u bad.service`},
		{"slow", "restart = true\n timeout = \"1s\"", "not done after 1s"},
		{"plain", "reload = true", "reload plain.service: Job type reload is not applicable"},
		{"absent", "restart = true", "Unit absent.service not found"},
	} {
		if got := tell(tt.unit, tt.text); !strings.Contains(got, tt.words) {
			t.Errorf("%s: %q does not say %q", tt.unit, got, tt.words)
		}
	}
}
