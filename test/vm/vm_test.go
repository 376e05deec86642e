// Package vm proves the product on a whole machine: firmware, boot loader and
// kernel measure themselves into its TPM, and the kernel what it runs.
package vm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const (
	agent = "/usr/bin/countersign-agent"
	app   = "/usr/local/bin/app"
	file  = "/etc/billing/db.properties"
	uid   = 1000 // billing
)

const scopes = `
scope "billing-db" {
  reprove = "5s"
  grace   = "1h"
  host {
    labels      = { role = "billing" }
    tier        = ["certified"]
    secure_boot = true
    reference   = "vm"
    ima         = "required"
  }
  process {
    user = "billing"
    exe  = "/usr/local/bin/app"
  }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

const credential = `
credential "billing-db" {
  process {
    exe  = "/usr/local/bin/app"
    user = "billing"
  }
  file "/etc/billing/db.properties" {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "billing"
    group    = "billing"
    mode     = "0400"
  }
}
`

// A machine is a virtual machine whose agent has joined.
type machine struct {
	*lab.VM
	services *lab.Services
	broker   *lab.Broker
	host     string
}

// A whole machine joins, is learned, gets a credential, and loses it when a
// program runs that is not the one which was learned.
func TestChangedProgram(t *testing.T) {
	ctx := check.Within(t, 10*time.Minute)
	m := newMachine(t, ctx)
	if h := m.shown(t, ctx); h.State != "trusted" || h.Tier != "certified" {
		t.Errorf("after it joined: %+v; its TPM has certificates of a configured root", h)
	}

	// Everything runs once before it is learned, and what root will read to
	// deliver is read. Nothing is issued meanwhile.
	running := check.Must(m.Start(ctx, uid, app, file))(t)
	check.Must(m.Start(ctx, 0, agent, "serve"))(t)
	for _, name := range []string{"/etc/passwd", "/etc/group"} {
		check.Must(m.ReadFile(ctx, name))(t)
	}
	check.Eventually(t, 2*time.Minute, "all that ran is proven, under Secure Boot", func() (bool, string) {
		count := strings.TrimSpace(check.Must(m.ReadFile(ctx, "/sys/kernel/security/ima/runtime_measurements_count"))(t))
		facts, err := m.broker.CLI(ctx, "scope", "facts", "--host", m.host, "-o", "json")
		all := err == nil
		for _, fact := range []string{`"secure_boot":true`, `"ima":"verified"`, `"proven":` + count + `,`, `"kernel_command_line":"/vmlinuz `} {
			all = all && strings.Contains(string(facts), fact)
		}
		return all, fmt.Sprintf("%s entries: %s, %v", count, facts, err)
	})
	check.Eventually(t, time.Minute, "it is refused, for the reference set alone", func() (bool, string) {
		failed := m.failed(ctx)
		return slices.Equal(failed, []string{"host.reference"}), fmt.Sprint(failed)
	})
	if text, err := m.ReadFile(ctx, file); err == nil {
		t.Errorf("a file of %d bytes stands before the machine was learned", len(text))
	}
	check.Must(m.broker.CLI(ctx, "reference", "learn", "--host", m.host, "vm"))(t)
	check.Must(m.broker.CLI(ctx, "reference", "approve", "vm"))(t)

	user := m.login(t, ctx)
	leases := m.leases(t, ctx)
	if len(leases) != 1 || leases[0].State != "live" || leases[0].Names["db_username"] != user {
		t.Fatalf("leases: %+v, want a live one of %s", leases, user)
	}
	delivered := time.Now()
	check.Eventually(t, time.Minute, "a proof passes", func() (bool, string) {
		h := m.shown(t, ctx)
		return h.State == "trusted" && h.LastProved.After(delivered), fmt.Sprintf("%+v", h)
	})
	if after := m.leases(t, ctx); len(after) != 1 || after[0].ID != leases[0].ID || after[0].State != "live" {
		t.Fatalf("leases after a proof: %+v, want %s", after, leases[0].ID)
	}

	check.Nil(t, m.Change(ctx, app))
	changed := time.Now()
	other := check.Must(m.Start(ctx, uid, app, file))(t)
	check.Eventually(t, time.Minute, "the host is failed, with the program's path, and its user is gone", func() (bool, string) {
		h := m.shown(t, ctx)
		roles := check.Must(m.services.PG.Query(ctx, "postgres", "SELECT rolname FROM pg_roles WHERE rolname = $1", user))(t)
		return h.State == "failed" && strings.Contains(h.Reason, `"`+app+`" with sha256:`) && len(roles) == 0, fmt.Sprintf("%+v, roles %v", h, roles)
	})
	t.Logf("%v after the change: %s", time.Since(changed).Round(time.Millisecond), m.shown(t, ctx).Reason)
	check.Eventually(t, time.Minute, "the lease is confirmed gone, and the file", func() (bool, string) {
		_, err := m.ReadFile(ctx, file)
		leases := m.leases(t, ctx)
		return err != nil && len(leases) == 0, fmt.Sprintf("%+v, file: %v", leases, err)
	})

	// The learned one ends, and the agent asks again for the changed one.
	check.Nil(t, m.End(ctx, running))
	check.Eventually(t, time.Minute, "asking again is rejected", func() (bool, string) {
		out, err := m.Run(ctx, "", agent, "status", "-o", "json")
		var st struct {
			Credentials []struct{ Program, Problem string }
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &st)
		}
		return err == nil && len(st.Credentials) == 1 && strings.Contains(st.Credentials[0].Program, fmt.Sprintf("/%d/", other)) &&
			strings.Contains(st.Credentials[0].Problem, "rejected"), fmt.Sprintf("%s, %v", out, err)
	})
	if leases := m.leases(t, ctx); len(leases) != 0 {
		t.Errorf("leases: %+v", leases)
	}
	if _, err := m.ReadFile(ctx, file); err == nil {
		t.Error("a credential file stands")
	}
	if h := m.shown(t, ctx); h.State != "failed" {
		t.Errorf("host: %+v", h)
	}
}

