// Package packaging_test starts the units of packaging/systemd in a real systemd.
package packaging_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// What has secrets in memory may not be swapped, and a systemd understands each line of its unit.
// The programs are stood in for: what is tried is what surrounds them.
func TestUnits(t *testing.T) {
	ctx := check.Within(t, 3*time.Minute)
	s := check.Must(lab.BootSystemd(ctx, t.TempDir()))(t)
	t.Cleanup(func() { check.Nil(t, s.Poweroff(check.Within(t, time.Minute))) })
	run := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(string(check.Must(s.Run(ctx, args...))(t)))
	}

	folder := filepath.Join("..", "..", "packaging", "systemd")
	drop := check.Must(filepath.Glob(filepath.Join(folder, "optional", "*.service.d", "*.conf")))(t)
	if len(drop) == 0 {
		t.Error("no drop-ins")
	}
	for _, name := range []string{"countersign-broker", "countersign-agent", "countersign-watch"} {
		unit := name + ".service"
		text := check.Must(os.ReadFile(filepath.Join(folder, unit)))(t)
		in := "/etc/systemd/system/" + unit
		check.Nil(t, s.WriteFile(ctx, in, text, 0o644))
		for _, path := range drop {
			if filepath.Base(filepath.Dir(path)) == unit+".d" {
				check.Nil(t, s.WriteFile(ctx, in+".d/"+filepath.Base(path), check.Must(os.ReadFile(path))(t), 0o644))
			}
		}
		check.Nil(t, s.WriteFile(ctx, in+".d/stand-in.conf", []byte("[Service]\nType=exec\nWatchdogSec=0\nExecStart=\nExecStart=/bin/sleep infinity\n"), 0o644))
	}
	run("systemctl", "daemon-reload")
	for _, name := range []string{"countersign-broker", "countersign-agent", "countersign-watch"} {
		run("systemctl", "start", name)
		if got := run("systemctl", "show", "--property=ActiveState,MemorySwapMax,LimitCORE", name); got != "LimitCORE=0\nMemorySwapMax=0\nActiveState=active" &&
			got != "MemorySwapMax=0\nLimitCORE=0\nActiveState=active" {
			t.Errorf("%s: %q", name, got)
		}
		group := "/sys/fs/cgroup" + run("systemctl", "show", "--property=ControlGroup", "--value", name)
		if strings.Contains(run("cat", "/sys/fs/cgroup/cgroup.controllers"), "memory") {
			if got := run("cat", group+"/memory.swap.max"); got != "0" {
				t.Errorf("%s may swap %s bytes", name, got)
			}
		}
	}
	if said := run("sh", "-c", "journalctl --no-pager -b | grep countersign- | grep -Ei 'ignoring|unknown|failed' || true"); said != "" {
		t.Errorf("systemd says: %s", said)
	}
}
