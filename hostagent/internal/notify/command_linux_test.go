package notify

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/test/check"
)

// public is a folder of root's that everybody may look into, as no test's own is.
func public(t *testing.T) string {
	t.Helper()
	check.Root(t)
	dir := check.Must(os.MkdirTemp("", "notify"))(t)
	t.Cleanup(func() { check.Nil(t, os.RemoveAll(dir)) })
	check.Nil(t, os.Chmod(dir, 0o755))
	return dir
}

func nobody(t *testing.T) account.Account {
	t.Helper()
	return check.Must(account.Of("nobody", "nobody"))(t)
}

func give(t *testing.T, path string) {
	t.Helper()
	check.Nil(t, os.Chown(path, nobody(t).UID, nobody(t).GID))
}

// program writes an executable of root's.
func program(t *testing.T, path, text string) string {
	t.Helper()
	check.Nil(t, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text+"\n"), 0o755))
	return path
}

// A check of a user's files runs as the user, over a copy that has the file's name and
// what stands beside it, and that the user can't exchange.
func TestCheckAsOwner(t *testing.T) {
	dir := public(t)
	home := filepath.Join(dir, "home")
	check.Nil(t, os.Mkdir(home, 0o700), os.WriteFile(filepath.Join(home, "beside.sh"), []byte("included=yes\n"), 0o644))
	give(t, home)
	give(t, filepath.Join(home, "beside.sh"))
	for name, runDir := range map[string]string{"reachable": filepath.Join(dir, "run"), "in a closed folder": filepath.Join(t.TempDir(), "run")} {
		seen := filepath.Join(home, "seen")
		honest := program(t, filepath.Join(dir, "bin", "check"), `#!/bin/sh -eu
. "$COUNTERSIGN_FILE_0"
. "${COUNTERSIGN_FILE_0%/*}/beside.sh"
{ id -u; id -G; echo "${COUNTERSIGN_FILE_0##*/} $generation $included"; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; } >`+seen)
		c := credential(t, fmt.Sprintf("check = [%q]", honest), filepath.Join(home, "db.sh")+" owner = \"nobody\"")
		check.Nil(t, os.MkdirAll(runDir, 0o711), Check(t.Context(), c, runDir, secrets("generation=new\n")))
		b := check.Must(os.ReadFile(seen))(t)
		n := nobody(t)
		want := fmt.Sprintf("%d\n%d\ndb.sh new yes\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n", n.UID, n.GID)
		if string(b) != want {
			t.Errorf("%s: %q, want %q", name, b, want)
		}

		attack := program(t, filepath.Join(dir, "bin", "attack"), `#!/bin/sh
f=$COUNTERSIGN_FILE_0
d=${f%/*}
mv "$f" "$d/moved" && exit 1
rm -f "$f" && exit 2
ln -sf /etc/shadow "$f" && exit 3
mv "$d" "$d-moved" && exit 4
touch "$d/new" && exit 5
exit 0`)
		c = credential(t, fmt.Sprintf("check = [%q]", attack), filepath.Join(home, "db.sh")+" owner = \"nobody\"")
		if err := Check(t.Context(), c, runDir, secrets("generation=new\n")); err != nil {
			t.Errorf("%s: the user can exchange the copy: %v", name, err)
		}
	}
}

// A check that says yes to something else than what is delivered doesn't count.
func TestACopyThatIsChanged(t *testing.T) {
	dir := public(t)
	check.Nil(t, os.Mkdir(dir+"/shared", 0o777), os.Chmod(dir+"/shared", 0o777))
	for text, says := range map[string]string{
		`grep -q new "$COUNTERSIGN_FILE_0"`:                                    "",
		`chmod u+w "$COUNTERSIGN_FILE_0" && echo other >"$COUNTERSIGN_FILE_0"`: "was changed while it was checked",
		`chmod u+w "$COUNTERSIGN_FILE_0" && echo more >>"$COUNTERSIGN_FILE_0"`: "was changed while it was checked",
		`chmod u+w "$COUNTERSIGN_FILE_0" && : >"$COUNTERSIGN_FILE_0"`:          "was changed while it was checked",
		`ln "$COUNTERSIGN_FILE_0" ` + dir + `/shared/second`:                   "",
	} {
		c := credential(t, fmt.Sprintf("check = [%q]", program(t, dir+"/check", "#!/bin/sh\n"+text)), "/etc/x owner = \"nobody\"")
		err := Check(t.Context(), c, filepath.Join(dir, "run"), secrets("a new one\n"))
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", text, err, says)
		}
	}
	if b, err := os.ReadFile(dir + "/shared/second"); err != nil || len(b) > 0 {
		t.Errorf("a second name keeps %q, %v", b, err)
	}
}

