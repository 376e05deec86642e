package e2e_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

func scopeWith(name, reprove, grace string) string {
	return fmt.Sprintf(`
scope %q {
  reprove = %q
  grace   = %q
  host    { labels = { role = "billing" } }
  process { exe = "/opt/billing/bin/billingd" }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`, name, reprove, grace)
}

var shortScope = scopeWith("soft", "5s", "3s")

// proving keeps a host proving itself until the test ends or stop is called.
func proving(t *testing.T, h *lab.SoftHost, proofs func() []*v1.LeaseProof) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if s, err := h.Dial(ctx); err == nil {
				_, _ = h.Prove(ctx, s, nil, proofs()...)
				_ = s.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func nothing() []*v1.LeaseProof { return nil }

func TestSilentHosts(t *testing.T) {
	b := newBrokerWith(t, shortScope, lab.BrokerOptions{Extra: "brake_hosts_per_minute = 1"})
	ctx := check.Within(t, 3*time.Minute)
	issue := func(h *lab.SoftHost) string {
		t.Helper()
		return check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t).GetLeaseId()
	}
	var silent []*lab.SoftHost
	var leases []string
	for range 3 {
		h := joined(t, b, services.TPMCA)
		silent = append(silent, h)
		leases = append(leases, issue(h))
	}
	// Nobody else is heard: it may be us, so nothing is taken.
	time.Sleep(16 * time.Second)
	if live := b.leases(t, "--state", "live"); len(live) != 3 {
		t.Fatalf("with nobody heard %d of 3 leases live", len(live))
	}
	// Down for longer than every grace: nothing is taken after it either.
	check.Nil(t, b.broker.Stop())
	time.Sleep(12 * time.Second)
	check.Nil(t, b.broker.Start(ctx))
	time.Sleep(2 * time.Second)
	if live := b.leases(t, "--state", "live"); len(live) != 3 {
		t.Fatalf("after a restart %d of 3 leases live", len(live))
	}
	// Others are heard: one loses its lease, the brake holds the others.
	proving(t, joined(t, b, services.TPMCA), nothing)
	check.Eventually(t, 60*time.Second, "one silent host lost its lease, two are held", func() (bool, string) {
		var st struct {
			Alarms []string          `json:"alarms"`
			Hosts  map[string]string `json:"hosts"`
		}
		check.Nil(t, b.broker.JSON(ctx, &st, "status"))
		live := b.leases(t, "--state", "live")
		return len(live) == 2 && len(st.Alarms) == 1 && strings.Contains(st.Alarms[0], "2 silent hosts"), fmt.Sprintf("%d live, %+v", len(live), st)
	})
	for _, h := range silent {
		if state := b.hostState(t, h.ID); state != "stale" {
			t.Errorf("a silent host is %s", state)
		}
	}
	// An operator's word.
	for _, h := range silent {
		_, err := b.broker.CLI(ctx, "lease", "revoke", "--host", h.ID)
		check.Nil(t, err)
	}
	for _, id := range leases {
		b.ended(t, id)
	}
}

