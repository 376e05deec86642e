package renew

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
	"github.com/countersign/countersign/hostagent/internal/program"
)

// counting counts the looks at a program.
type counting struct {
	programs
	n *atomic.Int64
}

func (c counting) Find(ctx context.Context, p config.Process, held string) (process.Program, error) {
	c.n.Add(1)
	return c.programs.Find(ctx, p, held)
}

// The folder's owner can keep files from being removed, and nothing else: the
// lease is given back, the credential goes, and the rest is tried again at a
// measured pace, by a later run of the agent too.
func TestAFolderThatKeepsItsFiles(t *testing.T) {
	mark := func(suffix string) func(string) error {
		return func(file string) error {
			return os.Mkdir(filepath.Join(filepath.Dir(file), ".db.properties.countersign-"+suffix), 0o755)
		}
	}
	unmark := func(suffix string) func(string) error {
		return func(file string) error {
			return os.Remove(filepath.Join(filepath.Dir(file), ".db.properties.countersign-"+suffix))
		}
	}
	away := func(file string) error {
		dir := filepath.Dir(file)
		return errors.Join(os.Rename(dir, dir+"x"), os.Symlink(dir+"x", dir))
	}
	back := func(file string) error {
		dir := filepath.Dir(file)
		return errors.Join(os.Remove(dir), os.Rename(dir+"x", dir))
	}
	for name, tt := range map[string]struct {
		put, mend func(file string) error
		reachable bool
		away      bool
	}{
		"an honest folder":         {nil, nil, true, false},
		"a folder as new":          {mark("new"), unmark("new"), true, false},
		"a folder as old":          {mark("old"), unmark("old"), true, false},
		"a folder as none":         {mark("none"), unmark("none"), true, false},
		"and the broker away":      {mark("none"), unmark("none"), true, true},
		"a symlink for the folder": {away, back, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, n := &broker{away: tt.away}, &atomic.Int64{}
				r, file := holding(t, b, programs{}, Lease{ID: "l1", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(time.Hour)})
				r.programs = counting{programs{err: program.ErrNotRunning}, n}
				if tt.put != nil {
					if err := tt.put(file); err != nil {
						t.Fatal(err)
					}
				}
				during := func(r *Runner, d time.Duration) {
					ctx, cancel := context.WithTimeout(t.Context(), d)
					defer cancel()
					r.Run(ctx)
				}
				during(r, 10*time.Minute)
				if n := n.Load(); n > 60 {
					t.Errorf("%d looks in ten minutes", n)
				}
				owed, err := r.keep.owed()
				if want := []string{"l1"}; err != nil || tt.away != slices.Equal(owed, want) || tt.away == slices.Equal(b.released, want) {
					t.Errorf("released %v, owed %v, %v", b.released, owed, err)
				}
				if _, err := os.Stat(file); tt.reachable == (err == nil) {
					t.Errorf("the file: %v", err)
				}
				if proofs := r.Proofs(t.Context()); len(proofs) != 0 {
					t.Errorf("still proven: %v", proofs)
				}
				st := r.Status()
				if tt.put == nil {
					if st.State != "waiting" || st.Problem != "" {
						t.Errorf("%+v", st)
					}
					return
				}
				if st.State != "ended" || st.Lease != "" || !strings.HasPrefix(st.Problem, "the program ended; left to do: ") || !strings.Contains(st.Problem, filepath.Dir(file)) {
					t.Errorf("%+v", st)
				}

				// The agent is started again, and then the folder is mended.
				again, err := New(Options{Credential: r.cfg, Broker: b, Programs: r.programs, Way: files.New(r.cfg.Files), StateDir: r.keep.state, RunDir: r.keep.run, ProveNow: func() {}, Log: r.log, Now: time.Now})
				if err != nil {
					t.Fatal(err)
				}
				during(again, time.Minute)
				if st := again.Status(); st.State != "ended" {
					t.Errorf("started again: %+v", st)
				}
				if err := tt.mend(file); err != nil {
					t.Fatal(err)
				}
				during(again, 3*time.Minute)
				if st := again.Status(); st.State != "waiting" || st.Problem != "" {
					t.Errorf("mended: %+v", st)
				}
				if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*db.properties*")); err != nil || len(left) > 0 {
					t.Errorf("left: %v, %v", left, err)
				}
				if len(b.released) > 1 {
					t.Errorf("released %v", b.released)
				}
			})
		})
	}
}

// A hand-over is noted with the proof that sees the coming instance, but not by
// a second writer while a delivery writes.
func TestAHandOverDuringADelivery(t *testing.T) {
	r, _ := holding(t, &broker{}, programs{p: running}, Lease{ID: "l1", Coming: true, Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(time.Hour)})
	coming := running
	coming.PID++
	r.programs = programs{p: coming}
	for _, delivering := range []bool{true, false} {
		if delivering {
			r.files.Lock()
		}
		if proofs := r.Proofs(t.Context()); len(proofs) != 1 || proofs[0].Program.PID != 8 {
			t.Errorf("delivering=%v: %+v", delivering, proofs)
		}
		if delivering {
			r.files.Unlock()
		}
		if l, err := r.keep.load(); err != nil || l.Coming != delivering || (l.Instance == coming.Instance().String()) == delivering {
			t.Errorf("delivering=%v: %+v, %v", delivering, l, err)
		}
	}
}

// A rejected host's lease and file are not held by their folder either.
func TestARejectedHostsFolder(t *testing.T) {
	for _, obstacle := range []bool{false, true} {
		b := &broker{}
		r, file := holding(t, b, programs{p: running}, Lease{ID: "l1", Expires: time.Now().Add(time.Hour), Replace: time.Now().Add(time.Hour)})
		if obstacle {
			if err := os.Mkdir(filepath.Join(filepath.Dir(file), ".db.properties.countersign-new"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			r.Rejected(t.Context(), "quarantined")
		}
		if _, err := os.Stat(file); err == nil || !slices.Equal(b.released, []string{"l1"}) {
			t.Errorf("obstacle %v: file %v, released %v", obstacle, err, b.released)
		}
		if st := r.Status(); st.Lease != "" || strings.Contains(st.Problem, "rejected: quarantined; left to do") != obstacle {
			t.Errorf("obstacle %v: %+v", obstacle, st)
		}
	}
}
