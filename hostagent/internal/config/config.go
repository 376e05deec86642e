// Package config is the agent's configuration file: HCL, strict, every error
// of it at once. The comments of its fields are its manual.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/rootonly"
	"github.com/countersign/countersign/internal/hclread"
)

const maxCredentials = 200

// An Agent is the whole file.
type Agent struct {
	Broker Broker `hcl:"broker,block"`
	// TPM is "/dev/tpmrm0" (default), or "unix:/path/to/swtpm.sock".
	TPM string `hcl:"tpm,optional"`
	// StateDir holds keys and leases, without secrets. Default
	// /var/lib/countersign-agent.
	StateDir string `hcl:"state_dir,optional"`
	// RunDir is in memory: the control socket, and what is withheld while a
	// program is down. Default /run/countersign-agent.
	RunDir string `hcl:"run_dir,optional"`
	// Key is the AK's algorithm: "p256" (default) or "rsa2048".
	Key string `hcl:"ak_key,optional"`
	// LogFormat is "text" (default) or "json".
	LogFormat string `hcl:"log_format,optional"`
	// EventLog and IMAList are where the kernel shows what was booted and what
	// ran. Defaults: below /sys/kernel/security.
	EventLog string `hcl:"event_log,optional"`
	IMAList  string `hcl:"ima_list,optional"`

	// Witness tells the broker of programs that open a credential's file and
	// aren't its own. It needs CAP_SYS_ADMIN, and each open of these files waits
	// until the agent has looked. Default false.
	Witness bool `hcl:"witness,optional"`

	Credentials []*Credential `hcl:"credential,block"`

	warnings hclread.Problems
}

// Warnings are what works, and is better said otherwise.
func (a *Agent) Warnings() hclread.Problems { return a.warnings }

// Broker says whom to ask.
type Broker struct {
	// Addresses are https://HOST:PORT, tried in order.
	Addresses []string `hcl:"addresses"`
	// CASHA256 is what `countersign broker init` printed.
	CASHA256 string `hcl:"ca_sha256"`
}

// A Credential is one block for one program.
type Credential struct {
	Name string `hcl:"name,label"`
	// Scope is what to ask the broker for. Default: the block's name.
	Scope string `hcl:"scope,optional"`
	// Key has the agent make a private key and ask for a certificate: "p256"
	// or "rsa2048".
	Key      string    `hcl:"key,optional"`
	Process  Process   `hcl:"process,block"`
	Files    []*File   `hcl:"file,block"`
	OnChange *OnChange `hcl:"on_change,block"`
}

// A Process says how to find the program. One of Unit, Exe, PIDFile and PID is
// set; User narrows Exe down.
type Process struct {
	Unit    string `hcl:"unit,optional"`
	Exe     string `hcl:"exe,optional"`
	User    string `hcl:"user,optional"`
	PIDFile string `hcl:"pid_file,optional"`
	PID     int    `hcl:"pid,optional"`
}

// Loose says that anybody can start another process that answers to p.
func (p Process) Loose() bool { return p.Exe != "" && p.User == "" }

// LooseWarning is what is wrong with a Process that is loose.
const LooseWarning = "process: exe without user: anybody who can run the file can start another, and then it can't be told which one the credential is for"

// A File is where the program reads the credential. The files of one
// credential are swapped as one.
type File struct {
	Path string `hcl:"path,label"`
	// Template makes the content: {{ .username | properties }}. The fields are
	// Vault's; of a certificate: private_key, certificate, chain, ca.
	Template string `hcl:"template"`
	Owner    string `hcl:"owner,optional"` // default root
	Group    string `hcl:"group,optional"` // default root
	Mode     string `hcl:"mode,optional"`  // octal, default "0400"

	mode os.FileMode
}

// FileMode is Mode, parsed.
func (f *File) FileMode() os.FileMode { return f.mode }

// OnChange tells the program that its credential is a new one. At most one of
// Signal, Restart, Reload and Exec is set.
type OnChange struct {
	Signal  string   `hcl:"signal,optional"`  // to the program's main process, as "SIGHUP"
	Restart bool     `hcl:"restart,optional"` // the unit
	Reload  bool     `hcl:"reload,optional"`  // the unit
	Exec    []string `hcl:"exec,optional"`    // a command and its arguments
	// Check is a command that runs before the swap, with the paths of copies of
	// the new files in COUNTERSIGN_FILE_0, …; if it fails, the old credential
	// stays.
	Check []string `hcl:"check,optional"`
	// User is whom Exec and Check run as. Default: Exec as root, Check as the
	// files' owner. As root runs only what root alone can change.
	User string `hcl:"user,optional"`
	// Timeout bounds Exec and Check each. Default 30s.
	Timeout string `hcl:"timeout,optional"`

	timeout time.Duration
}