// As root runs what root alone can change, both when the config is read and when it
// runs; with a user, anything does.
func TestRootRunsRootsAlone(t *testing.T) {
	dir := public(t)
	ran := filepath.Join(dir, "ran")
	check.Nil(t, os.Mkdir(ran, 0o777), os.Chmod(ran, 0o777))
	mark := "id -u >" + ran + "/mark"
	bin := filepath.Join(dir, "bin")
	mode := func(path string, mode os.FileMode) func(*testing.T) {
		return func(t *testing.T) { check.Nil(t, os.Chmod(path, mode)) }
	}
	owner := func(path string) func(*testing.T) { return func(t *testing.T) { give(t, path) } }

	for name, tt := range map[string]struct {
		argv  []string
		make  func(*testing.T)
		loose func(*testing.T)
	}{
		"its file's owner":   {argv: []string{bin + "/a"}, loose: owner(bin + "/a")},
		"its folder's owner": {argv: []string{bin + "/a"}, loose: owner(bin)},
		"a folder's group":   {argv: []string{bin + "/a"}, loose: mode(bin, 0o775)},
		"everybody's folder": {argv: []string{bin + "/a"}, loose: mode(bin, 0o777)},
		"a sticky folder":    {argv: []string{bin + "/a"}, loose: mode(bin, 0o777|os.ModeSticky)},
		"its group":          {argv: []string{bin + "/a"}, loose: mode(bin+"/a", 0o775)},
		"an ACL":             {argv: []string{bin + "/a"}, loose: func(t *testing.T) { allow(t, bin+"/a") }},
		"a folder's ACL":     {argv: []string{bin + "/a"}, loose: func(t *testing.T) { allow(t, bin) }},
		"a symlink":          {argv: []string{dir + "/link"}, make: func(t *testing.T) { check.Nil(t, os.Symlink(bin+"/a", dir+"/link")) }, loose: owner(bin)},
		"a symlink with ..": {argv: []string{dir + "/other/link"}, make: func(t *testing.T) {
			check.Nil(t, os.Mkdir(dir+"/other", 0o755), os.Symlink("../bin/./a", dir+"/other/link"))
		}, loose: owner(bin)},
		"a folder of a symlink":     {argv: []string{dir + "/other/a"}, make: func(t *testing.T) { check.Nil(t, os.Mkdir(dir+"/other", 0o755), os.Symlink(bin+"/a", dir+"/other/a")) }, loose: owner(dir + "/other")},
		"a script's interpreter":    {argv: []string{dir + "/s"}, make: func(t *testing.T) { program(t, dir+"/s", "#!"+bin+"/a") }, loose: owner(bin + "/a")},
		"an interpreter's argument": {argv: []string{dir + "/s"}, make: func(t *testing.T) { program(t, dir+"/s", "#!/usr/bin/env "+bin+"/a") }, loose: owner(bin)},
		"a script of sh":            {argv: []string{"/bin/sh", bin + "/a"}, loose: owner(bin + "/a")},
		"a script of sh -c":         {argv: []string{"/bin/sh", "-c", "true; . '" + bin + "/a'"}, loose: owner(bin)},
		"a name with a space":       {argv: []string{"/bin/sh", dir + "/my scripts/a"}, make: func(t *testing.T) { program(t, dir+"/my scripts/a", "#!/bin/sh\n"+mark) }, loose: owner(dir + "/my scripts")},
		"an option's":               {argv: []string{"/usr/bin/env", "--chdir=/", "X=" + bin, bin + "/a"}, loose: owner(bin)},
		"a name from /":             {argv: []string{"/bin/sh", strings.TrimPrefix(bin, "/") + "/a"}, loose: owner(bin)},
	} {
		t.Run(name, func(t *testing.T) {
			program(t, bin+"/a", "#!/bin/sh\n"+mark)
			defer func() {
				check.Nil(t, os.RemoveAll(bin), os.RemoveAll(dir+"/other"), os.RemoveAll(dir+"/link"), os.RemoveAll(dir+"/my scripts"), os.RemoveAll(dir+"/s"))
			}()
			if tt.make != nil {
				tt.make(t)
			}
			var quoted []string
			for _, a := range tt.argv {
				quoted = append(quoted, strconv.Quote(a))
			}
			command := strings.Join(quoted, ", ")
			text := "exec = [" + command + "]\ncheck = [" + command + "]"
			c := credential(t, text, "/x")
			try := func(c *config.Credential) map[string]error {
				return map[string]error{"exec": Notify(t.Context(), c.OnChange, process.Program{}), "check": Check(t.Context(), c, t.TempDir(), secrets(""))}
			}
			for what, err := range try(c) {
				if b, _ := os.ReadFile(ran + "/mark"); err != nil || string(b) != "0\n" {
					t.Fatalf("%s: the honest command: %q %v", what, b, err)
				}
			}
			check.Nil(t, os.Remove(ran+"/mark"))

			tt.loose(t)
			for what, err := range try(c) {
				check.Silent(t, err, "s3cret", what, "would run as root", "set user")
			}
			if _, err := os.Stat(ran + "/mark"); err == nil {
				t.Error("it ran")
			}
			_, err := config.Parse("x.hcl", []byte(configText(text, "/x")))
			check.Silent(t, err, "s3cret", "x.hcl:5", "exec would run as root", "check would run as root", "set user")

			for what, err := range try(credential(t, text+"\nuser = \"nobody\"", "/x")) {
				if b, _ := os.ReadFile(ran + "/mark"); err != nil || string(b) != fmt.Sprintf("%d\n", nobody(t).UID) {
					t.Errorf("%s as a user: %q %v", what, b, err)
				}
			}
			check.Nil(t, os.Remove(ran+"/mark"))
		})
	}
}

