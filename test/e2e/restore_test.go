package e2e_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const tlsScope = `
scope "tls" {
  host    { labels = { role = "billing" } }
  process { exe = "/opt/billing/bin/billingd" }
  certificate {
    dns = ["billing.lab.example"]
    ttl = "24h"
  }
}
`

// A past is a broker, a backup of it, and what was taken away after that backup.
type past struct {
	*bench
	backup                  string
	stays, lost, gone, late *lab.SoftHost
	token                   string
	inForce, revoked, after *v1.LeaseProof
	admin                   string // files of a removed operator
}

// newPast makes one.
func newPast(t *testing.T, ctx context.Context) *past {
	t.Helper()
	p := &past{bench: newBrokerWith(t, softScope+tlsScope, lab.BrokerOptions{CA: `crl_every = "1s"`})}
	cli := func(args ...string) { t.Helper(); check.Must(p.broker.CLI(ctx, args...))(t) }
	issue := func(h *lab.SoftHost, scope string, pid int) *v1.LeaseProof {
		t.Helper()
		s := dial(t, h)
		program := check.Must(h.Program(softExe, "billing", pid))(t)
		body := h.IssueBody(scope, program)
		if scope == "tls" {
			key := check.Must(lab.NewECDSA())(t)
			body.Csr = check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
		}
		r := check.Must(h.Issue(ctx, s, body))(t)
		return &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: scope, Program: program, Ticket: r.GetTicket()}
	}

	p.stays, p.lost, p.gone = joined(t, p.bench, services.TPMCA), joined(t, p.bench, services.TPMCA), joined(t, p.bench, services.TPMCA)
	p.inForce, p.revoked = issue(p.stays, "soft", 7), issue(p.stays, "soft", 8)
	early := issue(p.stays, "tls", 9)
	issue(p.lost, "soft", 7)
	p.token = check.Must(p.broker.JoinToken(ctx, "role=billing"))(t)
	p.admin = filepath.Join(p.dir, "leaver")
	cli("operator", "add", "leaver", "--role", "admin", "--out", p.admin)

	p.backup = filepath.Join(p.dir, "before.db")
	check.Must(exec.Command(check.Must(lab.Program("countersign", false))(t), "broker", "backup", p.backup, "-c", p.broker.Config()).CombinedOutput())(t)

	cli("host", "quarantine", p.lost.ID, "--reason", "the laptop is lost")
	cli("host", "remove", p.gone.ID, "--reason", "sold")
	cli("operator", "remove", "leaver")
	p.late = check.Must(lab.NewSoftHost(p.broker, services.TPMCA))(t)
	check.Must(p.late.Join(ctx, p.token))(t)
	p.after = issue(p.stays, "soft", 10)
	lateCert := issue(p.stays, "tls", 11)
	for _, l := range []*v1.LeaseProof{p.revoked, p.after, early, lateCert} {
		cli("lease", "revoke", l.LeaseId)
		p.ended(t, l.LeaseId)
	}
	cli("host", "quarantine", p.late.ID, "--reason", "joined by a stolen token")
	check.Eventually(t, 30*time.Second, "both certificates are on the CRL", func() (bool, string) {
		n := p.crl(t)
		return n == 2, fmt.Sprint(n)
	})
	return p
}

// crl returns how many certificates the newest CRL lists; -1: there is none.
func (p *past) crl(t *testing.T) int {
	t.Helper()
	r, err := http.Get("http://" + p.broker.Metrics + "/crl")
	if err != nil || r.StatusCode != http.StatusOK {
		return -1
	}
	defer func() { _ = r.Body.Close() }()
	return len(check.Must(x509.ParseRevocationList(check.Must(io.ReadAll(r.Body))(t)))(t).RevokedCertificateEntries)
}

// restore stops the broker, puts the backup in place with the verb, and starts it.
func (p *past) restore(t *testing.T, ctx context.Context, args ...string) string {
	t.Helper()
	check.Nil(t, p.broker.Stop())
	for _, ending := range []string{"", "-wal", "-shm"} {
		_ = os.Remove(filepath.Join(p.broker.State(), "store.db"+ending))
	}
	args = append([]string{"broker", "restore", p.backup, "-c", p.broker.Config()}, args...)
	out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	check.Nil(t, p.broker.Start(ctx))
	return string(out)
}

// remote runs status as the removed operator.
func (p *past) remote(ctx context.Context, t *testing.T, files string) (string, error) {
	out, err := exec.CommandContext(ctx, check.Must(lab.Program("countersign", false))(t), "--address", "https://"+p.broker.Addr, "--ca-sha256", p.broker.CASHA256,
		"--cert", files+".crt", "--key", files+".key", "status").CombinedOutput()
	return string(out), err
}

// outcomes proves the host that stays, with these leases.
func (p *past) outcomes(t *testing.T, ctx context.Context, leases ...*v1.LeaseProof) (out []string) {
	t.Helper()
	for _, v := range check.Must(p.stays.Prove(ctx, dial(t, p.stays), nil, leases...))(t).GetLeases() {
		out = append(out, v.GetOutcome())
	}
	return out
}

