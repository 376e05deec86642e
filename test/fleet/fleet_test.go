package fleet_test

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	size    = 1000
	renewed = 100 // of them, those that replace their credential
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// started is a broker of its own, whose hosts' TPMs are of the CA.
func started(t *testing.T, ctx context.Context) (*lab.Broker, *lab.TPMCA) {
	t.Helper()
	dir := t.TempDir()
	ca, err := lab.NewTPMCA(filepath.Join(dir, "tpmca"))
	check(t, err)
	roots := filepath.Join(dir, "ek-roots.pem")
	root, intermediate := ca.PEM()
	check(t, os.WriteFile(roots, append(root, intermediate...), 0o644))
	b, err := lab.NewBroker(ctx, filepath.Join(dir, "broker"), lab.BrokerOptions{EKRoots: []string{roots}, CA: "crl_every = \"5m\""})
	check(t, err)
	check(t, b.Start(ctx))
	t.Cleanup(func() {
		if err := b.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			text, _ := os.ReadFile(b.Log())
			t.Logf("broker.log:\n%.20000s", text)
		}
	})
	check(t, b.ApplyScopes(ctx, fleet.Scope))
	return b, ca
}

// A thousand hosts, whose keys are software's, join one broker by the front
// door, stay connected, get a credential each, prove themselves again and
// renew, with no error and nothing left over.
func TestAThousandSoftwareHosts(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	b, ca := started(t, ctx)

	start := time.Now()
	step := func(what string) {
		t.Logf("%6.1fs  %s; the broker has %d KiB in memory", time.Since(start).Seconds(), what, memory(t, b.PID()))
	}
	hosts, err := fleet.Join(ctx, b, ca, size)
	check(t, err)
	step("joined, with keys in software")
	check(t, fleet.Each(hosts, func(h *fleet.Host) error { return h.Connect(ctx) }))
	t.Cleanup(func() {
		for _, h := range hosts {
			_ = h.Session.Close()
		}
	})
	check(t, fleet.Each(hosts, func(h *fleet.Host) error { return h.Obtain(ctx) }))
	step("each has a credential")
	for range 2 {
		check(t, fleet.Each(hosts, func(h *fleet.Host) error { return h.Prove(ctx) }))
		step("proven")
	}
	check(t, fleet.Each(hosts[:renewed], func(h *fleet.Host) error { return h.Obtain(ctx) }))
	step("some renewed")
	check(t, fleet.Each(hosts, func(h *fleet.Host) error { return h.Prove(ctx) }))
	step("proven")

	var status struct {
		Hosts  map[string]json.Number `json:"hosts"` // by state
		Leases map[string]json.Number `json:"leases"`
		Alarms []string               `json:"alarms"`
	}
	check(t, b.JSON(ctx, &status, "status"))
	if want := map[string]json.Number{"trusted": number(size)}; !maps.Equal(status.Hosts, want) {
		t.Errorf("hosts: %v, want %v", status.Hosts, want)
	}
	if want := map[string]json.Number{"live": number(size), "retiring": number(renewed)}; !maps.Equal(status.Leases, want) {
		t.Errorf("leases: %v, want %v", status.Leases, want)
	}
	if len(status.Alarms) != 0 {
		t.Errorf("alarms: %v", status.Alarms)
	}
	bin, err := lab.Program("countersign", false)
	check(t, err)
	if out, err := exec.CommandContext(ctx, bin, "fsck", "-c", b.Config()).CombinedOutput(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

func number(n int) json.Number { return json.Number(strconv.Itoa(n)) }

func memory(t *testing.T, pid int) int {
	t.Helper()
	kib, _, err := fleet.Memory(pid)
	check(t, err)
	return kib
}
