package openmon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/notify"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
)

// A bench is a watch over the file of one credential, and openers that don't
// descend from it.
type bench struct {
	dir, file string
	held      struct {
		sync.Mutex
		lease   string
		program *process.Program
	}
	mu    sync.Mutex
	opens []attest.FileOpen
	end   func()
}

func start(t *testing.T, p config.Process) *bench {
	t.Helper()
	check.Nil(t, Available())
	dir, err := os.MkdirTemp("", "witness-") // where others reach it
	check.Nil(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	check.Nil(t, os.Chmod(dir, 0o755))
	b := &bench{dir: dir, file: filepath.Join(dir, "credential")}
	b.write(t, b.file)
	b.held.lease = "lease-1"
	c := Credential{Config: &config.Credential{Name: "billing-db", Process: p, Files: []*config.File{{Path: b.file, Owner: "root"}}}, Held: func() (string, *process.Program) {
		b.held.Lock()
		defer b.held.Unlock()
		return b.held.lease, b.held.program
	}}
	ctx, cancel := context.WithCancel(t.Context())
	l := newQueue(slog.New(slog.DiscardHandler), time.Now)
	ended := make(chan error, 1)
	go func() {
		ended <- watch(ctx, Options{Credentials: []Credential{c}, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: time.Now}, l)
	}()
	b.end = sync.OnceFunc(func() { cancel(); check.Nil(t, <-ended) })
	t.Cleanup(b.end)
	go func() { // in the broker's place, without its pace
		for {
			select {
			case <-ctx.Done():
				return
			case <-l.wake:
			}
			for batch := l.next(); len(batch) > 0; batch = l.next() {
				b.mu.Lock()
				for _, s := range batch {
					s.open.User = userName(s.kind.uid)
					b.opens = append(b.opens, s.open)
				}
				b.mu.Unlock()
				l.settle(batch, true)
			}
		}
	}()
	time.Sleep(2 * markEvery)
	return b
}

func (b *bench) write(t *testing.T, path string) {
	t.Helper()
	check.Nil(t, os.WriteFile(path, []byte("s3cret"), 0o644))
}

// seen waits for the open of an exe.
func (b *bench) seen(t *testing.T, exe string) (found attest.FileOpen) {
	t.Helper()
	check.Eventually(t, 5*time.Second, exe+" is seen", func() (bool, string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, o := range b.opens {
			if o.Exe == exe {
				found = o
				return true, ""
			}
		}
		return false, "not among those seen"
	})
	return found
}

// only says that just those exes were seen. A foreign open that comes last
// shows that what came before it was dealt with.
func (b *bench) only(t *testing.T, exes ...string) {
	t.Helper()
	last := b.copyOf(t, "/bin/cat", "the-last")
	b.orphan(t, last+" "+b.file)
	b.seen(t, last)
	b.mu.Lock()
	defer b.mu.Unlock()
	want := map[string]bool{last: true}
	for _, e := range exes {
		want[e] = true
	}
	for _, o := range b.opens {
		if !want[o.Exe] {
			t.Errorf("seen: %+v", o)
		}
	}
	if len(b.opens) != len(want) {
		t.Errorf("seen: %+v", b.opens)
	}
}

func (b *bench) copyOf(t *testing.T, program, name string) string {
	t.Helper()
	text := check.Must(os.ReadFile(program))(t)
	path := filepath.Join(b.dir, name)
	check.Nil(t, os.WriteFile(path, text, 0o755))
	return path
}

// orphan runs a shell's command that doesn't descend from the test: its parent
// ends first. It waits for it and returns what it printed.
func (b *bench) orphan(t *testing.T, command string, attr ...*syscall.SysProcAttr) string {
	t.Helper()
	r, w, err := os.Pipe()
	check.Nil(t, err)
	defer func() { _ = r.Close() }()
	// The inner shell begins when the outer one has ended.
	hold, release, err := os.Pipe()
	check.Nil(t, err)
	cmd := exec.Command("/bin/sh", "-c", "( read x <&3; exec 3<&-; "+command+" ) &")
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = w, w, []*os.File{hold}
	if len(attr) > 0 {
		cmd.SysProcAttr = attr[0]
	}
	check.Nil(t, cmd.Start())
	_, err = cmd.Process.Wait()
	check.Nil(t, errors.Join(err, w.Close(), hold.Close(), release.Close()))
	check.Nil(t, r.SetReadDeadline(time.Now().Add(20*time.Second)))
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("%s: it is kept waiting: %v; it said %q", command, err, out)
	}
	return string(out)
}