// Limit is Timeout, parsed.
func (o *OnChange) Limit() time.Duration { return o.timeout }

// ExecUser is whom Exec runs as.
func (o *OnChange) ExecUser() string { return cmp.Or(o.User, "root") }

// CheckUser is whom the check runs as.
func (c *Credential) CheckUser() string { return cmp.Or(c.OnChange.User, c.Files[0].Owner) }

// Load reads and checks a config file. A mistake is an hclread.Problems, which has all
// of them.
func Load(path string) (*Agent, error) {
	text, err := hclread.ReadConfig(path)
	if err != nil {
		return nil, fmt.Errorf("agent config: %w; -c names another, and docs/examples/agent.hcl is one to start from", err)
	}
	return Parse(path, text)
}

// Parse is Load of a file's content.
func Parse(name string, text []byte) (*Agent, error) {
	a := &Agent{}
	body, err := hclread.Config(name, text, a)
	if err != nil {
		return nil, fmt.Errorf("agent config:\n%w", err)
	}
	var problems hclread.Problems
	for _, e := range a.check() {
		problems = append(problems, hclread.Problem{File: name, Line: lineOf(body, e.credential), Message: e.text})
	}
	if err := problems.Or(); err != nil {
		return nil, fmt.Errorf("agent config:\n%w", err)
	}
	for _, c := range a.Credentials {
		if c.Process.Loose() {
			a.warnings = append(a.warnings, hclread.Problem{File: name, Line: lineOf(body, c.Name),
				Message: fmt.Sprintf("credential %q: %s: add user, or find the program by its unit", c.Name, LooseWarning)})
		}
	}
	return a, nil
}

func lineOf(body *hclsyntax.Body, credential string) int {
	for _, b := range body.Blocks {
		if b.Type == "credential" && len(b.Labels) > 0 && b.Labels[0] == credential {
			return b.DefRange().Start.Line
		}
	}
	return 0
}

type mistake struct{ credential, text string }

var (
	nameForm   = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)
	sha256Form = regexp.MustCompile(`^[0-9a-f]{64}$`)
	keyTypes   = []string{"p256", "rsa2048"}
)

// check fills in defaults and returns what is wrong.
func (a *Agent) check() (errs []mistake) {
	bad := func(credential, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if credential != "" {
			text = fmt.Sprintf("credential %q: %s", credential, text)
		}
		errs = append(errs, mistake{credential, text})
	}
	defaults(&a.TPM, "/dev/tpmrm0")
	defaults(&a.Key, "p256")
	if runtime.GOOS == "windows" {
		defaults(&a.StateDir, `C:\ProgramData\Countersign`)
		defaults(&a.RunDir, `C:\ProgramData\Countersign\run`)
	} else {
		defaults(&a.StateDir, "/var/lib/countersign-agent")
		defaults(&a.RunDir, "/run/countersign-agent")
	}
	if len(a.Broker.Addresses) == 0 {
		bad("", "broker: addresses is empty")
	}
	for _, address := range a.Broker.Addresses {
		if u, err := url.Parse(address); err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || u.Path != "" {
			bad("", "broker: address %q is not https://HOST:PORT", address)
		}
	}
	if !sha256Form.MatchString(a.Broker.CASHA256) {
		bad("", "broker: ca_sha256 is not 64 lowercase hex digits; `countersign broker init` prints it")
	}
	if !slices.Contains(keyTypes, a.Key) {
		bad("", "ak_key %q is neither p256 nor rsa2048", a.Key)
	}
	for name, dir := range map[string]string{"state_dir": a.StateDir, "run_dir": a.RunDir} {
		if !filepath.IsAbs(dir) {
			bad("", "%s %q is not an absolute path", name, dir)
		}
	}
	if a.LogFormat != "" && a.LogFormat != "text" && a.LogFormat != "json" {
		bad("", "log_format %q is neither text nor json", a.LogFormat)
	}
	if len(a.Credentials) > maxCredentials {
		bad("", "%d credentials; at most %d", len(a.Credentials), maxCredentials)
	}
	names, paths := map[string]bool{}, map[string]string{}
	for _, c := range a.Credentials {
		c.check(names, paths, func(format string, args ...any) { bad(c.Name, format, args...) })
	}
	return errs
}

