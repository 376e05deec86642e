// Package faults kills, fills and steps the real programs, in their faults
// build, and looks afterwards whether the invariants hold: by fsck, by Vault's
// and by PostgreSQL's own state. A round whose failpoint was not hit fails.
package faults_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

var rounds = flag.Int("rounds", 1, "how often each fault is tried")

var services *lab.Services

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := withLab(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		code = 1
	}
	os.Exit(code)
}

func withLab(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if services, err = lab.StartServices(ctx); err != nil {
		return 1, err
	}
	defer func() { _ = services.Close() }()
	return m.Run(), nil
}

const scopes = `
scope "soft" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = "/opt/billing/bin/billingd" }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}

scope "sleeper" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = %q }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

// A site is one broker, started without faults.
type site struct {
	dir     string
	broker  *lab.Broker
	sleeper string // an exe that the agent's scope is for
}

func newSite(t *testing.T, o lab.BrokerOptions) *site {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	s := &site{dir: check.Must(services.Folder())(t)}
	s.sleeper = filepath.Join(s.dir, "sleeper")
	check.Nil(t, os.WriteFile(s.sleeper, check.Must(os.ReadFile("/bin/sleep"))(t), 0o755))
	o.Faults = true
	s.broker = check.Must(services.NewBrokerFor(ctx, s.dir, fmt.Sprintf(scopes, s.sleeper), o))(t)
	t.Cleanup(func() {
		_ = s.broker.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(s.broker.Log())
			t.Logf("broker.log:\n%s", text)
		}
	})
	return s
}

// newAgent is an agent that has joined, with a TPM of its own. It delivers to
// file what who runs the sleeper earns.
func (s *site) newAgent(t *testing.T, file string) *lab.Agent {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	tpm := check.Must(lab.StartTPM(ctx, filepath.Join(s.dir, "tpm"), services.TPMCA, lab.TPMOptions{}))(t)
	t.Cleanup(tpm.Stop)
	agent := check.Must(lab.NewAgent(filepath.Join(s.dir, "agent"), s.broker, tpm.Path(), fmt.Sprintf(`
credential "sleeper" {
  process { exe = %q }
  file %q { template = "user={{ .username }}\npassword={{ .password }}\nend\n" }
}`, s.sleeper, file), true))(t)
	check.Must(agent.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
	t.Cleanup(func() {
		_ = agent.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(agent.Log())
			t.Logf("agent.log:\n%s", text)
		}
	})
	return agent
}

// sleep runs the sleeper until end is called or the test ends.
func (s *site) sleep(t *testing.T) (end func()) {
	t.Helper()
	program := exec.Command(s.sleeper, "3600")
	check.Nil(t, program.Start())
	end = sync.OnceFunc(func() { _ = program.Process.Kill(); _ = program.Wait() })
	t.Cleanup(end)
	return end
}

type lease struct {
	ID    string            `json:"id"`
	State string            `json:"state"`
	Names map[string]string `json:"names"`
}

func (s *site) leases(t *testing.T, args ...string) []lease {
	t.Helper()
	var out struct {
		Leases []lease `json:"leases"`
	}
	check.Nil(t, s.broker.JSON(check.Within(t, time.Minute), &out, append([]string{"lease", "list"}, args...)...))
	return out.Leases
}

// invariants holds the journal against itself, against Vault and against
// PostgreSQL: nothing that works is unknown, unless it dies by itself within
// minutes, and nothing that is known as live is gone.
func (s *site) invariants(t *testing.T) {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	out, err := exec.CommandContext(ctx, check.Must(lab.Program("countersign", false))(t), "fsck", "-c", s.broker.Config(), "-o", "json").Output()
	if err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
	known := map[string]string{} // lease → state
	live := map[string]bool{}    // PostgreSQL users
	for _, l := range s.leases(t) {
		known[l.ID] = l.State
		if user := l.Names["db_username"]; user != "" && (l.State == "live" || l.State == "retiring") {
			live[user] = true
		}
	}
	roles := check.Must(services.PG.Query(ctx, "postgres", "SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%'"))(t)
	for user := range live {
		if !slices.Contains(roles, user) {
			t.Errorf("the journal says that %s is live; PostgreSQL has no such role", user)
		}
	}
	client := check.Must(services.Vault.Client())(t)
	list := check.Must(client.Logical().ListWithContext(ctx, "auth/token/accessors"))(t)
	for _, accessor := range list.Data["keys"].([]any) {
		found, err := client.Logical().WriteWithContext(ctx, "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
		if err != nil {
			continue // ended meanwhile
		}
		meta, _ := found.Data["meta"].(map[string]any)
		lease, _ := meta["grant"].(string)
		if lease == "" || !s.mine(meta) {
			continue
		}
		if state := known[lease]; state == "live" || state == "retiring" || state == "revoking" {
			continue
		}
		ttl, _ := found.Data["ttl"].(json.Number).Int64()
		if ttl > 125 {
			t.Errorf("Vault has a token of lease %s (%q in the journal) for another %d s", lease, known[lease], ttl)
		}
	}
	s.noSecrets(t)
}

// mine says whether a token was made for this site's hosts.
func (s *site) mine(meta map[string]any) bool {
	out, err := s.broker.CLI(context.Background(), "host", "show", fmt.Sprint(meta["host"]))
	return err == nil && len(out) > 0
}

// noSecrets looks for what must never be written into logs, store and audit.
func (s *site) noSecrets(t *testing.T) {
	t.Helper()
	for _, file := range []string{s.broker.Log(), filepath.Join(s.broker.State(), "store.db"), filepath.Join(s.broker.State(), "store.db-wal")} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, secret := range secretsIn(string(text)) {
			t.Errorf("%s holds %q", file, secret)
		}
	}
}

// secretsIn finds tokens and private keys.
func secretsIn(text string) (found []string) {
	for _, mark := range []string{"hvs.", "hvb.", "PRIVATE KEY-----"} {
		if i := strings.Index(text, mark); i >= 0 {
			found = append(found, text[i:min(i+12, len(text))])
		}
	}
	return found
}

func TestTheScanFindsSecrets(t *testing.T) {
	for _, planted := range []string{"x hvs.CAESIJ y", "-----BEGIN EC PRIVATE KEY-----"} {
		if len(secretsIn("log "+planted+" log")) == 0 {
			t.Errorf("%q was not found", planted)
		}
	}
}
