package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Broker is the real program, with a config and a state folder of its own.
type Broker struct {
	Dir      string // of config, state, scopes and log
	Addr     string // HOST:PORT for hosts and operators
	Metrics  string // HOST:PORT
	CASHA256 string

	bin     string
	process *process
}

// BrokerOptions are the parts of a broker's config that tests vary.
type BrokerOptions struct {
	Faults  bool     // use the build with failpoints and a clock
	Program string   // a broker's program of another build; empty: as made here
	EKRoots []string // PEM files
	Vault   string   // the body of the vault block; empty: none
	Front   *Front   // what stands between NewBrokerFor's broker and its Vault
	CA      string   // the body of the ca block; empty: none
	Extra   string   // more lines of config
	Names   []string // beside localhost, 127.0.0.1, ::1 and Listen
	Listen  string   // the address to listen on; empty: 127.0.0.1
}

// Program is the path of one of the product's programs, as `make build` or the
// faults build left it; of the agent another where COUNTERSIGN_AGENT names one, which
// is how agents of other versions are tried.
func Program(name string, faults bool) (string, error) {
	if other := os.Getenv("COUNTERSIGN_AGENT"); other != "" && name == "countersign-agent" && !faults {
		return other, nil
	}
	root, err := repository()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "bin")
	if faults {
		dir = filepath.Join(dir, "faults")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: run `make build faults-build`", err)
	}
	return path, nil
}

var pinned = regexp.MustCompile(`ca_sha256 = "([0-9a-f]{64})"`)

// NewBroker writes a config to dir and initialises the broker; Start runs it.
func NewBroker(ctx context.Context, dir string, o BrokerOptions) (*Broker, error) {
	bin := o.Program
	if bin == "" {
		var err error
		if bin, err = Program("countersign", o.Faults); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b := &Broker{Dir: dir, bin: bin}
	var err error
	if b.Addr, err = freeAddr(); err != nil {
		return nil, err
	}
	names := append([]string{"localhost", "127.0.0.1", "::1"}, o.Names...)
	if o.Listen != "" {
		_, port, err := net.SplitHostPort(b.Addr)
		if err != nil {
			return nil, err
		}
		b.Addr, names = net.JoinHostPort(o.Listen, port), append(names, o.Listen)
	}
	if b.Metrics, err = freeAddr(); err != nil {
		return nil, err
	}
	config := fmt.Sprintf("state_dir = %q\nlisten = %q\nnames = %s\ntrust_domain = \"lab.example\"\nmetrics_listen = %q\nek_roots = %s\n%s\n",
		b.State(), b.Addr, hclList(names), b.Metrics, hclList(o.EKRoots), o.Extra)
	if o.Vault != "" {
		config += "vault {\n" + o.Vault + "\n}\n"
	}
	if o.CA != "" {
		config += "ca {\n" + o.CA + "\n}\n"
	}
	if err := os.WriteFile(b.Config(), []byte(config), 0o600); err != nil {
		return nil, err
	}
	out, err := b.run(ctx, "broker", "init", "-c", b.Config())
	if err != nil {
		return nil, err
	}
	m := pinned.FindSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("broker init printed no ca_sha256:\n%s", out)
	}
	b.CASHA256 = string(m[1])
	return b, nil
}