// newMachine starts a broker and what it needs, boots a machine and has it join.
func newMachine(t *testing.T, ctx context.Context) *machine {
	t.Helper()
	services := check.Must(lab.StartServices(ctx))(t)
	t.Cleanup(func() { check.Nil(t, services.Close()) })
	dir := check.Must(services.Folder())(t)
	broker := check.Must(services.NewBrokerFor(ctx, dir, scopes, lab.BrokerOptions{Names: []string{lab.BrokerInVM}}))(t)
	t.Cleanup(func() {
		_ = broker.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(broker.Log())
			t.Logf("broker.log:\n%s", text)
		}
	})
	m := &machine{VM: boot(t, ctx, services, dir, broker), services: services, broker: broker}
	token := check.Must(broker.JoinToken(ctx, "role=billing"))(t)
	var joined struct {
		HostID string `json:"host_id"`
	}
	check.Nil(t, json.Unmarshal([]byte(check.Must(m.Run(ctx, token, agent, "join", "--token-file", "-", "-o", "json"))(t)), &joined))
	m.host = joined.HostID
	return m
}

// boot starts a machine that has the agent, its config and the app.
func boot(t *testing.T, ctx context.Context, services *lab.Services, dir string, broker *lab.Broker) *lab.VM {
	t.Helper()
	tpm := check.Must(lab.StartTPM(ctx, filepath.Join(dir, "tpm"), services.TPMCA, lab.TPMOptions{}))(t)
	program := filepath.Join(dir, "app")
	check.Nil(t, lab.BuildForVM(ctx, "./test/vm/app", program))
	config := fmt.Sprintf("broker {\n  addresses = [%q]\n  ca_sha256 = %q\n}\n%s", "https://"+lab.InVM(broker), broker.CASHA256, credential)
	start := time.Now()
	vm := check.Must(lab.StartVM(ctx, filepath.Join(dir, "vm"), tpm, broker,
		lab.VMFile{Path: agent, Source: check.Must(lab.Program("countersign-agent", false))(t), Mode: 0o755},
		lab.VMFile{Path: app, Source: program, Mode: 0o755},
		lab.VMFile{Path: "/etc/countersign/agent.hcl", Content: config, Mode: 0o600},
		lab.VMFile{Path: "/etc/passwd", Content: fmt.Sprintf("root:x:0:0::/:\nbilling:x:%d:%d::/:\n", uid, uid), Mode: 0o644},
		lab.VMFile{Path: "/etc/group", Content: fmt.Sprintf("root:x:0:\nbilling:x:%d:\n", uid), Mode: 0o644},
	))(t)
	t.Logf("booted in %v", time.Since(start).Round(time.Millisecond))
	t.Cleanup(func() {
		check.Nil(t, vm.Stop())
		if t.Failed() {
			t.Logf("console:\n%s", vm.Printed())
		}
	})
	return vm
}

// A host as `host show -o json` has it.
type host struct {
	State      string    `json:"state"`
	Reason     string    `json:"state_reason"`
	Tier       string    `json:"tier"`
	LastProved time.Time `json:"last_proved"`
}

func (m *machine) shown(t *testing.T, ctx context.Context) (h host) {
	t.Helper()
	check.Nil(t, m.broker.JSON(ctx, &h, "host", "show", m.host))
	return h
}

// failed are the selectors that `why` names as failed. Its exit status says
// refused, too.
func (m *machine) failed(ctx context.Context) (names []string) {
	out, _ := m.broker.CLI(ctx, "why", m.host, "billing-db")
	for _, line := range strings.Split(string(out), "\n") {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "fail" || f[0] == "absent") {
			names = append(names, f[1])
		}
	}
	return names
}

// A lease as `lease list -o json` shows it.
type lease struct {
	ID    string            `json:"id"`
	State string            `json:"state"`
	Names map[string]string `json:"names"`
}

func (m *machine) leases(t *testing.T, ctx context.Context) []lease {
	t.Helper()
	var out struct {
		Leases []lease `json:"leases"`
	}
	check.Nil(t, m.broker.JSON(ctx, &out, "lease", "list"))
	return out.Leases
}

// login waits for the credential file in the machine, and logs in to PostgreSQL
// with what stands in it.
func (m *machine) login(t *testing.T, ctx context.Context) (user string) {
	t.Helper()
	var text string
	check.Eventually(t, 2*time.Minute, "the credential file appears", func() (bool, string) {
		var err error
		text, err = m.ReadFile(ctx, file)
		return err == nil, fmt.Sprint(err, m.failed(ctx))
	})
	user, password, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(text), "user="), "\npassword=")
	conn := check.Must(pgx.Connect(ctx, m.services.PG.DSN(user, password, "billing")))(t)
	check.Nil(t, conn.Close(ctx))
	return user
}