// A name that isn't there yet can be made by whoever may make it.
func TestRootNamesNothingThatOthersMake(t *testing.T) {
	dir := public(t)
	shared := filepath.Join(dir, "shared")
	check.Nil(t, os.Mkdir(shared, 0o777), os.Chmod(shared, 0o777|os.ModeSticky), os.Mkdir(filepath.Join(shared, "roots"), 0o755))
	for path, says := range map[string]string{
		dir + "/later":              "",
		shared + "/roots/later":     "",
		shared + "/later":           "not there, in a folder in which everybody may make it",
		shared + "/later/on/or/not": "not there, in a folder in which everybody may make it",
	} {
		_, err := config.Parse("x.hcl", []byte(configText(fmt.Sprintf("exec = [\"/usr/bin/touch\", %q]", path), "/x")))
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
		_, err = config.Parse("x.hcl", []byte(configText(fmt.Sprintf("exec = [%q]", path), "/x")))
		if (err == nil) != (says == "") {
			t.Errorf("%s as the program: %v", path, err)
		}
	}
}

// A check of root's sees nothing beside the copy that others can change.
func TestRootsCheckIncludesRootsAlone(t *testing.T) {
	dir := public(t)
	conf := filepath.Join(dir, "conf")
	check.Nil(t, os.Mkdir(conf, 0o755), os.WriteFile(conf+"/roots", nil, 0o644), os.WriteFile(conf+"/users", nil, 0o644), os.Symlink("users", conf+"/link"))
	give(t, conf+"/users")
	look := program(t, dir+"/look", "#!/bin/sh\nls \"${COUNTERSIGN_FILE_0%/*}\" >"+dir+"/seen")
	check.Nil(t, Check(t.Context(), credential(t, fmt.Sprintf("check = [%q]", look), conf+"/db"), filepath.Join(dir, "run"), secrets("x")))
	if b := check.Must(os.ReadFile(dir + "/seen"))(t); string(b) != "db\nroots\n" {
		t.Errorf("%q", b)
	}
	give(t, conf)
	check.Nil(t, Check(t.Context(), credential(t, fmt.Sprintf("check = [%q]", look), conf+"/db"), filepath.Join(dir, "run"), secrets("x")))
	if b := check.Must(os.ReadFile(dir + "/seen"))(t); string(b) != "db\n" {
		t.Errorf("in a user's folder: %q", b)
	}
}

