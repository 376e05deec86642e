package watch

import (
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/internal/glob"
	"github.com/countersign/countersign/internal/hclread"
)

// A Config is the watch's file: HCL, strict, every error of it at once. The
// comments of its fields are its manual.
type Config struct {
	// StateDir holds the ledger and how far each log was read. Absolute; the
	// watch's alone.
	StateDir string `hcl:"state_dir"`
	// MetricsListen serves /metrics and /healthz in plain HTTP, as
	// "127.0.0.1:9465". Empty: nowhere.
	MetricsListen string `hcl:"metrics_listen,optional"`
	// Governed are accounts that only the broker hands out, as globs, beside those
	// that it issued and those of its roles.
	Governed []string `hcl:"governed,optional"`
	// Through are the addresses of NATs and poolers, from which any host may come,
	// as prefixes.
	Through []string `hcl:"through,optional"`
	// BrakeShare is which share of all live leases, or of all hosts, may be revoked
	// or quarantined in a minute without an operator's word. Default 0.02; one
	// always may.
	BrakeShare float64 `hcl:"brake_share,optional"`

	Broker    *Broker    `hcl:"broker,block"`
	Sensors   []Sensor   `hcl:"sensor,block"`
	Responses []Response `hcl:"response,block"`
	Webhooks  []Webhook  `hcl:"webhook,block"`
	Syslog    *Syslog    `hcl:"syslog,block"`

	through []netip.Prefix
}

// Broker is how the watch reaches the broker: by its local socket, or as an
// operator with the role responder.
type Broker struct {
	Socket   string `hcl:"socket,optional"`
	Address  string `hcl:"address,optional"` // https://HOST:PORT
	CASHA256 string `hcl:"ca_sha256,optional"`
	Cert     string `hcl:"cert,optional"`
	Key      string `hcl:"key,optional"`
}

// A Sensor is one log.
type Sensor struct {
	Kind string `hcl:"kind,label"` // of sightings.Kinds
	Name string `hcl:"name,label"`
	// Path is the log's file, or a glob of several.
	Path string `hcl:"path,optional"`
	// Listen takes the log's lines in the place of Path: tcp://HOST:PORT or
	// unix:///PATH, as Vault's socket audit device writes them, or http://HOST:PORT
	// for JSON that is posted. In plain: on the machine, or behind what encrypts.
	Listen string `hcl:"listen,optional"`
	// Journal is a folder of systemd's journal, as /var/log/journal, in the place of Path,
	// for kind sshd. It may be of another machine, as journal-remote writes it.
	Journal string `hcl:"journal,optional"`
	// DSNFile holds the connection string of a PostgreSQL, for kind postgres-activity:
	// its sessions are asked for, by a role that has pg_read_all_stats.
	DSNFile string `hcl:"dsn_file,optional"`
	// TokenFile holds what has to come as a bearer token, for http.
	TokenFile string `hcl:"token_file,optional"`
	// LogLinePrefix is PostgreSQL's, for kind postgres-stderr. Default: one of the
	// usual.
	LogLinePrefix string `hcl:"log_line_prefix,optional"`
}

// A Response overrides what is done about a detector's findings.
type Response struct {
	Detector string `hcl:"detector,label"`
	// Action is alert, step-up, revoke or quarantine.
	Action string `hcl:"action"`
	// Scopes limits it to findings about leases of these scopes. Empty: all.
	Scopes []string `hcl:"scopes,optional"`
}

// A Webhook is told of findings that are new or reopened.
type Webhook struct {
	URL string `hcl:"url,label"`
	// KeyFile holds the key by which each body is signed: HMAC-SHA256, in hex, in
	// the header Countersign-Signature.
	KeyFile string `hcl:"key_file"`
	// Format is "finding", or "ocsf" for a Detection Finding (2004). Default finding.
	Format string `hcl:"format,optional"`
}

// Syslog is told of findings that are new or reopened, in RFC 5424's form.
type Syslog struct {
	// Address is udp://HOST:PORT, tcp://HOST:PORT or unix:///PATH.
	Address string `hcl:"address"`
}

// Load reads and checks a config file. A mistake is an hclread.Problems, which has all
// of them.
func Load(name string) (*Config, error) {
	text, err := hclread.ReadConfig(name)
	if err != nil {
		return nil, fmt.Errorf("watch config: %w; -c names another, and docs/examples/watch.hcl is one to start from", err)
	}
	c := &Config{BrakeShare: 0.02}
	if _, err := hclread.Config(name, text, c); err != nil {
		return nil, fmt.Errorf("watch config:\n%w", err)
	}
	if err := c.check(name).Or(); err != nil {
		return nil, fmt.Errorf("watch config:\n%w", err)
	}
	return c, nil
}