func hclList(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = fmt.Sprintf("%q", s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// Config is the broker's config file.
func (b *Broker) Config() string { return filepath.Join(b.Dir, "broker.hcl") }

// State is the broker's state folder.
func (b *Broker) State() string { return filepath.Join(b.Dir, "state") }

// Log is the file with the broker's log.
func (b *Broker) Log() string { return filepath.Join(b.Dir, "broker.log") }

// Start runs the broker until it accepts connections; env is added to its
// environment, for the faults build.
func (b *Broker) Start(ctx context.Context, env ...string) error {
	cmd := exec.Command(b.bin, "broker", "serve", "-c", b.Config())
	cmd.Env = append(os.Environ(), env...)
	var err error
	if b.process, err = startProcess(cmd, b.Log(), syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return b.process.await(ctx, func(ctx context.Context) error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", b.Addr)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// Stop ends the broker in order.
func (b *Broker) Stop() error { return b.process.stop(syscall.SIGTERM) }

// Kill ends the broker by SIGKILL.
func (b *Broker) Kill() error { return b.process.stop(syscall.SIGKILL) }

// Ended is closed when the broker's process has ended.
func (b *Broker) Ended() <-chan struct{} { return b.process.ended }

// CLI runs a verb as root on the broker's local socket and returns what it
// printed. The error of a verb that fails carries its words.
func (b *Broker) CLI(ctx context.Context, args ...string) ([]byte, error) {
	return b.run(ctx, append([]string{"--socket", filepath.Join(b.State(), "operator.sock")}, args...)...)
}

// JSON runs a verb with -o json and reads its answer into v.
func (b *Broker) JSON(ctx context.Context, v any, args ...string) error {
	out, err := b.CLI(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, v)
}

func (b *Broker) run(ctx context.Context, args ...string) ([]byte, error) {
	return output(exec.CommandContext(ctx, b.bin, args...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[1:], " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, err
}

// ApplyScopes writes a folder of one file and puts it in force.
func (b *Broker) ApplyScopes(ctx context.Context, hcl string) error {
	dir := b.Scopes()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "scopes.hcl"), []byte(hcl), 0o600); err != nil {
		return err
	}
	_, err := b.CLI(ctx, "scope", "apply", dir)
	return err
}

// Scopes is the folder that ApplyScopes writes.
func (b *Broker) Scopes() string { return filepath.Join(b.Dir, "scopes") }

// JoinToken makes a one-use token.
func (b *Broker) JoinToken(ctx context.Context, args ...string) (string, error) {
	out, err := b.CLI(ctx, append([]string{"join-token", "create"}, args...)...)
	return strings.TrimSpace(string(out)), err
}

// An Agent is the real program on this machine, with a TPM of the lab's.
type Agent struct {
	Dir   string
	Enter []string // what its command lines begin with, as Namespace.Enter has it

	bin     string
	process *process
}

// NewAgent writes an agent's config to dir; credentials are its blocks.
func NewAgent(dir string, b *Broker, tpmPath, credentials string, faults bool) (*Agent, error) {
	bin, err := Program("countersign-agent", faults)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a := &Agent{Dir: dir, bin: bin}
	return a, a.Configure(b, tpmPath, credentials)
}

// Configure writes the config anew.
func (a *Agent) Configure(b *Broker, tpmPath, credentials string) error {
	return os.WriteFile(a.Config(), []byte(AgentConfig([]string{"https://" + b.Addr}, b.CASHA256, tpmPath, a.Dir, credentials)), 0o600)
}

// AgentConfig is an agent's config with its folders below dir.
func AgentConfig(addresses []string, caSHA256, tpmPath, dir, credentials string) string {
	return fmt.Sprintf("broker {\n  addresses = %s\n  ca_sha256 = %q\n}\ntpm = %q\nstate_dir = %q\nrun_dir = %q\n%s\n",
		hclList(addresses), caSHA256, tpmPath, filepath.Join(dir, "state"), filepath.Join(dir, "run"), credentials)
}

// Config is the agent's config file.
func (a *Agent) Config() string { return filepath.Join(a.Dir, "agent.hcl") }

// Log is the file with the agent's log.
func (a *Agent) Log() string { return filepath.Join(a.Dir, "agent.log") }

// CLI runs one of the agent's verbs.
func (a *Agent) CLI(ctx context.Context, args ...string) ([]byte, error) {
	return output(a.command(ctx, append(args, "-c", a.Config())...))
}

func (a *Agent) command(ctx context.Context, args ...string) *exec.Cmd {
	line := slices.Concat(a.Enter, []string{a.bin}, args)
	return exec.CommandContext(ctx, line[0], line[1:]...)
}

// Join asks the broker to admit the host, by a token unless it is empty.
func (a *Agent) Join(ctx context.Context, token string) ([]byte, error) {
	cmd := a.command(ctx, "join", "-c", a.Config(), "-o", "json")
	if token != "" {
		cmd.Args = append(cmd.Args, "--token-file", "-")
		cmd.Stdin = strings.NewReader(token)
	}
	return output(cmd)
}

// Start runs the agent.
func (a *Agent) Start(ctx context.Context, env ...string) error {
	cmd := a.command(context.Background(), "serve", "-c", a.Config())
	cmd.Env = append(os.Environ(), env...)
	var err error
	if a.process, err = startProcess(cmd, a.Log(), syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return a.process.await(ctx, func(ctx context.Context) error {
		_, err := a.CLI(ctx, "status")
		return err
	})
}

// Stop ends the agent in order; what it delivered stays.
func (a *Agent) Stop() error {
	if a.process == nil {
		return errors.New("the agent was not started")
	}
	return a.process.stop(syscall.SIGTERM)
}

// Kill ends the agent by SIGKILL.
func (a *Agent) Kill() error { return a.process.stop(syscall.SIGKILL) }

// Ended is closed when the agent's process has ended.
func (a *Agent) Ended() <-chan struct{} { return a.process.ended }

// PID is the agent's process.
func (a *Agent) PID() int { return a.process.cmd.Process.Pid }

// PID is the broker's process.
func (b *Broker) PID() int { return b.process.cmd.Process.Pid }