// A program that isn't the credential's is seen, as what and whose it is; it
// reads the file all the same.
func TestForeignOpener(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/opt/billing/bin/billingd"})
	copied := b.copyOf(t, "/bin/cat", "helper")
	if got := b.orphan(t, copied+" "+b.file, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}); got != "s3cret" {
		t.Errorf("it read %q", got)
	}
	o := b.seen(t, copied)
	if o.Lease != "lease-1" || o.Path != b.file || o.PID <= 1 || o.User != "nobody" || time.Since(o.Time) > time.Minute {
		t.Errorf("%+v", o)
	}
	b.orphan(t, "cat "+b.file)
	if o := b.seen(t, check.Must(filepath.EvalSymlinks("/bin/cat"))(t)); o.User != "root" {
		t.Errorf("%+v", o)
	}
	// By another name of the same file.
	linked := b.copyOf(t, "/bin/cat", "by-a-link")
	check.Nil(t, os.Link(b.file, filepath.Join(b.dir, "link")))
	time.Sleep(2 * markEvery)
	b.orphan(t, linked+" "+filepath.Join(b.dir, "link"))
	if o := b.seen(t, linked); o.Path != b.file {
		t.Errorf("%+v", o)
	}
	// Any user may name a program anything.
	odd := b.copyOf(t, "/bin/cat", "odd-\xff\n")
	b.orphan(t, "'"+odd+"' "+b.file)
	b.seen(t, strings.ReplaceAll(odd, "\xff", "\uFFFD"))
}

// However many come and go, none waits, and one kind is told of once.
func TestManyShortOnes(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/opt/billing/bin/billingd"})
	copied := b.copyOf(t, "/bin/cat", "helper")
	if got := b.orphan(t, "for i in $(seq 200); do "+copied+" "+b.file+"; done; seq 50 | xargs -P 8 -I{} "+copied+" "+b.file); got != strings.Repeat("s3cret", 250) {
		t.Errorf("%d bytes were read", len(got))
	}
	b.seen(t, copied)
	b.only(t, copied)
}