// A backup brought back opens an epoch; a lease that was issued after it comes
// back by its ticket, and the host's checkpoint is what tells.
func TestRestore(t *testing.T) {
	for _, verb := range []bool{true, false} {
		t.Run(fmt.Sprintf("by the verb=%v", verb), func(t *testing.T) {
			b := newBroker(t, shortScope, false)
			ctx := check.Within(t, 2*time.Minute)
			h := joined(t, b, services.TPMCA)
			store := filepath.Join(b.broker.State(), "store.db")
			backup := backedUp(t, b, h)

			s := dial(t, h)
			program := check.Must(h.Program(softExe, "billing", 7))(t)
			r := check.Must(h.Issue(ctx, s, h.IssueBody("soft", program)))(t)
			proof := &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: program, Ticket: r.GetTicket()}
			held := check.Must(h.Prove(ctx, s, nil, proof))(t).GetCheckpoint().GetNote()
			user := b.leases(t)[0].Names["db_username"]

			check.Nil(t, b.broker.Stop())
			check.Nil(t, os.Remove(store))
			for _, ending := range []string{"-wal", "-shm"} {
				_ = os.Remove(store + ending)
			}
			if verb {
				file := filepath.Join(b.dir, "backup.db")
				check.Nil(t, os.WriteFile(file, backup, 0o600))
				restore := func() ([]byte, error) {
					return exec.Command(check.Must(lab.Program("countersign", false))(t), "broker", "restore", file, "-c", b.broker.Config()).CombinedOutput()
				}
				// What a write-ahead log left behind holds must not get into the backup.
				check.Nil(t, os.WriteFile(store+"-wal", nil, 0o600))
				if out, err := restore(); err == nil || !strings.Contains(string(out), "store.db-wal exists") {
					t.Errorf("restored beside an old log: %v: %s", err, out)
				}
				check.Nil(t, os.Remove(store+"-wal"))
				out, err := restore()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			} else {
				check.Nil(t, os.WriteFile(store, backup, 0o600))
			}
			check.Nil(t, b.broker.Start(ctx))
			if known := b.leases(t); len(known) != 0 {
				t.Fatalf("the backup knows leases: %+v", known)
			}
			orphans := func() string {
				cmd := exec.CommandContext(ctx, check.Must(lab.Program("countersign", false))(t), "--socket", filepath.Join(b.broker.State(), "operator.sock"), "vault", "orphans")
				cmd.Env = append(os.Environ(), "VAULT_ADDR="+services.Vault.Addr, "VAULT_CACERT="+services.Vault.CACert, "VAULT_TOKEN="+services.Vault.RootToken)
				return string(check.Must(cmd.CombinedOutput())(t))
			}
			if out := orphans(); !strings.Contains(out, r.GetLeaseId()) {
				t.Errorf("orphans: want %s in\n%s", r.GetLeaseId(), out)
			}
			// A ticket is for its host alone.
			thief := joined(t, b, services.TPMCA)
			stolen := check.Must(thief.Prove(ctx, dial(t, thief), nil, &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: check.Must(thief.Program(softExe, "billing", 7))(t), Ticket: r.GetTicket()}))(t)
			if got := stolen.GetLeases()[0].GetOutcome(); got != "gone" {
				t.Errorf("another's ticket gave a lease: %s", got)
			}
			s = dial(t, h)
			p := check.Must(h.Prove(ctx, s, held, proof))(t)
			if out := orphans(); strings.Contains(out, r.GetLeaseId()) {
				t.Errorf("still an orphan after its host spoke for it:\n%s", out)
			}
			if got := p.GetLeases()[0].GetOutcome(); got != "live" {
				t.Errorf("the lease is %s: %s", got, p.GetLeases()[0].GetReason())
			}
			if note := string(p.GetCheckpoint().GetNote()); !strings.Contains(strings.SplitN(note, "\n", 2)[0], "/2") {
				t.Errorf("no second epoch: %q", note)
			}
			if live := b.leases(t, "--state", "live"); len(live) != 1 || live[0].Names["db_username"] != user || live[0].ID != r.GetLeaseId() {
				t.Errorf("leases: %+v, want %s back", live, r.GetLeaseId())
			}
			_, err := b.broker.CLI(ctx, "lease", "revoke", r.GetLeaseId())
			check.Nil(t, err)
			b.ended(t, r.GetLeaseId())
			if out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config()).CombinedOutput(); err != nil {
				t.Errorf("fsck: %v\n%s", err, out)
			}
		})
	}
}

// backedUp is a backup that was made by the verb while the host h kept the broker
// writing.
func backedUp(t *testing.T, b *bench, h *lab.SoftHost) []byte {
	t.Helper()
	ctx, cancel := context.WithCancel(check.Within(t, time.Minute))
	proved := make(chan error, 1)
	go func() {
		s, err := h.Dial(ctx)
		for err == nil && ctx.Err() == nil {
			_, err = h.Prove(context.WithoutCancel(ctx), s, nil)
		}
		proved <- err
	}()
	file := filepath.Join(b.dir, "backup while writing.db")
	backup := func() ([]byte, error) {
		return exec.Command(check.Must(lab.Program("countersign", false))(t), "broker", "backup", file, "-c", b.broker.Config()).CombinedOutput()
	}
	// What a try that was killed left behind is in nobody's way.
	check.Nil(t, os.WriteFile(file+".partial", []byte("half"), 0o600))
	out, err := backup()
	cancel()
	check.Nil(t, <-proved)
	if err != nil {
		t.Fatalf("broker backup: %v: %s", err, out)
	}
	text := check.Must(os.ReadFile(file))(t)
	if out, err := backup(); err == nil || !strings.Contains(string(out), "never overwrites") {
		t.Errorf("onto an existing file: %v: %s", err, out)
	}
	if left := check.Must(filepath.Glob(file + "?*"))(t); len(left) != 1 || left[0] != file+".denials" {
		t.Errorf("left beside the backup: %v", left)
	}
	return text
}

