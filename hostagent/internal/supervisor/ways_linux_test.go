package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/deliver/ways"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/hostagent/internal/program/kinds"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
)

// Run with this set, the test binary is a program that comes for its credential
// to the socket of this name, and again at each SIGUSR1.
const comesTo = "COUNTERSIGN_TEST_COMES_TO"

func TestMain(m *testing.M) {
	socket := os.Getenv(comesTo)
	if socket == "" {
		os.Exit(m.Run())
	}
	again := make(chan os.Signal, 8)
	signal.Notify(again, unix.SIGUSR1)
	for {
		c, err := net.Dial("unix", socket)
		if err != nil {
			os.Exit(1)
		}
		b, _ := io.ReadAll(c)
		fmt.Printf("%s\n", b)
		<-again
	}
}

// issuing is a broker that issues, and keeps the order of what happened.
type issuing struct {
	broker
	replaceAfter time.Duration

	mu     sync.Mutex
	events []string        // guarded by mu
	issued int             // guarded by mu
	last   process.Program // guarded by mu; of Issue
}

func (b *issuing) note(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, fmt.Sprintf(format, args...))
}

func (b *issuing) seen() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.events, ", ")
}

func (b *issuing) Issue(_ context.Context, o attest.Order) (attest.Issued, error) {
	b.mu.Lock()
	b.issued++
	n := b.issued
	encoded, err := o.Program.Encode()
	if err == nil {
		b.last, err = process.Parse(encoded)
	}
	b.mu.Unlock()
	if err != nil {
		return attest.Issued{}, err
	}
	b.note("issue l%d to pid %d for %q", n, o.Program.PID, o.Replaces)
	now := time.Now()
	out := attest.Issued{Lease: fmt.Sprintf("l%d", n), Fields: map[string]secret.Bytes{"password": secret.New(fmt.Appendf(nil, "p%d", n))},
		Expires: now.Add(10 * time.Second), ReplaceAt: now.Add(time.Hour), AcknowledgeBy: now.Add(10 * time.Second)}
	if n == 1 {
		out.ReplaceAt = now.Add(b.replaceAfter)
	}
	return out, nil
}

func (b *issuing) Acknowledge(_ context.Context, lease, _ string) (time.Time, error) {
	b.note("acknowledge %s", lease)
	return time.Now().Add(time.Hour), nil
}

func (b *issuing) Release(_ context.Context, leases []string, _ string) ([]string, error) {
	b.note("release %s", strings.Join(leases, " "))
	return leases, nil
}

func (b *issuing) Prove(context.Context, []attest.LeaseProof) (attest.Proven, error) {
	return attest.Proven{ProveBy: time.Now().Add(time.Hour)}, nil
}

// serve runs a Service with one credential whose file lies at path, and with one
// more way of delivery.
func serve(t *testing.T, b *issuing, path, process string, ways []deliver.Kind, programs ...program.Kind) {
	t.Helper()
	text := "broker {\n  addresses = [\"https://b.example:1\"]\n  ca_sha256 = \"" + strings.Repeat("0", 64) + "\"\n}\n" +
		fmt.Sprintf("state_dir = %q\nrun_dir = %q\n", filepath.Dir(path), filepath.Dir(path)) +
		fmt.Sprintf("credential \"a\" {\n  process { %s }\n  file %q { template = \"{{ .password }}\" }\n  on_change { signal = \"SIGUSR1\" }\n}\n", process, path)
	cfg, err := config.Parse("x.hcl", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	finder := program.New(append(programs, kinds.All()...)...)
	t.Cleanup(finder.Close)
	s, err := New(cfg, b, finder, ways, slog.New(slog.DiscardHandler), time.Now, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); check.Nil(t, <-done) })
}

// happened waits for what the broker has seen.
func happened(t *testing.T, b *issuing, want string) {
	t.Helper()
	check.Eventually(t, 20*time.Second, want, func() (bool, string) { return b.seen() == want, b.seen() })
}

// shortDir is a folder whose name leaves room for that of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "w")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// A way of pulling, from nothing but its kind: a process comes, is identified and
// earns its credential, reads it, is given the next one, and loses it by its end.
func TestAPullWay(t *testing.T) {
	path := filepath.Join(shortDir(t), "a.sock")
	b := &issuing{replaceAfter: time.Second}
	serve(t, b, path, `exe = "/nothing/runs/this"`, append([]deliver.Kind{socketOf}, ways.All...))
	check.Eventually(t, 10*time.Second, "the socket", func() (bool, string) { _, err := os.Stat(path); return err == nil, "" })
	if b.seen() != "" {
		t.Errorf("before anybody came: %s", b.seen())
	}

	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := exec.Command(exe)
	program.Env = append(os.Environ(), comesTo+"="+path)
	out, err := program.StdoutPipe()
	if err := errors.Join(err, program.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Process.Kill(); _ = program.Wait() })
	read := bufio.NewScanner(out)
	reads := func(want string) {
		t.Helper()
		if !read.Scan() || read.Text() != want {
			t.Fatalf("the program reads %q, want %q; %s", read.Text(), want, b.seen())
		}
	}

	pid := program.Process.Pid
	so := fmt.Sprintf("issue l1 to pid %d for \"\", acknowledge l1", pid)
	reads("p1")
	happened(t, b, so)
	so += fmt.Sprintf(", issue l2 to pid %d for \"l1\", acknowledge l2", pid)
	reads("p2")
	happened(t, b, so)

	_ = program.Process.Kill()
	_ = program.Wait()
	happened(t, b, so+", release l2")
}

