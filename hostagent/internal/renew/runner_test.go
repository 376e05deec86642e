package renew

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
)

// broker answers as a test tells it to.
type broker struct {
	issue       func() (attest.Issued, error)
	acknowledge func() (time.Time, error)
	released    []string
	away        bool // Release finds nobody
}

func (b *broker) Issue(context.Context, attest.Order) (attest.Issued, error) { return b.issue() }
func (b *broker) Acknowledge(context.Context, string, string) (time.Time, error) {
	return b.acknowledge()
}
func (b *broker) Release(_ context.Context, l []string, _ string) ([]string, error) {
	if b.away {
		return nil, errors.New("no broker")
	}
	b.released = append(b.released, l...)
	return l, nil
}

// programs is one that runs, or an error.
type programs struct {
	p   process.Program
	err error
}

func (r programs) Find(context.Context, config.Process, string) (process.Program, error) {
	return r.p, r.err
}
func (r programs) Starting(context.Context, string) (process.Program, error) { return r.p, r.err }
func (r programs) Watch(context.Context, config.Process) <-chan struct{}     { return nil }

var running = process.Program{Boot: "boot", PID: 7, Start: 9, User: "x", Executables: process.OneFile("/bin/x", [32]byte{1})}

// holding is a Runner that starts with the lease l, whose credential stands in
// the file.
func holding(t *testing.T, b *broker, p programs, l Lease) (_ *Runner, file string) {
	t.Helper()
	dir := t.TempDir()
	file = filepath.Join(dir, "db.properties")
	if err := os.WriteFile(file, []byte("password=old\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	o := options(t, dir, b, p, nil)
	o.Credential.Files[0].Path = file
	o.Way = files.New(o.Credential.Files)
	l.Instance, l.Boot, l.Acked = running.Instance().String(), "boot", true
	if err := (&keeper{dir, dir, "billing-db"}).save(&l); err != nil {
		t.Fatal(err)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r, file
}

// options are those of a Runner with its state in dir.
func options(t *testing.T, dir string, b Broker, p Programs, way deliver.Way) Options {
	t.Helper()
	cfg, err := config.Parse("x.hcl", []byte(`broker {
  addresses = ["https://b.example:1"]
  ca_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
}
credential "billing-db" {
  process { exe = "/bin/x" }
  file "/nothing/here" { template = "password={{ .password }}\n" }
}
`))
	if err != nil {
		t.Fatal(err)
	}
	return Options{Credential: cfg.Credentials[0], Broker: b, Programs: p, Way: way, StateDir: dir, RunDir: dir, ProveNow: func() {},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: time.Now}
}

// An agent that restarts and can't see its program takes nothing, and says
// nothing untrue of it.
func TestAProgramThatCantBeSeenKeepsItsCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &broker{}
		r, file := holding(t, b, programs{err: errors.New("the system manager can't be reached")},
			Lease{ID: "l1", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(-time.Minute)})
		for _, p := range r.Proofs(t.Context()) {
			if p.Program != nil {
				t.Errorf("told of a program that was not seen: %+v", p.Program)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Minute)
		defer cancel()
		r.Run(ctx)
		if _, err := os.Stat(file); err != nil || len(b.released) > 0 {
			t.Errorf("file: %v; released: %v", err, b.released)
		}
	})
}

// A verdict on the old lease, while the new one awaits its acknowledgement,
// takes nothing of the new one.
func TestAVerdictDuringADelivery(t *testing.T) {
	acking, answer := make(chan struct{}), make(chan struct{})
	b := &broker{
		issue: func() (attest.Issued, error) {
			n := time.Now()
			return attest.Issued{Lease: "l2", Fields: map[string]secret.Bytes{"password": secret.New([]byte("new"))},
				Expires: n.Add(2 * time.Minute), ReplaceAt: n.Add(5 * time.Hour), AcknowledgeBy: n.Add(2 * time.Minute)}, nil
		},
		acknowledge: func() (time.Time, error) {
			close(acking)
			<-answer
			return time.Now().Add(8 * time.Hour), nil
		},
	}
	r, file := holding(t, b, programs{p: running}, Lease{ID: "l1", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(-time.Second)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	<-acking
	judged := make(chan struct{})
	go func() {
		r.Judged(ctx, "l1", attest.Verdict{Outcome: "refused", Reason: "a policy that was mended a second later"})
		close(judged)
	}()
	time.Sleep(50 * time.Millisecond)
	close(answer)
	<-judged
	check.Eventually(t, 10*time.Second, "the new lease is in force", func() (bool, string) {
		st := r.Status()
		return st.Lease == "l2", fmt.Sprintf("%+v", st)
	})
	cancel()
	<-done
	content, err := os.ReadFile(file)
	if st := r.Status(); st.Lease != "l2" || err != nil || string(content) != "password=new\n" {
		t.Errorf("lease %q, file %q, %v", st.Lease, content, err)
	}
}

// What a broker took away isn't kept for the unit's next start, though the
// broker can't be told that it went; what only lost its program is.
func TestWhatIsWithheld(t *testing.T) {
	test := func(t *testing.T, refused bool) {
		b := &broker{away: true}
		r, file := holding(t, b, programs{err: program.ErrNotRunning}, Lease{ID: "l1", Unit: "x.service", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(time.Hour)})
		if err := os.Chown(file, 0, 0); err != nil {
			t.Fatal(err)
		}
		if refused {
			r.Judged(t.Context(), "l1", attest.Verdict{Outcome: "refused", Reason: "policy"})
		} else {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			r.Run(ctx)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("refused=%v: the file stands", refused)
		}
		if lease, _, err := r.keep.loadWithheld(); err != nil || (lease == nil) != refused {
			t.Errorf("refused=%v: withheld %+v, %v", refused, lease, err)
		}
		if owed, err := r.keep.owed(); err != nil || len(owed) != 1 {
			t.Errorf("refused=%v: owed %v, %v", refused, owed, err)
		}
	}
	for _, refused := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) { test(t, refused) })
	}
}

// Where the acknowledgement fails the old credential comes back.
func TestUnacknowledgedGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &broker{
			issue: func() (attest.Issued, error) {
				n := time.Now()
				return attest.Issued{Lease: "l2", Fields: map[string]secret.Bytes{"password": secret.New([]byte("new"))},
					Expires: n.Add(2 * time.Minute), ReplaceAt: n.Add(5 * time.Hour), AcknowledgeBy: n}, nil
			},
			acknowledge: func() (time.Time, error) { return time.Time{}, errors.New("no broker") },
		}
		r, file := holding(t, b, programs{p: running}, Lease{ID: "l1", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(-time.Second)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r.Run(ctx)
		content, err := os.ReadFile(file)
		if st := r.Status(); st.Lease != "l1" || err != nil || string(content) != "password=old\n" {
			t.Errorf("lease %q, file %q, %v", st.Lease, content, err)
		}
		if len(b.released) == 0 || b.released[0] != "l2" {
			t.Errorf("released %v, want l2", b.released)
		}
	})
}
