package systemd

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/process/collect"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/program"
)

// pollEvery is how often what sends no signal is looked at: a unit whose main
// process ended before its last one.
const pollEvery = 2 * time.Second

// A Kind is a [program.Kind] and a [program.Starter], safe for concurrent use.
type Kind struct {
	manager manager

	mu       sync.Mutex
	watchers map[string][]chan struct{} // guarded by mu; by unit
}

// New makes a Kind; the system manager is asked when a unit is.
func New() *Kind {
	k := &Kind{watchers: map[string][]chan struct{}{}}
	k.manager.changed = k.changed
	return k
}

// Close ends the connection to the system manager.
func (k *Kind) Close() { k.manager.close() }

// Describes reports whether p describes a unit.
func (*Kind) Describes(p config.Process) bool { return p.Unit != "" }

// Name adds to p its unit and invocation, where it is a service's main process.
func (k *Kind) Name(ctx context.Context, p *process.Program) error {
	name, ok := serviceOf(p.Linux.Cgroup)
	if !ok {
		return nil
	}
	u, err := k.manager.unit(ctx, name)
	if err != nil {
		return fmt.Errorf("pid %d is in unit %s's control group, and the system manager can't be asked: %w", p.PID, name, err)
	}
	if u.mainPID == p.PID && u.cgroup == p.Linux.Cgroup {
		p.Linux.Unit, p.Linux.Invocation = name, u.invocation
	}
	return nil
}

// Find returns the evidence of a unit: of its main process while it has one, of
// what it will run while it starts.
func (k *Kind) Find(ctx context.Context, p config.Process, _ string) (process.Program, error) {
	name := p.Unit
	u, err := k.manager.unit(ctx, name)
	if err != nil {
		return process.Program{}, err
	}
	switch {
	case u.mainPID != 0:
		return k.mainProcess(ctx, name, u)
	case u.active == "activating":
		return starting(name, u)
	case populated(u.cgroup):
		return process.Program{}, fmt.Errorf("unit %s has lost its main process, and others of it still run", name)
	}
	return process.Program{}, fmt.Errorf("%w: unit %s is %s", program.ErrNotRunning, name, u.active)
}

func (k *Kind) mainProcess(ctx context.Context, name string, u unit) (process.Program, error) {
	p, err := program.Process(u.mainPID)
	if err != nil {
		return p, err
	}
	if p.Linux.Cgroup != u.cgroup {
		return p, fmt.Errorf("unit %s's main process %d is in control group %s, not in the unit's %s", name, u.mainPID, p.Linux.Cgroup, u.cgroup)
	}
	// The manager is asked again: what was read is of this invocation only if
	// it still is.
	again, err := k.manager.unit(ctx, name)
	if err != nil {
		return p, err
	}
	if again.mainPID != u.mainPID || again.invocation != u.invocation {
		return p, fmt.Errorf("%w: unit %s was restarted while it was looked at", program.ErrNotRunning, name)
	}
	p.Linux.Unit, p.Linux.Invocation = name, u.invocation
	return p, nil
}

// Starting returns the evidence of a unit that waits for its credential in an
// ExecStartPre.
func (k *Kind) Starting(ctx context.Context, name string) (process.Program, error) {
	u, err := k.manager.unit(ctx, name)
	if err != nil {
		return process.Program{}, err
	}
	if u.active != "activating" || u.mainPID != 0 {
		return process.Program{}, fmt.Errorf("unit %s is %s, not starting: `ready` belongs into its ExecStartPre", name, u.active)
	}
	return starting(name, u)
}

func starting(name string, u unit) (process.Program, error) {
	if u.execStart == "" || u.invocation == "" {
		return process.Program{}, fmt.Errorf("unit %s has no ExecStart", name)
	}
	if u.elsewhere != "" {
		return process.Program{}, fmt.Errorf("unit %s has %s=: what it will run is not the host's %s, and can be told only while it runs", name, u.elsewhere, u.execStart)
	}
	linux := &process.Linux{Unit: name, Invocation: u.invocation, Cgroup: u.cgroup}
	p := process.Program{Starting: true, Linux: linux}
	var err error
	if p.Boot, err = collect.BootID(); err != nil {
		return p, err
	}
	path, digest, err := collect.File(u.execStart)
	if err != nil {
		return p, fmt.Errorf("unit %s: ExecStart: %w", name, err)
	}
	p.Executables = process.OneFile(path, digest)
	p.User, linux.UID, linux.GID, err = identity(u.user, u.group)
	return p, err
}

// populated says whether any process is left in a control group.
func populated(cgroup string) bool {
	if cgroup == "" {
		return false
	}
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		b, err := os.ReadFile(root + cgroup + "/cgroup.events")
		if err == nil {
			return strings.Contains(string(b), "populated 1")
		}
	}
	b, err := os.ReadFile("/sys/fs/cgroup/systemd" + cgroup + "/cgroup.procs")
	return err == nil && len(b) > 0
}

// Watch sends when Find may answer differently, until ctx ends.
func (k *Kind) Watch(ctx context.Context, p config.Process) <-chan struct{} {
	out := make(chan struct{}, 1)
	k.mu.Lock()
	k.watchers[p.Unit] = append(k.watchers[p.Unit], out)
	k.mu.Unlock()
	go k.watchUnit(ctx, p.Unit, func() {
		select {
		case out <- struct{}{}:
		default:
		}
	})
	return out
}

// changed is called by the manager's signals, with "" for all units.
func (k *Kind) changed(unit string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, list := range k.watchers {
		if unit != "" && unit != name {
			continue
		}
		for _, w := range list {
			select {
			case w <- struct{}{}:
			default:
			}
		}
	}
}

// watchUnit covers what the manager sends no signal for: that it can't be
// reached, and that the last process of a unit without a main one ended.
func (k *Kind) watchUnit(ctx context.Context, name string, tell func()) {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	waiting := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if !k.manager.connected() {
			k.manager.connect(ctx)
			waiting = true
		}
		cgroup := k.manager.lastCgroup(name)
		if now := cgroup == "" || !populated(cgroup); now != waiting {
			waiting = now
			tell()
		}
	}
}
