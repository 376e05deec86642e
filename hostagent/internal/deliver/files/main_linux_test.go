package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// Run with this set, the test binary is a test's child.
const childMode = "COUNTERSIGN_DELIVER_CHILD"

func TestMain(m *testing.M) {
	if mode := os.Getenv(childMode); mode != "" {
		child(mode)
		return
	}
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests change owners and mount file systems: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// child does what mode says, and dies at the n-th step.
func child(mode string) {
	do := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	n, err := strconv.Atoi(os.Getenv("DIE_AT"))
	do(err)
	step = func(name string) {
		fmt.Println(name)
		if n--; n == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
	}
	files, err := parseSet(os.Getenv("PATHS"))
	do(err)
	if mode == "recover" {
		_, _, err := New(files).Recover()
		do(err)
		return
	}
	s, err := New(files).Stage(fields("new"))
	do(err)
	do(s.Commit())
	fmt.Println("committed")
	if mode == "finish" {
		do(s.Finish())
	} else {
		do(s.Rollback())
	}
}

// parseSet makes a config of paths that are separated by colons.
func parseSet(paths string, attributes ...string) ([]*config.File, error) {
	var text strings.Builder
	text.WriteString("broker {\n addresses = [\"https://b:1\"]\n ca_sha256 = \"" + strings.Repeat("0", 64) + "\"\n}\n")
	text.WriteString("credential \"c\" {\n process { exe = \"/bin/true\" }\n")
	for p := range strings.SplitSeq(paths, ":") {
		fmt.Fprintf(&text, "file %q {\n template = \"user={{ .username }} password={{ .password }} in %s\\n\"\n %s\n}\n", p, filepath.Base(p), strings.Join(attributes, "\n"))
	}
	text.WriteString("}\n")
	a, err := config.Parse("test.hcl", []byte(text.String()))
	if err != nil {
		return nil, err
	}
	return a.Credentials[0].Files, nil
}

func set(t *testing.T, paths []string, attributes ...string) []*config.File {
	t.Helper()
	files, err := parseSet(strings.Join(paths, ":"), attributes...)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// fields are a credential of a generation, long enough that a partial write
// shows.
func fields(generation string) map[string]secret.Bytes {
	return map[string]secret.Bytes{
		"username": secret.New([]byte("u-" + generation)),
		"password": secret.New([]byte(password(generation))),
	}
}

func password(generation string) string { return strings.Repeat("s3cret-"+generation+"-", 1000) }

func content(path, generation string) string {
	return fmt.Sprintf("user=u-%s password=%s in %s\n", generation, password(generation), filepath.Base(path))
}

// must puts a whole generation in place.
func must(t *testing.T, files []*config.File, generation string) {
	t.Helper()
	s, err := New(files).Stage(fields(generation))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Discard()
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := s.Finish(); err != nil {
		t.Fatal(err)
	}
}

// stands wants the files to hold the generation, "" for none, and nothing to be
// beside them.
func stands(t *testing.T, files []*config.File, generation string) {
	t.Helper()
	for _, f := range files {
		b, err := os.ReadFile(f.Path)
		if generation == "" && !os.IsNotExist(err) || generation != "" && (err != nil || string(b) != content(f.Path, generation)) {
			t.Errorf("%s: want generation %q; %d bytes, %v", f.Path, generation, len(b), err)
		}
		left, err := filepath.Glob(filepath.Join(filepath.Dir(f.Path), ".*.countersign-*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left over: %v %v", left, err)
		}
	}
}
