// Package config is the broker's configuration file: HCL, strict, every error
// of it at once. The comments of its fields are its manual.
package config

import (
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/internal/hclread"
)

// A Broker is the whole file.
type Broker struct {
	// StateDir holds the store, the keys and the local socket. Absolute.
	StateDir string `hcl:"state_dir"`
	// Listen is where hosts and operators connect, as "[::]:8443".
	Listen string `hcl:"listen"`
	// Names are the DNS names and IP addresses in the listener's certificate.
	Names []string `hcl:"names"`
	// TrustDomain is the SPIFFE trust domain of workloads' certificates.
	TrustDomain string `hcl:"trust_domain"`
	// KeyPasswordFile holds the password of the CAs' keys. Default:
	// key-password in StateDir.
	KeyPasswordFile string `hcl:"key_password_file,optional"`
	// EKRoots are PEM files with TPM vendors' roots and intermediates. A host
	// whose EK certificate chains to one is of tier "certified".
	EKRoots []string `hcl:"ek_roots,optional"`
	// PendingHosts caps how many hosts may wait for an operator. Default 1000.
	PendingHosts int `hcl:"pending_hosts,optional"`
	// BrakeHostsPerMinute is how many silent hosts may lose their leases a
	// minute before an operator's word is asked for. Default 5.
	BrakeHostsPerMinute int `hcl:"brake_hosts_per_minute,optional"`
	// MetricsListen serves /metrics, /healthz and /readyz in plain HTTP, as
	// "127.0.0.1:9464". Empty: nowhere.
	MetricsListen string `hcl:"metrics_listen,optional"`
	// KeepEnded is how long leases are kept after their end, as "2160h", which is 90
	// days and the default. At least a day. The audit log keeps them for good.
	KeepEnded string `hcl:"keep_ended,optional"`
	// LogFormat is "text" or "json". Default text.
	LogFormat string `hcl:"log_format,optional"`

	// DenialLog is the file that keeps what was taken away, for a restore of the store: best
	// on another disk than StateDir. Absolute. Default: denials.log in StateDir.
	DenialLog string `hcl:"denial_log,optional"`

	Vault *Vault `hcl:"vault,block"`
	CA    *CA    `hcl:"ca,block"`

	keepEnded time.Duration
}

// Retention is KeepEnded, parsed.
func (b *Broker) Retention() time.Duration { return b.keepEnded }

// Vault is where credentials of `vault` scopes come from. One of TokenFile,
// AppRole and Certificate says how the broker logs in.
type Vault struct {
	Address   string `hcl:"address"`
	CAFile    string `hcl:"ca_file,optional"`
	Namespace string `hcl:"namespace,optional"`
	// TokenFile is read anew when its token ends.
	TokenFile   string        `hcl:"token_file,optional"`
	AppRole     *AppRole      `hcl:"approle,block"`
	Certificate *VaultTLSAuth `hcl:"certificate,block"`
}

// AppRole logs in with a role id and a secret id.
type AppRole struct {
	Mount        string `hcl:"mount,optional"` // default "approle"
	RoleID       string `hcl:"role_id"`
	SecretIDFile string `hcl:"secret_id_file"`
}

// VaultTLSAuth logs in with a TLS certificate.
type VaultTLSAuth struct {
	Mount    string `hcl:"mount,optional"` // default "cert"
	Role     string `hcl:"role,optional"`
	CertFile string `hcl:"cert_file"`
	KeyFile  string `hcl:"key_file"`
}

// CA is the embedded smallstep authority for `certificate` scopes.
type CA struct {
	// CRLURL is where verifiers fetch the CRL; it stands in every certificate.
	// The broker serves it at /crl of MetricsListen. Empty: no CRL in
	// certificates.
	CRLURL string `hcl:"crl_url,optional"`
	// CRLEvery is how often the CRL is made anew. Default 5m.
	CRLEvery string `hcl:"crl_every,optional"`

	crlEvery time.Duration
}

