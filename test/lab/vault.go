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
	"syscall"

	"github.com/hashicorp/vault/api"
)

// Vault is a running Vault, or OpenBao, with a file audit device and its data in
// a directory.
type Vault struct {
	Addr      string // https://127.0.0.1:port; the same after Stop and Start
	CACert    string // file with the listener's CA certificate, PEM
	RootToken string
	AuditLog  string // the file audit device "file"

	dir       string
	unsealKey string
	process   *process
	client    *api.Client
}

// StartVault starts Vault on a free port with TLS, its storage, logs and keys in
// dir, initialises it, unseals it and turns on a file audit device. It runs vault
// or bao from PATH, or the development Vault that test/setup.sh built.
func StartVault(ctx context.Context, dir string) (*Vault, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "storage"), 0o700); err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	v := &Vault{
		Addr:     "https://" + addr,
		CACert:   filepath.Join(dir, "ca.pem"),
		AuditLog: filepath.Join(dir, "audit.log"),
		dir:      dir,
	}
	if err := writeServerCert(dir); err != nil {
		return nil, err
	}
	if v.client, err = v.newClient(); err != nil {
		return nil, err
	}
	if err := v.Start(ctx); err != nil {
		return nil, err
	}
	if err := v.initialize(ctx); err != nil {
		return nil, errors.Join(err, v.Stop())
	}
	return v, nil
}

// Start starts a stopped Vault again on the same address and storage, and
// unseals it.
func (v *Vault) Start(ctx context.Context) error {
	cmd, err := v.command(ctx)
	if err != nil {
		return err
	}
	if v.process, err = startProcess(cmd, filepath.Join(v.dir, "vault.log"), syscall.SIGTERM); err != nil {
		return err
	}
	err = v.process.await(ctx, func(ctx context.Context) error {
		_, err := v.client.Sys().SealStatusWithContext(ctx)
		return err
	})
	if err == nil && v.unsealKey != "" {
		err = v.Unseal(ctx)
	}
	if err != nil {
		return errors.Join(err, v.Stop())
	}
	return nil
}

// Stop ends the process; the storage stays. Stopping twice is no error.
func (v *Vault) Stop() error { return v.process.stop(syscall.SIGTERM) }

// Seal seals Vault, so that it answers 503 to everything but its status.
func (v *Vault) Seal(ctx context.Context) error {
	return v.client.Sys().SealWithContext(ctx)
}

// Unseal unseals Vault and waits until it is active.
func (v *Vault) Unseal(ctx context.Context) error {
	status, err := v.client.Sys().UnsealWithContext(ctx, v.unsealKey)
	if err != nil {
		return err
	}
	if status.Sealed {
		return errors.New("vault stays sealed after its unseal key was given")
	}
	return v.process.await(ctx, func(ctx context.Context) error {
		health, err := v.client.Sys().HealthWithContext(ctx)
		if err != nil {
			return err
		}
		if health.Sealed || health.Standby {
			return errors.New("vault is not active yet")
		}
		return nil
	})
}

// Client returns a new client with the root token. It retries nothing.
func (v *Vault) Client() (*api.Client, error) {
	c, err := v.newClient()
	if err != nil {
		return nil, err
	}
	c.SetToken(v.RootToken)
	return c, nil
}

func (v *Vault) newClient() (*api.Client, error) {
	conf := api.DefaultConfig()
	if conf.Error != nil {
		return nil, conf.Error
	}
	conf.Address = v.Addr
	conf.MaxRetries = 0
	if err := conf.ConfigureTLS(&api.TLSConfig{CACert: v.CACert}); err != nil {
		return nil, err
	}
	c, err := api.NewClient(conf)
	if err != nil {
		return nil, err
	}
	c.ClearToken()
	c.ClearNamespace()
	return c, nil
}

// initialize makes the keys, keeps them in init.json and turns on the audit
// device.
func (v *Vault) initialize(ctx context.Context) error {
	made, err := v.client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return err
	}
	v.unsealKey, v.RootToken = made.KeysB64[0], made.RootToken
	data, err := json.MarshalIndent(made, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(v.dir, "init.json"), data, 0o600); err != nil {
		return err
	}
	if err := v.Unseal(ctx); err != nil {
		return err
	}
	v.client.SetToken(v.RootToken)
	return v.client.Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{
		Type:    "file",
		Options: map[string]string{"file_path": v.AuditLog},
	})
}

// command returns the command line of whichever Vault there is.
func (v *Vault) command(ctx context.Context) (*exec.Cmd, error) {
	addr := strings.TrimPrefix(v.Addr, "https://")
	storage, cert, key := filepath.Join(v.dir, "storage"), filepath.Join(v.dir, "server.pem"), filepath.Join(v.dir, "server.key")
	for _, name := range []string{"vault", "bao"} {
		program, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		conf := map[string]any{
			"disable_mlock": true,
			"api_addr":      v.Addr,
			"storage":       map[string]any{"file": map[string]any{"path": storage}},
			"listener":      map[string]any{"tcp": map[string]any{"address": addr, "tls_cert_file": cert, "tls_key_file": key}},
		}
		if name == "bao" { // which takes audit devices from its config file alone, unless told otherwise
			conf["unsafe_allow_api_audit_creation"] = true
		}
		data, err := json.Marshal(conf)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(v.dir, "config.json")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return nil, err
		}
		return exec.Command(program, "server", "-config="+file), nil
	}
	program, err := developmentVault(ctx)
	if err != nil {
		return nil, err
	}
	return exec.Command(program, "-addr", addr, "-storage", storage, "-tls-cert", cert, "-tls-key", key), nil
}

// developmentVault asks test/setup.sh, which builds it, where the development
// Vault is.
func developmentVault(ctx context.Context) (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	setup := filepath.Join(root, "test", "setup.sh")
	out, err := exec.CommandContext(ctx, "sh", setup, "--where").Output()
	if err != nil {
		return "", fmt.Errorf("%s --where: %w", setup, err)
	}
	program := strings.TrimSpace(string(out))
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("no vault or bao in PATH, and no development Vault yet: run %s to build it: %w", setup, err)
	}
	return program, nil
}

// repository returns the root of the clone that holds the working directory.
func repository() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "test", "setup.sh")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not inside a clone of the project: run the lab from there", start)
		}
	}
}
