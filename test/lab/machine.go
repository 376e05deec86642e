package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A Machine is a systemd of its own with the agent installed as a service, as
// packaging/systemd has it, and a software TPM.
type Machine struct {
	*Systemd
	TPM    *TPM
	HostID string // after Join

	root string // of the clone
}

// NewMachine boots a machine whose agent knows the broker b. Binds are as for
// BootSystemd.
func NewMachine(ctx context.Context, dir string, b *Broker, tpm *TPM, credentials string, binds ...string) (*Machine, error) {
	agent, err := Program("countersign-agent", false)
	if err != nil {
		return nil, err
	}
	root, err := repository()
	if err != nil {
		return nil, err
	}
	sys, err := BootSystemd(ctx, dir, append(binds, filepath.Dir(agent)+":/opt/countersign/bin", filepath.Dir(tpm.Socket)+":/run/lab-tpm")...)
	if err != nil {
		return nil, err
	}
	m := &Machine{Systemd: sys, TPM: tpm, root: root}
	if err := m.install(ctx, b, credentials); err != nil {
		return nil, errors.Join(err, sys.Poweroff(ctx))
	}
	return m, nil
}

func (m *Machine) install(ctx context.Context, b *Broker, credentials string) error {
	if _, err := m.Sh(ctx, "ln -sf /opt/countersign/bin/countersign-agent /usr/bin/countersign-agent && mkdir -p /etc/countersign"); err != nil {
		return err
	}
	if err := m.Configure(ctx, b, credentials); err != nil {
		return err
	}
	if err := m.installFile(ctx, "countersign-agent.service", "/etc/systemd/system/countersign-agent.service"); err != nil {
		return err
	}
	_, err := m.Sh(ctx, "systemctl daemon-reload")
	return err
}

// Configure writes the agent's config.
func (m *Machine) Configure(ctx context.Context, b *Broker, credentials string) error {
	config := fmt.Sprintf("broker {\n  addresses = [\"https://%s\"]\n  ca_sha256 = %q\n}\ntpm = \"unix:/run/lab-tpm/%s\"\n%s", b.Addr, b.CASHA256, filepath.Base(m.TPM.Socket), credentials)
	return m.WriteFile(ctx, "/etc/countersign/agent.hcl", []byte(config), 0o600)
}

func (m *Machine) installFile(ctx context.Context, name, to string) error {
	text, err := os.ReadFile(filepath.Join(m.root, "packaging", "systemd", name))
	if err != nil {
		return err
	}
	return m.WriteFile(ctx, to, text, 0o644)
}

// Sh runs a shell script in the machine.
func (m *Machine) Sh(ctx context.Context, script string) (string, error) {
	out, err := m.Run(ctx, "sh", "-c", script)
	return string(out), err
}

// Join has the broker admit the machine by a token with these labels, and
// starts the agent.
func (m *Machine) Join(ctx context.Context, b *Broker, labels ...string) error {
	token, err := b.JoinToken(ctx, labels...)
	if err != nil {
		return err
	}
	out, err := m.Sh(ctx, "echo "+token+" | countersign-agent join --token-file - -o json")
	if err != nil {
		return err
	}
	var joined struct {
		HostID string `json:"host_id"`
	}
	if err := json.Unmarshal([]byte(out), &joined); err != nil {
		return err
	}
	m.HostID = joined.HostID
	_, err = m.Sh(ctx, "systemctl start countersign-agent")
	return err
}

// LegacyUnit is a service that runs test/legacy, which lies at program on this
// machine, as a user of its own.
func (m *Machine) LegacyUnit(ctx context.Context, name, program string, port int) error {
	script := fmt.Sprintf("useradd --system %[1]s && mkdir -p /opt/%[1]s/bin /etc/%[1]s /var/lib/%[1]s && chown %[1]s /var/lib/%[1]s", name)
	if _, err := m.Sh(ctx, script); err != nil {
		return err
	}
	exe, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	if err := m.WriteFile(ctx, "/opt/"+name+"/bin/"+name+"d", exe, 0o755); err != nil {
		return err
	}
	unit := fmt.Sprintf(`[Unit]
Description=A legacy program
[Service]
User=%[1]s
ExecStart=/opt/%[1]s/bin/%[1]sd -file /etc/%[1]s/db.properties -port %[2]d -database billing -status /var/lib/%[1]s/status
Restart=no
`, name, port)
	if err := m.WriteFile(ctx, "/etc/systemd/system/"+name+".service", []byte(unit), 0o644); err != nil {
		return err
	}
	_, err = m.Sh(ctx, "systemctl daemon-reload")
	return err
}

// BeforeStart has the unit name wait for its credential, by the drop-in of
// packaging/systemd.
func (m *Machine) BeforeStart(ctx context.Context, name, credential string) error {
	text, err := os.ReadFile(filepath.Join(m.root, "packaging", "systemd", "before-start.conf"))
	if err != nil {
		return err
	}
	dir := "/etc/systemd/system/" + name + ".service.d"
	if _, err := m.Sh(ctx, "mkdir -p "+dir); err != nil {
		return err
	}
	if err := m.WriteFile(ctx, dir+"/countersign.conf", []byte(strings.ReplaceAll(string(text), "ready billing-db", "ready "+credential)), 0o644); err != nil {
		return err
	}
	_, err = m.Sh(ctx, "systemctl daemon-reload")
	return err
}

// BuildLegacy compiles test/legacy to path.
func BuildLegacy(ctx context.Context, path string) error { return build(ctx, "./test/legacy", path) }

// build compiles a program of the module so that it needs no libraries.
func build(ctx context.Context, pkg, path string, env ...string) error {
	root, err := repository()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)
	cmd.Dir = root
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, out)
	}
	return nil
}

// SetUpVault applies what the broker's scopes need, as a Vault operator does by
// `countersign vault setup`, and returns a token of the broker's policy. What an
// earlier broker's scopes needed is removed first, which setup never does.
func SetUpVault(ctx context.Context, v *Vault, scopes string) (token string, err error) {
	bin, err := Program("countersign", false)
	if err != nil {
		return "", err
	}
	client, err := v.Client()
	if err != nil {
		return "", err
	}
	for _, kind := range []string{"auth/token/roles", "sys/policies/acl"} {
		list, err := client.Logical().ListWithContext(ctx, kind)
		if err != nil {
			return "", err
		}
		if list == nil {
			continue
		}
		names, _ := list.Data["keys"].([]any)
		for _, name := range names {
			if text, _ := name.(string); strings.HasPrefix(text, "countersign-") {
				if _, err := client.Logical().DeleteWithContext(ctx, kind+"/"+text); err != nil {
					return "", err
				}
			}
		}
	}
	cmd := exec.CommandContext(ctx, bin, "vault", "setup", scopes)
	cmd.Env = append(os.Environ(), "VAULT_ADDR="+v.Addr, "VAULT_CACERT="+v.CACert, "VAULT_TOKEN="+v.RootToken)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("vault setup: %w: %s", err, out)
	}
	secret, err := client.Logical().WriteWithContext(ctx, "auth/token/create-orphan", map[string]any{
		"policies": []string{"countersign-broker"}, "no_default_policy": true, "period": "1h",
	})
	if err != nil {
		return "", err
	}
	return secret.Auth.ClientToken, nil
}