// Every is CRLEvery, parsed.
func (c *CA) Every() time.Duration { return c.crlEvery }

// Load reads and checks a config file. A mistake is an hclread.Problems, which has all
// of them.
func Load(path string) (*Broker, error) {
	text, err := hclread.ReadConfig(path)
	if err != nil {
		return nil, fmt.Errorf("broker config: %w; -c names another, and docs/examples/broker.hcl is one to start from", err)
	}
	var b Broker
	if _, err := hclread.Config(path, text, &b); err != nil {
		return nil, fmt.Errorf("broker config:\n%w", err)
	}
	var problems hclread.Problems
	for _, wrong := range b.check() {
		problems = append(problems, hclread.Problem{File: path, Message: wrong})
	}
	if err := problems.Or(); err != nil {
		return nil, fmt.Errorf("broker config:\n%w", err)
	}
	return &b, nil
}

// check fills in defaults and returns what is wrong, in words.
func (b *Broker) check() (errs []string) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Sprintf(format, args...)) }
	if !filepath.IsAbs(b.StateDir) {
		bad("state_dir %q is not an absolute path", b.StateDir)
	}
	for name, addr := range map[string]string{"listen": b.Listen, "metrics_listen": b.MetricsListen} {
		if addr == "" && name == "metrics_listen" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			bad("%s %q is not HOST:PORT; an IPv6 address stands in brackets", name, addr)
		}
	}
	if len(b.Names) == 0 {
		bad("names is empty: agents check the name they dial against the certificate")
	}
	if b.TrustDomain == "" {
		bad("trust_domain is empty")
	}
	if b.KeyPasswordFile == "" {
		b.KeyPasswordFile = filepath.Join(b.StateDir, "key-password")
	}
	if b.DenialLog == "" {
		b.DenialLog = filepath.Join(b.StateDir, "denials.log")
	}
	if !filepath.IsAbs(b.DenialLog) {
		bad("denial_log %q is not an absolute path", b.DenialLog)
	}
	if b.PendingHosts == 0 {
		b.PendingHosts = 1000
	}
	if b.BrakeHostsPerMinute == 0 {
		b.BrakeHostsPerMinute = 5
	}
	if b.PendingHosts < 0 || b.BrakeHostsPerMinute < 0 {
		bad("pending_hosts and brake_hosts_per_minute are positive numbers")
	}
	b.keepEnded = 90 * 24 * time.Hour
	if b.KeepEnded != "" {
		d, err := time.ParseDuration(b.KeepEnded)
		if err != nil || d < 24*time.Hour {
			bad("keep_ended %q is not a duration of at least a day, as 2160h", b.KeepEnded)
		}
		b.keepEnded = d
	}
	switch b.LogFormat {
	case "", "text", "json":
	default:
		bad("log_format %q is neither text nor json", b.LogFormat)
	}
	if v := b.Vault; v != nil {
		ways := 0
		for _, set := range []bool{v.TokenFile != "", v.AppRole != nil, v.Certificate != nil} {
			if set {
				ways++
			}
		}
		if ways != 1 {
			bad("vault: one of token_file, approle and certificate says how to log in; %d are given", ways)
		}
	}
	if c := b.CA; c != nil {
		c.crlEvery = 5 * time.Minute
		if c.CRLEvery != "" {
			d, err := time.ParseDuration(c.CRLEvery)
			if err != nil || d < time.Second {
				bad("ca: crl_every %q is not a duration of at least a second, as 5m", c.CRLEvery)
			}
			c.crlEvery = d
		}
	}
	return errs
}

// Paths in the state folder.
func (b *Broker) StoreFile() string { return filepath.Join(b.StateDir, "store.db") }

// Socket is where root on the broker's own machine is an admin.
func (b *Broker) Socket() string { return filepath.Join(b.StateDir, "operator.sock") }
