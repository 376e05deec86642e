package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver/ways"
	"github.com/countersign/countersign/hostagent/internal/renew"
)

// broker answers as a test tells it to, and keeps what it was told.
type broker struct {
	prove, release error
	proven         []attest.LeaseProof
	asked          int // for proofs
}

func (b *broker) Host() string      { return "h" }
func (b *broker) Ends() attest.Ends { return attest.Ends{} }
func (b *broker) Issue(context.Context, attest.Order) (attest.Issued, error) {
	return attest.Issued{}, errors.New("nothing is issued here")
}
func (b *broker) Acknowledge(context.Context, string, string) (time.Time, error) {
	return time.Time{}, errors.New("nothing was issued here")
}
func (b *broker) Release(_ context.Context, l []string, _ string) ([]string, error) {
	return l, b.release
}
func (b *broker) Prove(_ context.Context, p []attest.LeaseProof) (attest.Proven, error) {
	b.proven = p
	b.asked++
	return attest.Proven{ProveBy: time.Now().Add(time.Hour)}, b.prove
}

func (b *broker) Witness(context.Context, []attest.FileOpen) error { return nil }

// programs all run; the one of the exe hangs can't be looked at.
type programs struct{ hangs string }

func (p programs) Find(ctx context.Context, c config.Process, _ string) (process.Program, error) {
	if c.Exe == p.hangs {
		<-ctx.Done()
		return process.Program{}, ctx.Err()
	}
	return process.Program{Boot: "boot", PID: 7, Start: 9, User: "x", Executables: process.OneFile(c.Exe, [32]byte{1})}, nil
}
func (p programs) Starting(context.Context, string) (process.Program, error) {
	return process.Program{}, errors.New("no unit")
}
func (p programs) Watch(context.Context, config.Process) <-chan struct{} { return nil }

// holding is a Service whose credentials a and b are in force.
func holding(t *testing.T, b *broker, p programs) (s *Service, dir string) {
	t.Helper()
	dir = t.TempDir()
	text := "broker {\n  addresses = [\"https://b.example:1\"]\n  ca_sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\n}\n" +
		fmt.Sprintf("state_dir = %q\nrun_dir = %q\n", dir, dir)
	for _, name := range []string{"a", "b"} {
		text += fmt.Sprintf("credential %q {\n  process { exe = %q }\n  file %q { template = \"x\" }\n}\n", name, "/bin/"+name, filepath.Join(dir, name))
		lease := fmt.Sprintf(`{"id":"lease-%s","instance":"boot/7/9","boot":"boot","acked":true,"expires":%q,"replace":%q}`, name,
			time.Now().Add(time.Hour).Format(time.RFC3339), time.Now().Add(time.Hour).Format(time.RFC3339))
		write(t, filepath.Join(dir, name), "x")
		write(t, filepath.Join(dir, "leases", name+".json"), lease)
	}
	cfg, err := config.Parse("x.hcl", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if s, err = New(cfg, b, p, ways.All, slog.New(slog.DiscardHandler), time.Now, time.Now); err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// What happens on the host brings a proof nearer and never puts it off, and while the
// broker is away it doesn't make the agent ask all the time.
func TestProofsUnderSteadyChanges(t *testing.T) {
	for name, c := range map[string]struct {
		fails         error
		atLeast, most int // proofs in a minute
	}{
		"the broker answers": {nil, 25, 80},
		"the broker is away": {errors.New("no broker"), 4, 15},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &broker{prove: c.fails}
				s, _ := holding(t, b, programs{})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { defer close(done); s.proveLoop(ctx) }()
				for range 150 {
					time.Sleep(400 * time.Millisecond)
					s.proveNow()
				}
				cancel()
				<-done
				if b.asked < c.atLeast || b.asked > c.most {
					t.Errorf("%d proofs in a minute, want %d to %d", b.asked, c.atLeast, c.most)
				}
			})
		})
	}
}

// A program that can't be looked at holds up no other credential's proof, and
// its own lease is still named: one that is left out is revoked.
func TestAProgramThatHangs(t *testing.T) {
	for _, hangs := range []string{"", "/bin/a"} {
		synctest.Test(t, func(t *testing.T) {
			b := &broker{}
			s, _ := holding(t, b, programs{hangs})
			if err := s.proveOnce(t.Context()); err != nil {
				t.Error(err)
			}
			var leases []string
			for _, p := range b.proven {
				leases = append(leases, p.Lease)
				if seen := p.Program != nil; seen != (p.Lease == "lease-b" || hangs == "") {
					t.Errorf("hangs %q: %s's program is told: %v", hangs, p.Lease, seen)
				}
			}
			if slices.Sort(leases); !slices.Equal(leases, []string{"lease-a", "lease-b"}) {
				t.Errorf("hangs %q: proven are %v", hangs, leases)
			}
		})
	}
}

// What is owed and can't be given back keeps no host from its proof, and no
// rejected one its files.
func TestOwedWhile(t *testing.T) {
	rejected := &api.Error{Outcome: api.Rejected, Check: "state", Message: "quarantined"}
	for _, tt := range []struct {
		name           string
		prove, release error
		stand          bool
	}{
		{"trusted", nil, nil, true},
		{"the lease's issuer is away", nil, &api.Error{Outcome: api.Fault, Message: "Vault is away"}, true},
		{"the broker is away", errors.New("no broker"), errors.New("no broker"), true},
		{"quarantined", rejected, rejected, false},
		{"quarantined, the broker lost in between", rejected, errors.New("no broker"), false},
		{"quarantined just now", nil, rejected, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &broker{prove: tt.prove, release: tt.release}
			s, dir := holding(t, b, programs{})
			owed := filepath.Join(dir, "leases", "a.owed")
			write(t, owed, `["of-an-earlier-program"]`)
			if err := s.proveOnce(t.Context()); (err == nil) != (tt.prove == nil && tt.release == nil) {
				t.Error(err)
			}
			if len(b.proven) != 2 {
				t.Errorf("proven: %v", b.proven)
			}
			for _, name := range []string{"a", "b"} {
				if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != tt.stand {
					t.Errorf("%s: %v", name, err)
				}
			}
			if _, err := os.Stat(owed); (err == nil) != (tt.release != nil) {
				t.Errorf("owed: %v", err)
			}
			if st := s.status(); st.Rejected == tt.stand || tt.prove == nil && tt.stand && st.Problem != "" {
				t.Errorf("%+v", st)
			}
		})
	}
}

// One that is stuck in its files holds up no other's.
func TestOneThatIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := holding(t, &broker{}, programs{})
		done, free := 0, make(chan struct{})
		part := func(r *renew.Runner) error {
			if r == s.runners[0] {
				<-free
				return nil
			}
			done++
			return nil
		}
		for range 3 {
			s.each(t.Context(), part)
		}
		close(free)
		synctest.Wait()
		if done != 3 {
			t.Errorf("the other did its part %d times", done)
		}
		if errs := s.each(t.Context(), part); errors.Join(errs...) != nil || done != 4 {
			t.Errorf("set free: %v", errs)
		}
	})
}
