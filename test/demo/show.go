package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/lab"
)

func makeTPM(ctx context.Context, d *demo) (detail string, err error) {
	if d.tpmCA, err = lab.NewTPMCA(filepath.Join(d.dir, "tpm-ca")); err != nil {
		return "", err
	}
	d.tpm, err = lab.StartTPM(ctx, filepath.Join(d.dir, "tpm"), d.tpmCA, lab.TPMOptions{})
	return "swtpm with RSA-2048, P-256 and P-384 endorsement keys", err
}

func startServices(ctx context.Context, d *demo) (detail string, err error) {
	if d.vault, err = lab.StartVault(ctx, filepath.Join(d.dir, "vault")); err != nil {
		return "", err
	}
	if d.pg, err = lab.StartPostgres(ctx, filepath.Join(d.dir, "postgres")); err != nil {
		return "", err
	}
	if err := lab.ConfigureDatabase(ctx, d.vault, d.pg, lab.DatabaseRole{Name: "billing-ro", Database: "billing", DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour}); err != nil {
		return "", err
	}
	version, err := d.pg.Query(ctx, "postgres", "SHOW server_version")
	return "PostgreSQL " + strings.Join(version, ""), err
}

func startBroker(ctx context.Context, d *demo) (detail string, err error) {
	roots := filepath.Join(d.dir, "ek-roots.pem")
	root, intermediate := d.tpmCA.PEM()
	if f, err := os.OpenFile(roots, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
		if _, err := f.Write(append(root, intermediate...)); err != nil {
			return "", err
		}
		if err := f.Close(); err != nil {
			return "", err
		}
	}
	dir := filepath.Join(d.dir, "broker")
	token := filepath.Join(dir, "vault-token")
	if d.broker, err = lab.NewBroker(ctx, dir, lab.BrokerOptions{EKRoots: []string{roots}, CA: `crl_every = "1m"`,
		Vault: fmt.Sprintf("address = %q\nca_file = %q\ntoken_file = %q", d.vault.Addr, d.vault.CACert, token)}); err != nil {
		return "", err
	}
	if err := os.MkdirAll(d.broker.Scopes(), 0o700); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(d.broker.Scopes(), "scopes.hcl"), []byte(scopes), 0o600); err != nil {
		return "", err
	}
	secret, err := lab.SetUpVault(ctx, d.vault, d.broker.Scopes())
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(token, []byte(secret), 0o600); err != nil {
		return "", err
	}
	if err := d.broker.Start(ctx); err != nil {
		d.broker = nil
		return "", err
	}
	return "https://" + d.broker.Addr, d.broker.ApplyScopes(ctx, scopes)
}

func verifyVault(ctx context.Context, d *demo) (string, error) {
	bin, err := lab.Program("countersign", false)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, bin, "vault", "verify", d.broker.Scopes())
	cmd.Env = append(os.Environ(), "VAULT_ADDR="+d.vault.Addr, "VAULT_CACERT="+d.vault.CACert, "VAULT_TOKEN="+d.vault.RootToken)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return "", nil
}

func joinHost(ctx context.Context, d *demo) (detail string, err error) {
	if d.machine, err = lab.NewMachine(ctx, filepath.Join(d.dir, "machine"), d.broker, d.tpm, credentials); err != nil {
		return "", err
	}
	legacy := filepath.Join(d.dir, "legacy")
	if err := lab.BuildLegacy(ctx, legacy); err != nil {
		return "", err
	}
	if err := d.machine.LegacyUnit(ctx, "billing", legacy, d.pg.Port); err != nil {
		return "", err
	}
	if err := d.machine.BeforeStart(ctx, "billing", "billing-db"); err != nil {
		return "", err
	}
	if err := d.machine.WriteFile(ctx, "/etc/systemd/system/thief.service", []byte("[Service]\nExecStart=/bin/sleep infinity\n"), 0o644); err != nil {
		return "", err
	}
	if err := d.machine.Join(ctx, d.broker, "role=billing"); err != nil {
		return "", err
	}
	return "host " + d.machine.HostID, nil
}