// The credential's own programs are not told of; the twin of each, which differs
// in what is named, is.
func TestItsOwn(t *testing.T) {
	check.Root(t)
	sh, cat := check.Must(filepath.EvalSymlinks("/bin/sh"))(t), check.Must(filepath.EvalSymlinks("/bin/cat"))(t)
	other := exec.Command("sleep", "600")
	check.Nil(t, other.Start())
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	read := func(t *testing.T, b *bench) { b.orphan(t, "read x < "+b.file+"; cat "+b.file+"; true") }
	attested := func(itself bool) func(t *testing.T, b *bench) {
		return func(t *testing.T, b *bench) {
			pid := filepath.Join(b.dir, "pid")
			done := make(chan struct{})
			go func() {
				defer close(done)
				// sh is the shell that opens and its own child's parent.
				b.orphan(t, "exec sh -c 'echo $$ > "+pid+".new; mv "+pid+".new "+pid+"; while [ ! -e "+b.dir+"/go ]; do sleep 0.05; done; read x < "+b.file+"; cat "+b.file+"; true'")
			}()
			check.Eventually(t, 10*time.Second, "it runs", func() (bool, string) {
				text, err := os.ReadFile(pid)
				n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
				if !itself {
					n = other.Process.Pid
				}
				b.held.Lock()
				b.held.program = &process.Program{PID: n}
				b.held.Unlock()
				return err == nil, "no pid"
			})
			b.write(t, filepath.Join(b.dir, "go"))
			<-done
		}
	}
	for name, tt := range map[string]struct {
		process config.Process
		open    func(t *testing.T, b *bench)
		foreign []string
	}{
		"the agent": {config.Process{Exe: "/x"}, func(t *testing.T, b *bench) { check.Must(os.ReadFile(b.file))(t) }, nil},
		"a command of the agent's": {config.Process{Exe: "/x"}, func(t *testing.T, b *bench) {
			check.Nil(t, exec.Command("/bin/sh", "-c", "cat "+b.file).Run())
		}, nil},
		"the executable and what it starts": {config.Process{Exe: sh}, read, nil},
		"another executable":                {config.Process{Exe: "/x"}, read, []string{sh, cat}},
		"the attested process":              {config.Process{User: "nobody"}, attested(true), nil},
		"another process":                   {config.Process{User: "nobody"}, attested(false), []string{sh, cat}},
		"not in the unit":                   {config.Process{Unit: "billing.service"}, read, []string{sh, cat}},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, tt.process)
			tt.open(t, b)
			b.only(t, tt.foreign...)
		})
	}
}

// A Runner may open its own file while it holds its lock, for which the judgement
// of an earlier open waits.
func TestARunnerThatOpens(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	copied := b.copyOf(t, "/bin/cat", "helper")
	b.held.Lock()
	b.orphan(t, copied+" "+b.file)
	done := make(chan error, 1)
	go func() { _, err := os.ReadFile(b.file); done <- err }()
	select {
	case err := <-done:
		check.Nil(t, err)
	case <-time.After(20 * time.Second):
		t.Error("it waits for itself")
		b.held.Unlock()
		return
	}
	b.held.Unlock()
	b.seen(t, copied)
}

// A file that is replaced is watched again, with the lease that is held then.
func TestReplaced(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	first, second := b.copyOf(t, "/bin/cat", "first"), b.copyOf(t, "/bin/cat", "second")
	b.orphan(t, first+" "+b.file)
	b.seen(t, first)
	b.write(t, b.file+".new")
	check.Nil(t, os.Rename(b.file+".new", b.file))
	b.held.Lock()
	b.held.lease = "lease-2"
	b.held.Unlock()
	time.Sleep(2 * markEvery)
	b.orphan(t, second+" "+b.file)
	if o := b.seen(t, second); o.Lease != "lease-2" {
		t.Errorf("%+v", o)
	}
	check.Nil(t, os.Remove(b.file))
	time.Sleep(2 * markEvery)
	b.write(t, b.file)
	time.Sleep(2 * markEvery)
	third := b.copyOf(t, "/bin/cat", "third")
	b.orphan(t, third+" "+b.file)
	b.seen(t, third)
}

// marks are those that the kernel has of this process.
func marks(t *testing.T) (n int) {
	t.Helper()
	for _, d := range check.Must(os.ReadDir("/proc/self/fdinfo"))(t) {
		text, _ := os.ReadFile("/proc/self/fdinfo/" + d.Name()) // some are closed by now
		n += strings.Count(string(text), "fanotify ino:")
	}
	return n
}

func (b *bench) put(t *testing.T, path string) {
	t.Helper()
	check.Nil(t, os.Rename(path, b.file))
	time.Sleep(2 * markEvery)
}

func (b *bench) marks(t *testing.T, when string, want int) {
	t.Helper()
	time.Sleep(2 * markEvery)
	if got := marks(t); got != want {
		t.Errorf("%s: %d marks, want %d", when, got, want)
	}
}