// socketWay is a toy: a socket in the place of a file. Whoever connects is given
// the file's content, if he is the one that it was issued to.
type socketWay struct {
	file     *config.File
	programs deliver.Programs
	changed  chan struct{}

	mu      sync.Mutex
	waiting []visitor       // guarded by mu
	last    process.Program // guarded by mu; whom something was offered to
	offers  []*socketOffer  // guarded by mu; the newest is served
}

type visitor struct {
	conn    net.Conn
	program process.Program
}

type socketOffer struct {
	way     *socketWay
	to      process.Instance
	content secret.Bytes
	read    chan struct{}
	once    sync.Once
}

func socketOf(c *config.Credential, programs deliver.Programs) deliver.Way {
	if len(c.Files) != 1 || !strings.HasSuffix(c.Files[0].Path, ".sock") {
		return nil
	}
	return &socketWay{file: c.Files[0], programs: programs, changed: make(chan struct{}, 1)}
}

func (w *socketWay) tell() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Watch listens for visitors, and has the one that was served looked at anew.
func (w *socketWay) Watch(ctx context.Context) <-chan struct{} {
	l, err := net.Listen("unix", w.file.Path)
	if err != nil {
		panic(err)
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	go func() {
		for ctx.Err() == nil {
			time.Sleep(50 * time.Millisecond)
			w.tell()
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.welcome(ctx, c)
		}
	}()
	return w.changed
}

func (w *socketWay) welcome(ctx context.Context, c net.Conn) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return
	}
	var peer *unix.Ucred
	_ = raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil {
		return
	}
	p, err := w.programs.Find(ctx, config.Process{PID: int(peer.Pid)}, "")
	if err != nil {
		_ = c.Close()
		return
	}
	w.mu.Lock()
	w.waiting = append(w.waiting, visitor{c, p})
	w.serve()
	w.mu.Unlock()
	w.tell()
}

// serve gives those that wait what is offered to them. w.mu is held.
func (w *socketWay) serve() {
	if len(w.offers) == 0 {
		return
	}
	o := w.offers[len(w.offers)-1]
	w.waiting = slices.DeleteFunc(w.waiting, func(v visitor) bool {
		if v.program.Instance() != o.to {
			return false
		}
		if _, err := v.conn.Write(o.content.Reveal()); err == nil {
			o.once.Do(func() { close(o.read) })
		}
		_ = v.conn.Close()
		return true
	})
}

func (w *socketWay) Find(ctx context.Context, held string) (process.Program, error) {
	w.mu.Lock()
	last, waiting := w.last, slices.Clone(w.waiting)
	w.mu.Unlock()
	if held != "" && last.Instance().String() == held {
		if p, err := w.programs.Find(ctx, config.Process{PID: last.PID}, held); err == nil && p.Instance() == last.Instance() {
			return p, nil
		}
	}
	if len(waiting) > 0 {
		return waiting[0].program, nil
	}
	return process.Program{}, program.ErrNotRunning
}

func (w *socketWay) Asked() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.offers) == 0 && len(w.waiting) > 0
}

func (w *socketWay) Offer(p process.Program, fields map[string]secret.Bytes) (deliver.Offer, error) {
	content, err := deliver.Render(w.file.Template, fields)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	o := &socketOffer{way: w, to: p.Instance(), content: content, read: make(chan struct{})}
	w.last, w.offers = p, append(w.offers, o)
	w.serve()
	return o, nil
}

func (w *socketWay) Withdraw() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.offers = nil
	return nil
}

func (o *socketOffer) Read() <-chan struct{} { return o.read }
func (o *socketOffer) Keep() {
	o.way.mu.Lock()
	defer o.way.mu.Unlock()
	o.way.offers = slices.DeleteFunc(o.way.offers, func(other *socketOffer) bool { return other != o })
}
func (o *socketOffer) Retract() {
	o.way.mu.Lock()
	defer o.way.mu.Unlock()
	o.way.offers = slices.DeleteFunc(o.way.offers, func(other *socketOffer) bool { return other == o })
}