func (c *Config) check(name string) (problems hclread.Problems) {
	bad := func(format string, args ...any) {
		problems = append(problems, hclread.Problem{File: name, Message: fmt.Sprintf(format, args...)})
	}
	if !filepath.IsAbs(c.StateDir) {
		bad("state_dir %q isn't absolute", c.StateDir)
	}
	if c.BrakeShare < 0 || c.BrakeShare > 1 {
		bad("brake_share %v is no share: 0 to 1", c.BrakeShare)
	}
	for _, g := range c.Governed {
		if _, err := glob.Compile(g); err != nil {
			bad("governed: %q is not a valid pattern", g)
		}
	}
	for _, p := range c.Through {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			bad("through %q is no prefix, as 10.1.0.0/16", p)
			continue
		}
		c.through = append(c.through, prefix.Masked())
	}
	switch b := c.Broker; {
	case b == nil:
		bad("a broker block is missing")
	case (b.Socket == "") == (b.Address == ""):
		bad("broker: one of socket and address")
	case b.Address != "" && (b.CASHA256 == "" || b.Cert == "" || b.Key == ""):
		bad("broker: an address comes with ca_sha256, cert and key")
	}
	if len(c.Sensors) == 0 {
		bad("no sensor: there is nothing to watch")
	}
	seen := map[string]bool{}
	for _, s := range c.Sensors {
		if seen[s.Name] {
			bad("two sensors are named %q", s.Name)
		}
		seen[s.Name] = true
		if _, err := sightings.New(s.Kind, s.Name, sightings.Options{LogLinePrefix: s.LogLinePrefix}); err != nil {
			bad("sensor %q: %v", s.Name, err)
		}
		if s.LogLinePrefix != "" && s.Kind != "postgres-stderr" {
			bad("sensor %q: log_line_prefix is of postgres-stderr", s.Name)
		}
		for _, wrong := range s.where() {
			bad("sensor %q: %s", s.Name, wrong)
		}
	}
	for _, r := range c.Responses {
		if !slices.ContainsFunc(detect.Catalogue, func(e detect.Entry) bool { return string(e.Name) == r.Detector }) {
			bad("response %q: there is no such detector", r.Detector)
		}
		if !slices.Contains(detect.Responses, detect.Response(r.Action)) {
			bad("response %q: action %q is none of %v", r.Detector, r.Action, detect.Responses)
		}
	}
	for _, h := range c.Webhooks {
		if h.Format != "" && h.Format != "finding" && h.Format != "ocsf" {
			bad("webhook %q: format %q is none of finding, ocsf", h.URL, h.Format)
		}
	}
	return problems
}

// World is what the config says of the world.
func (c *Config) World() detect.Config {
	return detect.Config{Governed: c.Governed, Through: c.through}
}

// LogLinePrefix is that of the first sensor of a kind.
func (c *Config) LogLinePrefix(kind string) string {
	for _, s := range c.Sensors {
		if s.Kind == kind {
			return s.LogLinePrefix
		}
	}
	return ""
}

// where says what is wrong with where a sensor's lines come from.
func (s Sensor) where() (problems []string) {
	if (s.Kind == "postgres-activity") != (s.DSNFile != "") {
		return []string{"postgres-activity comes with a dsn_file, and nothing else does"}
	}
	n := 0
	for _, from := range []string{s.Path, s.Listen, s.Journal, s.DSNFile} {
		if from != "" {
			n++
		}
	}
	if n != 1 {
		return []string{"one of path, listen and journal"}
	}
	if s.Path != "" {
		if _, err := filepath.Match(s.Path, ""); err != nil || !filepath.IsAbs(s.Path) {
			problems = append(problems, fmt.Sprintf("path %q: want an absolute path, or a pattern of them", s.Path))
		}
		return problems
	}
	if !plainName.MatchString(s.Name) {
		problems = append(problems, "a name of letters, digits, and . _ - for one that listens: files are named after it")
	}
	switch {
	case s.DSNFile != "":
		return problems
	case s.Journal != "" && (s.Kind != "sshd" || !filepath.IsAbs(s.Journal)):
		return append(problems, "journal is an absolute path, of kind sshd")
	case s.Journal != "":
		return problems
	}
	u, err := url.Parse(s.Listen)
	switch {
	case err != nil, u.Scheme == "unix" && !filepath.IsAbs(u.Path), u.Scheme != "unix" && u.Host == "":
		problems = append(problems, fmt.Sprintf("listen %q: tcp://HOST:PORT, unix:///PATH or http://HOST:PORT", s.Listen))
	case u.Scheme == "http" && s.TokenFile == "":
		problems = append(problems, "http needs a token_file")
	case u.Scheme != "http" && u.Scheme != "tcp" && u.Scheme != "unix":
		problems = append(problems, fmt.Sprintf("listen %q: no such scheme", s.Listen))
	}
	return problems
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// response is what the operator wants done about a detector's findings in a scope.
func (c *Config) response(d detect.Name, scope string) detect.Response {
	for _, r := range c.Responses {
		if r.Detector == string(d) && (len(r.Scopes) == 0 || slices.Contains(r.Scopes, scope)) {
			return detect.Response(r.Action)
		}
	}
	return detect.Of(d).Response
}