// There is one mark while the credential stands in its place, and none else.
func TestMarksComeAndGo(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	b.marks(t, "delivered", 1)
	for i := range 3 { // what was there lives on
		kept, next := filepath.Join(b.dir, "kept"+strconv.Itoa(i)), filepath.Join(b.dir, "next")
		check.Nil(t, os.Rename(b.file, kept))
		b.write(t, next)
		b.put(t, next)
	}
	b.marks(t, "replaced", 1)
	hold := func(lease string) { b.held.Lock(); b.held.lease = lease; b.held.Unlock() }
	hold("")
	b.marks(t, "without a lease", 0)
	hold("lease-2")
	b.marks(t, "with the next", 1)
	check.Nil(t, os.Rename(b.file, b.file+".gone"))
	b.marks(t, "withdrawn", 0)
	b.put(t, b.file+".gone")
	b.marks(t, "back", 1)
	copied := b.copyOf(t, "/bin/cat", "helper")
	b.orphan(t, copied+" "+b.file)
	if o := b.seen(t, copied); o.Lease != "lease-2" {
		t.Errorf("%+v", o)
	}
}

// Who puts another's file in the credential's place has its opens neither held up
// nor told of; his own file there is watched.
func TestAnotherFileInItsPlace(t *testing.T) {
	check.Root(t)
	for name, change := range map[string]func(t *testing.T, path string){
		"what was delivered": func(*testing.T, string) {},
		"a link":             func(t *testing.T, path string) { check.Nil(t, os.Link(path, path+".2")) },
		"another owner's":    func(t *testing.T, path string) { check.Nil(t, os.Chown(path, 65534, 65534)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, config.Process{Exe: "/x"})
			other, helper := filepath.Join(b.dir, "other"), b.copyOf(t, "/bin/cat", "helper")
			b.write(t, other)
			change(t, other)
			b.put(t, other)
			b.orphan(t, helper+" "+b.file)
			want := []string{helper}
			if name != "what was delivered" {
				b.marks(t, name, 0)
				want = nil
			}
			b.write(t, b.file+".new")
			b.put(t, b.file+".new")
			b.only(t, want...)
		})
	}
}

// A credential's owner may give it the name of a command that the agent runs. The
// agent waits for no answer of its own then: here it has one thread of Go's to do
// both, and in its own process, which can be killed.
func TestItsCommandIsTheFile(t *testing.T) {
	check.Root(t)
	const inside = "WITNESS_TEST_COMMAND"
	if os.Getenv(inside) == "" {
		ctx := check.Within(t, time.Minute)
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1", "GOMAXPROCS=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	b := start(t, config.Process{Exe: "/x"})
	b.put(t, b.copyOf(t, "/bin/true", "true"))
	reload := filepath.Join(b.dir, "reload")
	check.Nil(t, os.Link(b.file, reload))
	b.marks(t, "linked", 1)
	agent := check.Must(config.Parse("agent.hcl", fmt.Appendf(nil, `
broker {
  addresses = ["https://b:1"]
  ca_sha256 = "%064d"
}
credential "c" {
  process { unit = "x.service" }
  file %q { template = "" }
  on_change {
    check = [%q]
    exec  = [%q]
  }
}`, 0, b.file, b.file, reload)))(t)
	c := agent.Credentials[0]
	for range 3 {
		check.Nil(t, errors.Join(notify.Check(t.Context(), c, t.TempDir(), make([]secret.Bytes, 1)), notify.Notify(t.Context(), c.OnChange, process.Program{})))
	}
	b.only(t)
}

func descriptors(t *testing.T) int {
	t.Helper()
	return len(check.Must(os.ReadDir("/proc/self/fd"))(t))
}

// After the end nobody waits, and nothing is left open.
func TestTheEnd(t *testing.T) {
	check.Root(t)
	before := 0
	for i := range 3 { // the runtime opens some of its own the first time
		b := start(t, config.Process{Exe: "/x"})
		stop := make(chan struct{})
		var openers sync.WaitGroup
		for range 4 {
			openers.Go(func() { // while it ends, too
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := os.ReadFile(b.file); err != nil {
						t.Error(err)
					}
				}
			})
		}
		time.Sleep(50 * time.Millisecond)
		b.end()
		time.Sleep(50 * time.Millisecond)
		close(stop)
		openers.Wait()
		if got := b.orphan(t, "cat "+b.file); got != "s3cret" {
			t.Errorf("after the end: %q", got)
		}
		time.Sleep(2 * markEvery) // who marked is through
		if now := descriptors(t); i > 0 && now > before {
			t.Errorf("%d descriptors, were %d", now, before)
		} else {
			before = now
		}
	}
}