// A kind of program, from nothing but its registration: it comes, earns its
// credential into a real file, and loses it by its end. Nothing of Linux is told of
// it, so that this is what another system's program goes through.
func TestAProgramKind(t *testing.T) {
	b, toy := &issuing{replaceAfter: time.Second}, &toyKind{changed: make(chan struct{}, 1)}
	file := filepath.Join(shortDir(t), "a")
	serve(t, b, file, `pid_file = "/toys/billing"`, ways.All, toy)
	holds := func(want string) {
		t.Helper()
		check.Eventually(t, 10*time.Second, "the file holds "+want, func() (bool, string) {
			got, _ := os.ReadFile(file)
			return string(got) == want, string(got)
		})
	}

	toy.run(7)
	so := `issue l1 to pid 7 for "", acknowledge l1, issue l2 to pid 7 for "l1", acknowledge l2`
	happened(t, b, so)
	holds("p2")
	if got := b.last; got.Windows == nil || got.Windows.Service != "billing" || got.Linux != nil {
		t.Errorf("issued to %+v", got)
	}
	toy.run(8) // another one
	so += `, release l2, issue l3 to pid 8 for "", acknowledge l3`
	happened(t, b, so)
	holds("p3")
	toy.run(0)
	happened(t, b, so+", release l3")
	holds("")
}

// toyKind is a kind of programs that a pid file in /toys describes.
type toyKind struct {
	changed chan struct{}

	mu  sync.Mutex
	pid int // guarded by mu; 0: it doesn't run
}

func (k *toyKind) run(pid int) {
	k.mu.Lock()
	k.pid = pid
	k.mu.Unlock()
	k.changed <- struct{}{}
}

func (k *toyKind) Describes(p config.Process) bool { return strings.HasPrefix(p.PIDFile, "/toys/") }

func (k *toyKind) Find(_ context.Context, p config.Process, _ string) (process.Program, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.pid == 0 {
		return process.Program{}, program.ErrNotRunning
	}
	return process.Program{Boot: "boot", PID: k.pid, Start: 1 << 60, User: "toy", Executables: process.OneFile(`C:\toys\toy.exe`, [32]byte{1}),
		Windows: &process.Windows{SID: "S-1-5-80-1", Service: filepath.Base(p.PIDFile)}}, nil
}

func (k *toyKind) Watch(context.Context, config.Process) <-chan struct{} { return k.changed }
func (k *toyKind) Close()                                                {}

// A way of pushing, from nothing but its kind.
func TestAPushWay(t *testing.T) {
	b, box := &issuing{replaceAfter: time.Second}, &boxWay{}
	program := exec.Command("sh", "-c", `trap : USR1; while :; do read x; done`)
	stdin, err := program.StdinPipe()
	if err := errors.Join(err, program.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = program.Process.Kill(); _ = program.Wait() })
	pid := program.Process.Pid
	serve(t, b, filepath.Join(shortDir(t), "a.box"), fmt.Sprintf("pid = %d", pid), append([]deliver.Kind{box.of}, ways.All...))

	so := fmt.Sprintf("issue l1 to pid %d for \"\", acknowledge l1, issue l2 to pid %d for \"l1\", acknowledge l2", pid, pid)
	happened(t, b, so)
	check.Eventually(t, 10*time.Second, "the old one is gone", func() (bool, string) { got := box.all(); return got == "p2", got })
	_ = program.Process.Kill()
	_ = program.Wait()
	happened(t, b, so+", release l2")
	if got := box.all(); got != "" {
		t.Errorf("withdrawn, and there is %q", got)
	}
}

// boxWay is a toy: it puts a credential into a box.
type boxWay struct {
	mu             sync.Mutex
	old, in, aside string // guarded by mu
}

func (w *boxWay) of(c *config.Credential, _ deliver.Programs) deliver.Way {
	if !strings.HasSuffix(c.Files[0].Path, ".box") {
		return nil
	}
	return w
}

func (w *boxWay) all() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.old + w.in + w.aside
}

// set changes the box.
func (w *boxWay) set(change func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	return nil
}

func (w *boxWay) Stage(fields map[string]secret.Bytes) (deliver.Staged, error) {
	return w.PutBack([]secret.Bytes{fields["password"]})
}
func (w *boxWay) PutBack(contents []secret.Bytes) (deliver.Staged, error) {
	return w, w.set(func() { w.aside = string(contents[0].Reveal()) })
}
func (w *boxWay) Recover() (deliver.Staged, bool, error) { return w, false, nil }
func (w *boxWay) Present() bool                          { return w.all() != "" }
func (w *boxWay) Contents() []secret.Bytes               { return []secret.Bytes{secret.New([]byte(w.all()))} }
func (w *boxWay) Withdraw() error                        { return w.set(func() { w.old, w.in, w.aside = "", "", "" }) }
func (w *boxWay) Paths() []string                        { return nil }
func (w *boxWay) Commit() error                          { return w.set(func() { w.old, w.in, w.aside = w.in, w.aside, "" }) }
func (w *boxWay) Rollback() error                        { return w.set(func() { w.in, w.old = w.old, "" }) }
func (w *boxWay) Finish() error                          { return w.set(func() { w.old = "" }) }
func (w *boxWay) Discard()                               { _ = w.set(func() { w.aside = "" }) }