type host struct {
	State      string `json:"state"`
	Reason     string `json:"state_reason"`
	Tier       string `json:"tier"`
	LastProved string `json:"last_proved"`
}

func (d *demo) host(ctx context.Context) (h host, err error) {
	err = d.broker.JSON(ctx, &h, "host", "show", d.machine.HostID)
	return h, err
}

func attestHost(ctx context.Context, d *demo) (string, error) {
	h, err := d.host(ctx)
	if err != nil {
		return "", err
	}
	if h.State != "trusted" || h.Tier != "certified" {
		return "", fmt.Errorf("the host is %s (%s), of tier %s", h.State, h.Reason, h.Tier)
	}
	// What the host shows in its first proof is what there is to learn.
	if _, err := until(ctx, 20*time.Second, func() (bool, string, error) {
		_, err := d.broker.CLI(ctx, "reference", "learn", "demo-hosts", "--host", d.machine.HostID)
		if err != nil && strings.Contains(err.Error(), "has not proven itself") {
			return false, err.Error(), nil
		}
		return err == nil, "learned", err
	}); err != nil {
		return "", err
	}
	_, err = d.broker.CLI(ctx, "reference", "approve", "demo-hosts")
	return "state trusted, tier certified", err
}

// until polls, and says at the end what it last saw.
func until(ctx context.Context, limit time.Duration, look func() (bool, string, error)) (time.Duration, error) {
	start := time.Now()
	for {
		done, saw, err := look()
		if err != nil || done {
			return time.Since(start), err
		}
		if time.Since(start) > limit {
			return 0, fmt.Errorf("not within %v; last seen: %s", limit, saw)
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

type programStatus struct {
	User    string
	Queries int
	Failed  int
	Pools   int
	Error   string
}

func (d *demo) program(ctx context.Context) (st programStatus, err error) {
	out, err := d.machine.Sh(ctx, "tail -n 1 /var/lib/billing/status 2>/dev/null || true")
	if err == nil && strings.TrimSpace(out) != "" {
		err = json.Unmarshal([]byte(out), &st)
	}
	return st, err
}

// roles are PostgreSQL's own word on a user that Vault made.
func (d *demo) roles(ctx context.Context, name string) (int, error) {
	rows, err := d.pg.Query(ctx, "postgres", "SELECT rolname FROM pg_roles WHERE rolname = $1", name)
	return len(rows), err
}

// runProgram starts the program and waits until it gets in, as a user that
// Vault made.
func (d *demo) runProgram(ctx context.Context) error {
	if _, err := d.machine.Sh(ctx, "rm -f /var/lib/billing/status; systemctl start billing.service"); err != nil {
		return err
	}
	_, err := until(ctx, 20*time.Second, func() (bool, string, error) {
		st, err := d.program(ctx)
		d.user = st.User
		return strings.HasPrefix(st.User, "v-"), fmt.Sprintf("%+v", st), err
	})
	return err
}

func startProgram(ctx context.Context, d *demo) (string, error) {
	if err := d.runProgram(ctx); err != nil {
		return "", err
	}
	sessions, err := d.pg.Query(ctx, "postgres", "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE datname = 'billing' AND usename = $1", d.user)
	if err != nil {
		return "", err
	}
	if len(sessions) != 1 {
		return "", fmt.Errorf("PostgreSQL has no session of %s", d.user)
	}
	return d.user, nil
}

func handshake(ctx context.Context, d *demo) (string, error) {
	if _, err := until(ctx, 20*time.Second, func() (bool, string, error) {
		out, _ := d.machine.Sh(ctx, "ls /etc/billing")
		return strings.Contains(out, "tls.crt"), out, nil
	}); err != nil {
		return "", err
	}
	out, err := d.machine.Sh(ctx, `cd /etc/billing
openssl s_server -accept 127.0.0.1:18843 -cert tls.crt -cert_chain tls.crt -key tls.key -CAfile ca.crt -Verify 1 -verify_return_error -quiet >/dev/null 2>&1 & server=$!
sleep 0.5
echo | openssl s_client -connect 127.0.0.1:18843 -CAfile ca.crt -cert tls.crt -cert_chain tls.crt -key tls.key -verify_hostname billing.example.com -verify_return_error 2>&1; code=$?
kill $server
exit $code`)
	if err != nil {
		return "", err
	}
	if !strings.Contains(out, "Verify return code: 0 (ok)") {
		return "", fmt.Errorf("openssl says:\n%s", out)
	}
	uri, err := d.machine.Sh(ctx, "openssl x509 -in /etc/billing/tls.crt -noout -ext subjectAltName | tail -n 1")
	return strings.TrimSpace(uri), err
}

func rotation(ctx context.Context, d *demo) (string, error) {
	before := d.user
	if _, err := until(ctx, 90*time.Second, func() (bool, string, error) {
		st, err := d.program(ctx)
		return st.Pools >= 2 && st.User != before && st.User != "", fmt.Sprintf("%+v", st), err
	}); err != nil {
		return "", err
	}
	if _, err := until(ctx, 30*time.Second, func() (bool, string, error) {
		n, err := d.roles(ctx, before)
		return n == 0, before + " is still there", err
	}); err != nil {
		return "", err
	}
	st, err := d.program(ctx)
	if err != nil {
		return "", err
	}
	d.user = st.User
	if st.Failed != 0 {
		return "", fmt.Errorf("%d of %d queries failed: %s", st.Failed, st.Queries, st.Error)
	}
	return fmt.Sprintf("%d queries, %d failed; %s is gone, %s goes on", st.Queries, st.Failed, before, st.User), nil
}

func refused(ctx context.Context, d *demo) (string, error) {
	if _, err := d.machine.Sh(ctx, "systemctl start thief.service"); err != nil {
		return "", err
	}
	if _, err := until(ctx, 20*time.Second, func() (bool, string, error) {
		out, err := d.machine.Sh(ctx, "countersign-agent status -o json")
		return strings.Contains(out, "refused (process"), out, err
	}); err != nil {
		return "", err
	}
	if out, err := d.machine.Sh(ctx, "ls /etc/thief.properties 2>&1 || true"); err != nil || !strings.Contains(out, "No such file") {
		return "", fmt.Errorf("the thief has a file: %s", out)
	}
	var why struct {
		Outcome   string `json:"outcome"`
		Reason    string `json:"reason"`
		Selectors []struct{ Name, Wanted, Saw, Result string }
	}
	// The verb's exit code says no; its words are what we are after.
	out, said := d.broker.CLI(ctx, "why", d.machine.HostID, "billing-db", "-o", "json")
	if err := json.Unmarshal(out, &why); err != nil {
		return "", fmt.Errorf("%w: %q, %w", err, out, said)
	}
	for _, s := range why.Selectors {
		if s.Name == "process.unit" && s.Result == "fail" {
			return fmt.Sprintf("`why` says %s wanted %s, saw %s", s.Name, s.Wanted, s.Saw), nil
		}
	}
	return "", fmt.Errorf("why says %+v", why)
}

func replay(ctx context.Context, d *demo) (string, error) {
	if _, err := d.machine.Sh(ctx, "systemctl stop thief.service"); err != nil {
		return "", err
	}
	h, err := lab.NewSoftHost(d.broker, d.tpmCA)
	if err != nil {
		return "", err
	}
	token, err := d.broker.JoinToken(ctx, "role=other")
	if err != nil {
		return "", err
	}
	if _, err := h.Join(ctx, token); err != nil {
		return "", err
	}
	s, err := h.Dial(ctx)
	if err != nil {
		return "", err
	}
	defer func() { _ = s.Close() }()
	recorded, err := h.Attest(ctx, s, evidence.CallProve, &v1.ProveBody{Host: h.Facts()})
	if err != nil {
		return "", err
	}
	send := func(s *api.Session) error {
		_, err := s.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: recorded}))
		return err
	}
	if err := send(s); err != nil {
		return "", fmt.Errorf("the request itself: %w", err)
	}
	other, err := h.Dial(ctx)
	if err != nil {
		return "", err
	}
	defer func() { _ = other.Close() }()
	for where, session := range map[string]*api.Session{"the same connection": s, "another connection": other} {
		if err := send(session); err == nil {
			return "", fmt.Errorf("played again on %s it was taken", where)
		} else if e := api.FromConnect(err); e.Outcome != api.Retry {
			return "", fmt.Errorf("on %s: %w", where, e)
		}
	}
	return "on the same connection and on another", nil
}