// Whoever owns a file can put a lease on it, and have an open of it wait for
// most of a minute. It holds up nobody else: not the agent.
func TestALeaseOnTheFile(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	f := check.Must(os.OpenFile(b.file, os.O_RDWR, 0))(t)
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	check.Nil(t, err)
	for range 2 {
		b.orphan(t, "cat "+b.file+"; true") // it is refused, by the kernel
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	check.Nil(t, errors.Join(err, f.Close()))
	after := b.copyOf(t, "/bin/cat", "after")
	if got := b.orphan(t, after+" "+b.file); got != "s3cret" {
		t.Errorf("after the lease: %q", got)
	}
	b.seen(t, after)
}

// What could keep the agent from answering is not marked.
func TestNotWatchable(t *testing.T) {
	check.Root(t)
	b := start(t, config.Process{Exe: "/x"})
	if err := watchable(b.file); err != nil {
		t.Error(err)
	}
	if err := watchable("/proc/self/exe"); err == nil || !strings.Contains(err.Error(), "own program") {
		t.Errorf("the agent's: %v", err)
	}
	if err := watchable("/proc/version"); err == nil || !strings.Contains(err.Error(), "file system") {
		t.Errorf("on a file system of another kind: %v", err)
	}
	f := check.Must(os.OpenFile(b.file, os.O_RDWR, 0))(t)
	defer func() { _ = f.Close() }()
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	check.Nil(t, err)
	if err := watchable(b.file); err == nil || !strings.Contains(err.Error(), "can't open") {
		t.Errorf("with a lease on it: %v", err)
	}
}

func TestParse(t *testing.T) {
	good := []byte{24, 0, 0, 0, 3, 0, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 0}
	if e, err := parse(good); err != nil || e.fd != 9 || e.thread != 7 {
		t.Fatalf("%+v, %v", e, err)
	}
	for name, change := range map[string]func(b []byte) []byte{
		"cut":             func(b []byte) []byte { return b[:23] },
		"empty":           func([]byte) []byte { return nil },
		"another version": func(b []byte) []byte { b[4] = 4; return b },
		"another length":  func(b []byte) []byte { b[0] = 25; return b },
		"a huge length":   func(b []byte) []byte { b[3] = 255; return b },
		"more metadata":   func(b []byte) []byte { b[6] = 32; return b },
	} {
		if e, err := parse(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	file := filepath.Join(b.TempDir(), "x")
	check.Nil(b, os.WriteFile(file, []byte("x"), 0o600))
	open := func(b *testing.B) {
		for b.Loop() {
			fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			_ = unix.Close(fd)
		}
	}
	b.Run("plain", open)
	c := Credential{Config: &config.Credential{Name: "x", Process: config.Process{Exe: "/x"}, Files: []*config.File{{Path: file, Owner: "root"}}}, Held: func() (string, *process.Program) { return "lease", nil }}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() {
		done <- watch(ctx, Options{Credentials: []Credential{c}, Log: slog.New(slog.DiscardHandler), Now: time.Now}, newQueue(slog.New(slog.DiscardHandler), time.Now))
	}()
	time.Sleep(2 * markEvery)
	b.Run("watched", open)
	cancel()
	check.Nil(b, <-done)
}