// allow lets nobody write to a file by an ACL.
func allow(t *testing.T, path string) {
	t.Helper()
	const version, userObj, user, groupObj, mask, other, none = 2, 1, 2, 4, 0x10, 0x20, 0xffffffff
	acl := binary.LittleEndian.AppendUint32(nil, version)
	for _, e := range []struct {
		tag, right uint16
		id         uint32
	}{{userObj, 7, none}, {user, 7, uint32(nobody(t).UID)}, {groupObj, 5, none}, {mask, 7, none}, {other, 5, none}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.right)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	check.Nil(t, unix.Setxattr(path, "system.posix_acl_access", acl, 0))
}

// What a command of a user starts ends with it, wherever it hides; a daemon of root's lives on.
func TestNothingStaysBehind(t *testing.T) {
	dir := public(t)
	check.Nil(t, os.Chmod(dir, 0o755))
	shared := filepath.Join(dir, "shared")
	check.Nil(t, os.Mkdir(shared, 0o777), os.Chmod(shared, 0o777))
	daemon := program(t, dir+"/daemon", "#!/bin/sh\nsetsid sh -c 'echo $$ >"+shared+"/pid; exec sleep 1000' &\nwhile ! test -s "+shared+"/pid; do sleep 0.01; done")
	text := fmt.Sprintf("exec = [%q]\ncheck = [%q]\n", daemon, daemon)
	for name, tt := range map[string]struct {
		run   func(context.Context) error
		lives bool
	}{
		"root's exec": {func(ctx context.Context) error { return Notify(ctx, onChange(t, text), process.Program{}) }, true},
		"root's check": {func(ctx context.Context) error {
			return Check(ctx, credential(t, text, "/x"), t.TempDir(), secrets(""))
		}, false},
		"a user's exec": {func(ctx context.Context) error {
			return Notify(ctx, onChange(t, text+"user = \"nobody\""), process.Program{})
		}, false},
		"a user's check": {func(ctx context.Context) error {
			return Check(ctx, credential(t, text, "/x owner = \"nobody\""), t.TempDir(), secrets(""))
		}, false},
	} {
		check.Nil(t, tt.run(t.Context()))
		b := check.Must(os.ReadFile(shared + "/pid"))(t)
		pid := check.Must(strconv.Atoi(strings.TrimSpace(string(b))))(t)
		err := unix.Kill(pid, 0)
		if tt.lives != (err == nil) {
			t.Errorf("%s: its daemon: %v", name, err)
		}
		if err == nil {
			check.Nil(t, unix.Kill(pid, unix.SIGKILL))
		}
		check.Nil(t, os.Remove(shared+"/pid"))
	}
}

// A command ends when its agent is killed.
func TestEndsWithTheAgent(t *testing.T) {
	dir := public(t)
	pipe := filepath.Join(dir, "pipe")
	check.Nil(t, unix.Mkfifo(pipe, 0o600))
	hang := program(t, dir+"/hang", "#!/bin/sh\nexec 3>"+pipe+"; echo here >&3; (setsid sleep 1000) & sleep 1000")
	held := check.Must(os.OpenFile(pipe, os.O_RDONLY|unix.O_NONBLOCK, 0))(t)
	defer func() { _ = held.Close() }()

	exe := check.Must(os.Executable())(t)
	agent := exec.Command(exe)
	agent.Env = append(os.Environ(), childMode+"=notify", fmt.Sprintf("ON_CHANGE=exec = [%q]", hang))
	check.Nil(t, agent.Start())
	check.Nil(t, held.SetReadDeadline(time.Now().Add(20*time.Second)))
	b := make([]byte, 16)
	check.Eventually(t, 20*time.Second, "the command runs", func() (bool, string) {
		n, err := held.Read(b)
		return n > 0, fmt.Sprint(err)
	})
	check.Nil(t, agent.Process.Kill())
	_ = agent.Wait()
	if n, err := held.Read(b); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the command lives on: %d %v", n, err)
	}
}