func sealed(ctx context.Context, d *demo) (string, error) {
	before, err := d.program(ctx)
	if err != nil {
		return "", err
	}
	if err := d.vault.Seal(ctx); err != nil {
		return "", err
	}
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(12 * time.Second): // two proofs, and more
	}
	during, err := d.program(ctx)
	if err != nil {
		return "", err
	}
	if err := d.vault.Unseal(ctx); err != nil {
		return "", err
	}
	if during.Failed != before.Failed || during.Queries == before.Queries {
		return "", fmt.Errorf("before %+v, sealed %+v", before, during)
	}
	// And rotation goes on.
	if _, err := until(ctx, 90*time.Second, func() (bool, string, error) {
		st, err := d.program(ctx)
		return st.Pools > during.Pools, fmt.Sprintf("%+v", st), err
	}); err != nil {
		return "", err
	}
	after, err := d.program(ctx)
	if err != nil {
		return "", err
	}
	d.user = after.User
	if after.Failed != before.Failed {
		return "", fmt.Errorf("%d queries failed: %s", after.Failed, after.Error)
	}
	return fmt.Sprintf("%d queries while it was sealed, 0 failed; rotated after", during.Queries-before.Queries), nil
}

func ends(ctx context.Context, d *demo) (string, error) {
	if _, err := d.machine.Sh(ctx, "systemctl stop billing.service"); err != nil {
		return "", err
	}
	took, err := until(ctx, 5*time.Second, func() (bool, string, error) {
		n, err := d.roles(ctx, d.user)
		if err != nil || n > 0 {
			return false, d.user + " is still there", err
		}
		// Its certificate is another credential, whose file goes by itself.
		out, err := d.machine.Sh(ctx, "ls /etc/billing")
		return strings.TrimSpace(out) == "", "still there: " + out, err
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%.1f s after the stop", took.Seconds()), nil
}

func pcrChanges(ctx context.Context, d *demo) (string, error) {
	if err := d.runProgram(ctx); err != nil {
		return "", err
	}
	if err := d.tpm.Extend(4, []byte("another boot loader")); err != nil {
		return "", err
	}
	took, err := until(ctx, 15*time.Second, func() (bool, string, error) {
		h, err := d.host(ctx)
		if err != nil || h.State != "failed" {
			return false, "host " + h.State, err
		}
		n, err := d.roles(ctx, d.user)
		return n == 0, d.user + " is still there", err
	})
	if err != nil {
		return "", err
	}
	h, err := d.host(ctx)
	if err != nil {
		return "", err
	}
	reason, _, _ := strings.Cut(h.Reason, " is ")
	return fmt.Sprintf("%.1f s; %s", took.Seconds(), reason), nil
}

func verifyAudit(ctx context.Context, d *demo) (string, error) {
	out, err := d.broker.CLI(ctx, "audit", "verify")
	if err != nil {
		return "", err
	}
	proof, err := d.broker.CLI(ctx, "audit", "receipt", "0")
	if err != nil {
		return "", err
	}
	file := filepath.Join(d.dir, "receipt.json")
	if err := os.WriteFile(file, proof, 0o600); err != nil {
		return "", err
	}
	if _, err := d.broker.CLI(ctx, "audit", "check", file, "--key-file", filepath.Join(d.broker.State(), "audit.pub")); err != nil {
		return "", err
	}
	bin, err := lab.Program("countersign", false)
	if err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, bin, "fsck", "-c", d.broker.Config()).CombinedOutput(); err != nil {
		return "", fmt.Errorf("fsck: %w: %s", err, out)
	}
	return strings.TrimSpace(string(out)), nil
}
