package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// brokerState makes a state folder with a store and keys, and returns the config's path.
func brokerState(t *testing.T) (config, state string) {
	t.Helper()
	dir := t.TempDir()
	state = filepath.Join(dir, "state")
	s := check.Must(storetest.Open(filepath.Join(state, "store.db")))(t)
	check.Nil(t, s.Close())
	for _, name := range []string{"host-ca.key", "audit.key", "key-password", "secret-id"} {
		check.Nil(t, os.WriteFile(filepath.Join(state, name), []byte(name), 0o600))
	}
	config = filepath.Join(dir, "broker.hcl")
	// The password by another path than the state folder's own.
	check.Nil(t, os.Symlink(state, filepath.Join(dir, "link")))
	check.Nil(t, os.WriteFile(config, []byte(`state_dir = "`+state+`"
key_password_file = "`+filepath.Join(dir, "link", "key-password")+`"
listen = "127.0.0.1:0"
trust_domain = "example.com"
names = ["broker.example.com"]
`), 0o600))
	return config, state
}

func backup(t *testing.T, config string, args ...string) (int, string) {
	t.Helper()
	var stderr strings.Builder
	code := run(context.Background(), append([]string{"broker", "backup", "-c", config}, args...), io.Discard, &stderr)
	return code, stderr.String()
}

// A backup has the store and the broker's keys, and no other secret.
func TestBackup(t *testing.T) {
	config, _ := brokerState(t)
	file := filepath.Join(t.TempDir(), "copy.db")
	if code, text := backup(t, config, "--keys", file); code != 0 {
		t.Fatal(text)
	}
	var names []string
	for _, e := range check.Must(os.ReadDir(file + ".keys"))(t) {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != "audit.key host-ca.key" {
		t.Errorf("keys: %q", names)
	}
	for _, f := range []string{file, file + ".keys/audit.key"} {
		if mode := check.Must(os.Stat(f))(t).Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o", f, mode)
		}
	}
	if left := check.Must(filepath.Glob(file + ".partial*"))(t); len(left) != 0 {
		t.Errorf("left: %q", left)
	}

	// Nothing is begun that can't be finished.
	check.Nil(t, os.Remove(file))
	if code, text := backup(t, config, "--keys", file); code == 0 || !strings.Contains(text, file+".keys exists") {
		t.Error(code, text)
	}
	if _, err := os.Lstat(file); err == nil {
		t.Error("a copy was made without its keys")
	}
}

func TestBackupRefuses(t *testing.T) {
	config, state := brokerState(t)
	dir := t.TempDir()
	check.Nil(t, os.Chmod(dir, 0o777))
	if code, text := backup(t, config, filepath.Join(dir, "copy.db")); code == 0 || !strings.Contains(text, "others can write to") {
		t.Errorf("a folder that others can write to: %d %s", code, text)
	}
	check.Nil(t, os.Chmod(dir, 0o755))
	check.Nil(t, os.Symlink("elsewhere", filepath.Join(dir, "link.db")))
	if code, text := backup(t, config, filepath.Join(dir, "link.db")); code == 0 || !strings.Contains(text, "never overwrites") {
		t.Errorf("a link: %d %s", code, text)
	}

	// While another one runs, its copy is left alone.
	lock := check.Must(os.Open(state))(t)
	defer func() { _ = lock.Close() }()
	check.Nil(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	partial := filepath.Join(dir, "copy.db.partial")
	check.Nil(t, os.WriteFile(partial, nil, 0o600))
	if code, text := backup(t, config, filepath.Join(dir, "copy.db")); code == 0 || !strings.Contains(text, "another backup") {
		t.Errorf("two at once: %d %s", code, text)
	}
	if _, err := os.Stat(partial); err != nil {
		t.Error(err)
	}
}

// A restore that fails leaves nothing in the way of the next one.
func TestRestoreLeavesNothing(t *testing.T) {
	config, state := brokerState(t)
	check.Nil(t, os.Remove(filepath.Join(state, "store.db")))
	bad := filepath.Join(t.TempDir(), "bad.db")
	check.Nil(t, os.WriteFile(bad, []byte(strings.Repeat("no database", 1000)), 0o600))
	for _, from := range []string{bad, t.TempDir()} { // the second can be opened, and not copied
		if code := run(context.Background(), []string{"broker", "restore", "-c", config, from}, io.Discard, io.Discard); code == 0 {
			t.Errorf("%s was restored", from)
		}
		if left := check.Must(filepath.Glob(filepath.Join(state, "store.db*")))(t); len(left) > 1 || len(left) == 1 && !strings.HasSuffix(left[0], ".lock") {
			t.Errorf("left: %q", left)
		}
	}
}