func TestRoles(t *testing.T) {
	b := newBroker(t, shortScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	bin := check.Must(lab.Program("countersign", false))(t)
	acts := []struct {
		need int // the first of roles that may
		args []string
	}{
		{0, []string{"host", "list"}},
		{0, []string{"audit", "verify"}},
		{0, []string{"scope", "plan", b.broker.Scopes()}},
		{0, []string{"finding", "list"}},
		{0, []string{"lease", "export"}},
		{1, []string{"lease", "revoke", "--scope", "soft"}},
		{1, []string{"host", "step-up", h.ID}},
		{1, []string{"canary", "list"}},
		{2, []string{"canary", "issue", "--scope", "soft"}},
		{2, []string{"join-token", "create"}},
		{2, []string{"host", "label", h.ID, "x=y"}},
		{3, []string{"scope", "apply", b.broker.Scopes()}},
		{3, []string{"operator", "add", "next", "--out", ""}},
	}
	for rank, role := range []string{"viewer", "responder", "operator", "admin"} {
		out := filepath.Join(b.dir, role)
		_, err := b.broker.CLI(ctx, "operator", "add", role, "--role", role, "--out", out)
		check.Nil(t, err)
		for i, act := range acts {
			args := append([]string{"--address", "https://" + b.broker.Addr, "--ca-sha256", b.broker.CASHA256, "--cert", out + ".crt", "--key", out + ".key"}, act.args...)
			if args[len(args)-1] == "" {
				args[len(args)-1] = filepath.Join(b.dir, fmt.Sprintf("next-%s-%d", role, i))
			}
			said, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
			switch {
			case rank >= act.need && err != nil:
				t.Errorf("%s: %v: %v: %s", role, act.args, err, said)
			case rank < act.need && err == nil:
				t.Errorf("%s may %v", role, act.args)
			case rank < act.need && !strings.Contains(string(said), "this needs the role"):
				t.Errorf("%s: %v: refused for another reason: %s", role, act.args, said)
			}
		}
	}
	// One name is one key, and one that is removed gives no access from then on.
	out := filepath.Join(b.dir, "admin")
	if _, err := b.broker.CLI(ctx, "operator", "add", "admin", "--role", "viewer", "--out", out+"2"); err == nil || !strings.Contains(err.Error(), "operator remove admin") {
		t.Errorf("a taken name: %v", err)
	}
	_, err := b.broker.CLI(ctx, "operator", "remove", "admin")
	check.Nil(t, err)
	removed := exec.CommandContext(ctx, bin, "--address", "https://"+b.broker.Addr, "--ca-sha256", b.broker.CASHA256, "--cert", out+".crt", "--key", out+".key", "status")
	if said, err := removed.CombinedOutput(); err == nil {
		t.Errorf("a removed operator sees the status: %s", said)
	}
	if list := string(check.Must(b.broker.CLI(ctx, "operator", "list"))(t)); strings.Contains(list, "admin") || !strings.Contains(list, "responder") {
		t.Errorf("operators: %s", list)
	}
	// A name that nothing has is a mistake, not an empty answer.
	for _, args := range [][]string{{"lease", "revoke", "--scope", "typo"}, {"host", "list", "--state", "bogus"}, {"operator", "remove", "nobody"}} {
		if out, err := b.broker.CLI(ctx, args...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	// A key that the operator CA never saw.
	stranger := check.Must(lab.SelfSigned(check.Must(lab.NewECDSA())(t)))(t)
	s := check.Must(h.DialWith(ctx, stranger))(t)
	defer func() { _ = s.Close() }()
	if _, err := s.Operators.GetStatus(ctx, connect.NewRequest(&v1.GetStatusRequest{})); err == nil {
		t.Error("a stranger saw the status")
	}
}

func TestImportTenThousandHosts(t *testing.T) {
	b := newBroker(t, shortScope, false)
	ctx := check.Within(t, 2*time.Minute)
	file := filepath.Join(b.dir, "hosts.csv")
	var text strings.Builder
	text.WriteString("name,ek_hash,labels,reference\n")
	for i := range 10_000 {
		ek := sha256.Sum256(fmt.Append(nil, i))
		fmt.Fprintf(&text, "web-%d,%s,env=prod;role=web,\n", i, hex.EncodeToString(ek[:]))
	}
	whole := text.String()
	check.Nil(t, os.WriteFile(file, []byte(whole+"web-x,abc,,\n"), 0o600))
	if out, err := b.broker.CLI(ctx, "host", "import", "-f", file); err == nil || !strings.Contains(string(out), "host 10001 (web-x)") {
		t.Errorf("a bad line: %v\n%s", err, out)
	}
	check.Nil(t, os.WriteFile(file, []byte(whole), 0o600))
	out, err := b.broker.CLI(ctx, "host", "import", "-f", file, "--dry-run")
	if err != nil || !strings.Contains(string(out), "10000 hosts could be added") {
		t.Errorf("dry run: %v\n%s", err, out)
	}
	count := func() int {
		var list struct{ Hosts []json.RawMessage }
		check.Nil(t, b.broker.JSON(ctx, &list, "host", "list", "-l", "role=web"))
		return len(list.Hosts)
	}
	if n := count(); n != 0 {
		t.Errorf("the dry run added %d hosts", n)
	}
	_, err = b.broker.CLI(ctx, "host", "import", "-f", file)
	check.Nil(t, err)
	if n := count(); n != 10_000 {
		t.Errorf("%d hosts, want 10000", n)
	}
	if out, err := b.broker.CLI(ctx, "host", "import", "-f", file); err == nil || !strings.Contains(string(out), "belongs to host") {
		t.Errorf("imported twice: %v", err)
	}
}

// With a dead address first and the live one on IPv6, a host is served.
func TestSeveralAddressesAndIPv6(t *testing.T) {
	b := newBrokerWith(t, shortScope, lab.BrokerOptions{Listen: "::1"})
	ctx := check.Within(t, time.Minute)
	b.agent = check.Must(lab.NewAgent(filepath.Join(b.dir, "agent"), b.broker, b.tpm.Path(), "", false))(t)
	config := lab.AgentConfig([]string{"https://127.0.0.1:1", "https://" + b.broker.Addr}, b.broker.CASHA256, b.tpm.Path(), b.agent.Dir, "")
	check.Nil(t, os.WriteFile(b.agent.Config(), []byte(config), 0o600))
	out, err := b.agent.Join(ctx, check.Must(b.broker.JoinToken(ctx))(t))
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err = b.agent.CLI(ctx, "doctor")
	if err == nil || !strings.Contains(string(out), "https://127.0.0.1:1") || !strings.Contains(string(out), b.broker.Addr) {
		t.Errorf("doctor: %v\n%s", err, out)
	}
}

// What Vault doesn't confirm is retried for as long as it takes, and shown.
func TestRevocationWaitsForVault(t *testing.T) {
	b := newBroker(t, shortScope, false)
	ctx := check.Within(t, 2*time.Minute)
	h := joined(t, b, services.TPMCA)
	id := check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t).GetLeaseId()
	check.Nil(t, services.Vault.Seal(ctx))
	t.Cleanup(func() { _ = services.Vault.Unseal(context.Background()) })
	_, err := b.broker.CLI(ctx, "lease", "revoke", id)
	check.Nil(t, err)
	check.Eventually(t, 20*time.Second, "the list shows attempts", func() (bool, string) {
		out, err := b.broker.CLI(ctx, "lease", "list", "--state", "revoking")
		return err == nil && strings.Contains(string(out), id) && strings.Contains(string(out), "attempt 2"), string(out)
	})
	check.Nil(t, services.Vault.Unseal(ctx))
	check.Eventually(t, 30*time.Second, "it is gone", func() (bool, string) {
		left := b.leases(t)
		return len(left) == 0, fmt.Sprintf("%+v", left)
	})
}