// takenAway fails unless what was taken away after the backup is away.
func (p *past) takenAway(t *testing.T, ctx context.Context) {
	t.Helper()
	for _, c := range []struct {
		host         *lab.SoftHost
		state, check string
	}{{p.lost, "quarantined", "host-quarantined"}, {p.gone, "removed", "host-removed"}, {p.late, "quarantined", "host-quarantined"}} {
		if state := p.hostState(t, c.host.ID); state != c.state {
			t.Errorf("host %s is %s, want %s", c.host.ID, state, c.state)
		}
		_, err := c.host.Nonce(ctx, dial(t, c.host))
		outcome(t, err, api.Rejected, c.check)
		again := *c.host // keeps its certificate
		_, err = again.Join(ctx, check.Must(p.broker.JoinToken(ctx, "role=billing"))(t))
		outcome(t, err, api.Rejected, c.check)
	}
	if reason := string(check.Must(p.broker.CLI(ctx, "host", "show", p.lost.ID))(t)); !strings.Contains(reason, "the laptop is lost") {
		t.Errorf("its reason: %s", reason)
	}
	if out, err := p.remote(ctx, t, p.admin); err == nil {
		t.Errorf("a removed operator is answered: %s", out)
	}
	_, err := check.Must(lab.NewSoftHost(p.broker, services.TPMCA))(t).Join(ctx, p.token)
	outcome(t, err, api.Refused, "join-token")
	if n := p.crl(t); n < 2 {
		t.Errorf("the CRL lists %d certificates, and had 2", n)
	}
	if got := p.outcomes(t, ctx, p.inForce, p.revoked, p.after); !slices.Equal(got, []string{"live", "gone", "gone"}) {
		t.Errorf("the leases in force, revoked, and issued and revoked after the backup are %v", got)
	}
	p.ended(t, p.revoked.LeaseId)
	if found := p.fsck(t); len(found) > 0 {
		t.Errorf("fsck: %q", found)
	}
}

// A backup revives nothing that was taken away after it.
func TestARestoreRevivesNothing(t *testing.T) {
	ctx := check.Within(t, 4*time.Minute)
	p := newPast(t, ctx)
	own := filepath.Join(p.broker.State(), "denials.log")
	aside := filepath.Join(p.dir, "aside.log")
	issues := func() error {
		program := check.Must(p.stays.Program(softExe, "billing", 20))(t)
		_, err := p.stays.Issue(ctx, dial(t, p.stays), p.stays.IssueBody("soft", program))
		return err
	}

	t.Run("with the broker's own denial log", func(t *testing.T) {
		if out := p.restore(t, ctx); !strings.Contains(out, "taken away again") {
			t.Errorf("restore: %s", out)
		}
		check.Nil(t, issues())
		p.takenAway(t, ctx)
	})
	t.Run("put in place by hand", func(t *testing.T) {
		check.Nil(t, p.broker.Stop())
		for _, ending := range []string{"-wal", "-shm"} {
			_ = os.Remove(filepath.Join(p.broker.State(), "store.db"+ending))
		}
		check.Nil(t, os.WriteFile(filepath.Join(p.broker.State(), "store.db"), check.Must(os.ReadFile(p.backup))(t), 0o600))
		check.Nil(t, p.broker.Start(ctx))
		check.Nil(t, issues())
		p.takenAway(t, ctx)
	})
	check.Nil(t, os.WriteFile(aside, check.Must(os.ReadFile(own))(t), 0o600))
	t.Run("with a copy", func(t *testing.T) {
		check.Nil(t, os.Remove(own))
		p.restore(t, ctx, "--denial-log", aside)
		check.Nil(t, issues())
		p.takenAway(t, ctx)
	})

	t.Run("with none", func(t *testing.T) {
		check.Nil(t, os.Remove(own))
		if out := p.restore(t, ctx); !strings.Contains(out, "broker acknowledge") {
			t.Errorf("restore: %s", out)
		}
		outcome(t, issues(), api.Fault, api.CheckHeld)
		if got := p.outcomes(t, ctx, p.inForce, p.after); !slices.Equal(got, []string{"live", "fault"}) {
			t.Errorf("the lease in force, and the one to be adopted, are %v", got)
		}
		if out, err := p.remote(ctx, t, p.admin); err == nil || !strings.Contains(out, "broker acknowledge") {
			t.Errorf("an operator from outside: %v: %s", err, out)
		}
		if status := string(check.Must(p.broker.CLI(ctx, "status"))(t)); !strings.Contains(status, "broker acknowledge") {
			t.Errorf("status: %s", status)
		}
		if n := p.crl(t); n < 2 {
			t.Errorf("the CRL lists %d certificates, and had 2", n)
		}
		again := *p.stays
		if pending := check.Must(again.Join(ctx, ""))(t); pending {
			t.Error("a host of the backup, with its keys, can't join again")
		}
		late := *p.late
		_, err := late.Join(ctx, p.token) // whose quarantine isn't known
		outcome(t, err, api.Fault, api.CheckHeld)
		// The store as it is now is no proof of anything: a restart keeps the hold.
		check.Nil(t, p.broker.Stop())
		check.Nil(t, p.broker.Start(ctx))
		outcome(t, issues(), api.Fault, api.CheckHeld)

		check.Must(p.broker.CLI(ctx, "broker", "acknowledge", "--reason", "a test"))(t)
		check.Nil(t, issues())
		if _, err := p.broker.CLI(ctx, "broker", "acknowledge"); err == nil {
			t.Error("acknowledged twice")
		}
		if out, err := p.remote(ctx, t, p.admin); err != nil {
			t.Errorf("an operator from outside, acknowledged: %v: %s", err, out)
		}
	})
	t.Run("with another broker's", func(t *testing.T) {
		check.Nil(t, p.broker.Stop())
		for _, ending := range []string{"", "-wal", "-shm"} {
			_ = os.Remove(filepath.Join(p.broker.State(), "store.db"+ending))
		}
		other := filepath.Join(newBroker(t, softScope, false).broker.State(), "denials.log")
		out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "broker", "restore", p.backup, "-c", p.broker.Config(), "--denial-log", other).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "audit key") {
			t.Errorf("%v: %s", err, out)
		}
		p.restore(t, ctx, "--denial-log", aside)
		p.takenAway(t, ctx)
	})
}