func defaults(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

func (c *Credential) check(names map[string]bool, paths map[string]string, bad func(string, ...any)) {
	defaults(&c.Scope, c.Name)
	if !nameForm.MatchString(c.Name) {
		bad("a name is up to 64 lowercase letters, digits, - and _")
	}
	if names[c.Name] {
		bad("the name is used twice")
	}
	names[c.Name] = true
	if c.Key != "" && !slices.Contains(keyTypes, c.Key) {
		bad("key %q is neither p256 nor rsa2048", c.Key)
	}
	c.Process.check(bad)
	if len(c.Files) == 0 {
		bad("no file to deliver to")
	}
	for _, f := range c.Files {
		if !filepath.IsAbs(f.Path) || filepath.Clean(f.Path) != f.Path || f.Path == "/" {
			bad("file %q is not an absolute, clean path", f.Path)
		}
		if other, ok := paths[f.Path]; ok {
			bad("file %s is credential %q's already", f.Path, other)
		}
		paths[f.Path] = c.Name
		defaults(&f.Owner, "root")
		defaults(&f.Group, "root")
		defaults(&f.Mode, "0400")
		mode, err := strconv.ParseUint(f.Mode, 8, 32)
		if err != nil || mode > 0o777 || mode&0o111 != 0 || mode&0o400 == 0 {
			bad("file %s: mode %q is not octal like 0400, readable by its owner and not executable", f.Path, f.Mode)
		}
		if mode&0o007 != 0 {
			bad("file %s: mode %q lets everybody at the secret", f.Path, f.Mode)
		}
		f.mode = os.FileMode(mode)
	}
	if o := c.OnChange; o != nil {
		o.check(c.Process, bad)
		c.checkUsers(bad)
	}
}

// checkUsers wants it said whom commands run as, and as root only what root alone can change.
func (c *Credential) checkUsers(bad func(string, ...any)) {
	o := c.OnChange
	if len(o.Check) > 0 && o.User == "" {
		for _, f := range c.Files {
			if f.Owner != c.Files[0].Owner {
				bad("on_change: check runs as the files' owner, and the files have several: set user")
				break
			}
		}
	}
	runsAs := func(name, user string, argv []string) {
		uid, err := account.UID(user)
		if len(argv) == 0 || err != nil || uid != 0 {
			return
		}
		var loose *rootonly.LooseError
		if err := rootonly.Command(argv); errors.As(err, &loose) {
			bad("on_change: %s would run as root, and %v: set user, or make it and its folders root's alone", name, loose)
		}
	}
	runsAs("exec", o.ExecUser(), o.Exec)
	if len(c.Files) > 0 {
		runsAs("check", c.CheckUser(), o.Check)
	}
}

func (p *Process) check(bad func(string, ...any)) {
	ways := 0
	for _, set := range []bool{p.Unit != "", p.Exe != "", p.PIDFile != "", p.PID != 0} {
		if set {
			ways++
		}
	}
	if ways != 1 && !(ways == 0 && p.User != "") {
		bad("process: one of unit, exe, user, pid_file and pid says how to find the program; %d are given", ways)
	}
	if p.User != "" && (p.Unit != "" || p.PIDFile != "" || p.PID != 0) {
		bad("process: user stands alone or beside exe")
	}
	if p.Exe != "" && (!filepath.IsAbs(p.Exe) || filepath.Clean(p.Exe) != p.Exe) {
		bad("process: exe %q is not an absolute, clean path", p.Exe)
	}
	if p.PIDFile != "" && !filepath.IsAbs(p.PIDFile) {
		bad("process: pid_file %q is not an absolute path", p.PIDFile)
	}
	if p.PID < 0 {
		bad("process: pid %d", p.PID)
	}
}

func (o *OnChange) check(p Process, bad func(string, ...any)) {
	ways := 0
	for _, set := range []bool{o.Signal != "", o.Restart, o.Reload, len(o.Exec) > 0} {
		if set {
			ways++
		}
	}
	if ways > 1 {
		bad("on_change: one of signal, restart, reload and exec; %d are given", ways)
	}
	if (o.Restart || o.Reload) && p.Unit == "" {
		bad("on_change: restart and reload need the program to be found by its unit")
	}
	for name, command := range map[string][]string{"exec": o.Exec, "check": o.Check} {
		if len(command) > 0 && !filepath.IsAbs(command[0]) {
			bad("on_change: %s %q is not an absolute path", name, command[0])
		}
	}
	o.timeout = 30 * time.Second
	if o.Timeout != "" {
		d, err := time.ParseDuration(o.Timeout)
		if err != nil || d < time.Second || d > 10*time.Minute {
			bad("on_change: timeout %q is not a duration from 1s to 10m", o.Timeout)
		}
		o.timeout = d
	}
}
