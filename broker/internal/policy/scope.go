package policy

import (
	"bytes"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"cel.dev/cel-go/cel"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/glob"
	"github.com/countersign/countersign/internal/hclread"
)

// Defaults and bounds of times.
const (
	DefaultReprove = 15 * time.Minute
	DefaultGrace   = time.Hour

	minReprove = 5 * time.Second
	minGrace   = time.Second
	maxGrace   = 30 * 24 * time.Hour
	minTTL     = time.Minute
	maxTTL     = 366 * 24 * time.Hour
)

var (
	scopeName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`) // part of URIs and of Vault's names
	labelKey  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}$`)
	unitName  = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,255}\.(service|scope)$`)
	dnsLabel  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	// No *, + or {{: in Vault's policies they stand for other paths.
	vaultPart = regexp.MustCompile(`^[A-Za-z0-9_.@:=-]+$`)
)

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

func (r *reader) scope(hb *hclsyntax.Block) *Scope {
	if len(hb.Labels) != 1 {
		r.Problem(hb.TypeRange, `a scope has one name: scope "name" { … }`, "")
		return nil
	}
	s := &Scope{Name: hb.Labels[0]}
	at := hb.LabelRanges[0]
	if !scopeName.MatchString(s.Name) || len(s.Name) > maxName {
		r.Problem(at, fmt.Sprintf("scope name %.80q: 1 to %d lowercase letters, digits, - and _, the first no sign", s.Name, maxName), "")
	}
	if first, taken := r.first[s.Name]; taken {
		r.Problem(at, fmt.Sprintf("scope %q is already at %s:%d", s.Name, first.Filename, first.Start.Line), "")
	} else {
		r.first[s.Name] = at
	}
	b := r.Block(hb.Body, "a scope",
		[]string{"description", "owner", "mode", "audience", "reprove", "grace", "when"},
		[]string{"host", "process", "vault", "certificate"})
	b.At = at
	s.Description, s.Owner = b.Text("description", hclread.Anything), b.Text("owner", hclread.Anything)
	s.Audience = b.Texts("audience", place)
	s.Observe = b.Text("mode", hclread.OneOf("enforce", "observe")) == "observe"
	if hb := b.One("host"); hb != nil {
		s.Host = r.host(hb)
	}
	if hb := b.One("process"); hb != nil {
		s.Process, s.compiled.mappings = r.process(hb)
	} else {
		r.Problem(at, "a scope wants a process block: whose credential is it?", "")
	}
	s.When, s.compiled.when = condition(b)
	r.credential(s, b)
	return s
}

// credential reads where the credential comes from, and the times that hang
// on it.
func (r *reader) credential(s *Scope, b hclread.Block) {
	vault, certificate := b.One("vault"), b.One("certificate")
	switch {
	case vault != nil && certificate != nil:
		r.Problem(certificate.TypeRange, "a scope has a vault or a certificate block, not both", "")
	case vault == nil && certificate == nil:
		r.Problem(b.At, "a scope wants a vault or a certificate block: what is the credential?", "")
	}
	var ttl time.Duration
	if vault != nil {
		s.Vault = r.vault(vault)
		ttl = s.Vault.TTL
	}
	if certificate != nil {
		s.Certificate = r.certificate(certificate)
		ttl = s.Certificate.TTL
	}
	most, otherwise := maxTTL, DefaultReprove
	if ttl > 0 {
		most, otherwise = ttl, min(DefaultReprove, ttl/2)
	}
	s.Reprove = b.Duration("reprove", minReprove, most, otherwise)
	s.Grace = b.Duration("grace", minGrace, maxGrace, DefaultGrace)
}

// place checks an entry of an audience.
func place(a string) (why, meant string) {
	u, err := url.Parse(a)
	switch {
	case err != nil || u.Scheme == "" || u.Host == "":
		why = "is no URL with a scheme and a host, as postgres://db.example.com:5432/billing"
	case u.User != nil:
		why = "names a user; an audience is a place, and no secret stands in a scope"
	}
	return why, ""
}

// condition compiles `when`; its mistakes are told by the file's lines.
func condition(b hclread.Block) (string, cel.Program) {
	text := b.Text("when", hclread.Anything)
	if text == "" {
		return "", nil
	}
	program, mistakes := compile(text)
	at, written := b.Range("when")
	first := at.Start.Line
	if bytes.HasPrefix(written, []byte("<<")) {
		first++ // the text of a heredoc starts below
	}
	for _, m := range mistakes {
		at.Start.Line = first + m.line - 1
		b.Problem(at, "when: "+m.message, m.suggestion)
	}
	return text, program
}

func (r *reader) host(hb *hclsyntax.Block) HostSelector {
	b := r.Block(hb.Body, "a host block", []string{"labels", "tier", "secure_boot", "reference", "ima", "boot_images", "kernel_command_line"}, nil)
	return HostSelector{
		Labels:     b.Pairs("labels", label, printable),
		Tier:       b.Texts("tier", hclread.OneOf(appraise.TierCertified, appraise.TierKnown)),
		SecureBoot: b.Flag("secure_boot"),
		Reference:  b.Text("reference", printable),
		IMA:        b.Text("ima", hclread.OneOf("required")),

		BootImages:         b.Texts("boot_images", digest),
		KernelCommandLines: b.Texts("kernel_command_line", commandLine),
	}
}

func commandLine(s string) (why, meant string) {
	if s == "" || len(s) > 4096 || strings.ContainsFunc(s, unprintable) {
		why = "is not 1 to 4096 printable characters"
	}
	return why, ""
}

func label(key string) (why, meant string) {
	if !labelKey.MatchString(key) {
		why = "is no label: letters, digits and _ . / -, at most 63"
	}
	return why, ""
}

func printable(s string) (why, meant string) {
	if len(s) > 256 || strings.ContainsFunc(s, unprintable) {
		why = "is not 1 to 256 printable characters"
	}
	return why, ""
}

func (r *reader) process(hb *hclsyntax.Block) (ProcessSelector, []glob.Pattern) {
	b := r.Block(hb.Body, "a process block", []string{"user", "unit", "exe", "sha256", "release", "before_start", "mappings"}, nil)
	if !b.Has("user") && !b.Has("unit") && !b.Has("exe") && !b.Has("sha256") && !b.Has("release") {
		r.Problem(hb.TypeRange, "a process block wants at least one of user, unit, exe, sha256 and release", "")
	}
	p := ProcessSelector{
		User:     b.Text("user", user),
		Unit:     b.Text("unit", unit),
		Exe:      b.Text("exe", absolute),
		SHA256:   b.Texts("sha256", digest),
		Release:  b.Text("release", printable),
		Mappings: b.Texts("mappings", pathGlob),
	}
	if flag := b.Flag("before_start"); flag != nil {
		p.BeforeStart = *flag
	}
	if p.BeforeStart && !b.Has("unit") {
		b.Bad("before_start", "wants a unit: nothing else has a start to wait for")
	}
	var globs []glob.Pattern
	for _, m := range p.Mappings {
		if g, err := glob.Compile(m); err == nil {
			globs = append(globs, g)
		}
	}
	return p, globs
}

func user(name string) (why, meant string) {
	if len(name) > 256 || strings.ContainsAny(name, ":/ ") || strings.ContainsFunc(name, unprintable) {
		why = "is no user's name"
	}
	return why, ""
}

func unit(unit string) (why, meant string) {
	name, _, _ := strings.Cut(unit, ".")
	switch {
	case !unitName.MatchString(unit) && unitName.MatchString(unit+".service"):
		return "is no service or scope unit", unit + ".service"
	case !unitName.MatchString(unit):
		why = "is no service or scope unit, as billing.service"
	case strings.HasSuffix(name, "@"):
		why = "is a template; name its instance"
	case strings.HasPrefix(unit, "user@") || strings.HasPrefix(unit, "session-") && strings.HasSuffix(unit, ".scope"):
		why = "holds whatever a user starts; name a unit of the system manager"
	}
	return why, ""
}

func absolute(p string) (why, meant string) {
	if !path.IsAbs(p) || p == "/" || strings.ContainsFunc(p, unprintable) {
		return "is not an absolute path of a file", ""
	}
	if clean := path.Clean(p); clean != p {
		return "is not the path's plain form", clean
	}
	return "", ""
}

func digest(s string) (why, meant string) {
	if _, err := evidence.ParseDigest(s); err != nil {
		return "is wrong: " + err.Error(), ""
	}
	return "", ""
}

// pathGlob checks a glob of files.
func pathGlob(pattern string) (why, meant string) {
	if _, err := glob.Compile(pattern); err != nil {
		return "is no glob", ""
	}
	return absolute(pattern)
}

func (r *reader) vault(hb *hclsyntax.Block) *VaultSource {
	b := r.Block(hb.Body, "a vault block", []string{"path", "method", "parameters", "ttl", "overlap"}, nil)
	if !b.Has("path") {
		b.Bad("path", "is missing")
	}
	v := &VaultSource{
		Path:       b.Text("path", vaultPath),
		Method:     b.Text("method", hclread.OneOf("read", "write")),
		Parameters: b.Pairs("parameters", printable, hclread.Anything),
	}
	if (v.Method == "read" || !b.Has("method")) && v.Parameters != nil {
		b.Bad("parameters", `only a write has them; add method = "write"`)
	}
	if v.Method == "" {
		v.Method = "read"
	}
	v.TTL, v.Overlap = life(b)
	return v
}

func vaultPath(p string) (why, meant string) {
	parts := strings.Split(p, "/")
	switch strings.ToLower(parts[0]) {
	case "sys", "auth", "identity", "cubbyhole":
		return "is Vault's own, and no credential", ""
	}
	for _, part := range parts {
		switch {
		case part == "." || part == ".." || !vaultPart.MatchString(part):
			return "is not a path inside Vault, as database/creds/billing", ""
		case strings.HasPrefix(strings.ToLower(part), "countersign-"):
			return "is the broker's own", ""
		}
	}
	return "", ""
}

func (r *reader) certificate(hb *hclsyntax.Block) *CertificateSource {
	b := r.Block(hb.Body, "a certificate block", []string{"dns", "ips", "ttl", "overlap"}, nil)
	c := &CertificateSource{DNS: b.Texts("dns", r.dns), IPs: b.Texts("ips", r.ip)}
	c.TTL, c.Overlap = life(b)
	return c
}

func (r *reader) reserved(name string) bool {
	return slices.ContainsFunc(r.options.Reserved, func(own string) bool {
		return strings.EqualFold(strings.TrimSuffix(own, "."), name)
	})
}

func (r *reader) dns(name string) (why, meant string) {
	labels := strings.Split(name, ".")
	last := labels[len(labels)-1]
	switch {
	case len(name) > 253 || slices.ContainsFunc(labels, func(l string) bool { return !dnsLabel.MatchString(l) }):
		why = "is no DNS name in lowercase; wildcards are not issued"
	case strings.Trim(last, "0123456789") == "":
		why = "looks like an address; those belong into ips"
	case last == "localhost" || name == "localhost.localdomain":
		why = "means another host on each host"
	case r.reserved(name):
		why = "is the broker's own name"
	}
	return why, ""
}

func (r *reader) ip(s string) (why, meant string) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil || addr.Zone() != "" || addr.Is4In6():
		why = "is no IP address"
	case addr.String() != s:
		return "is not the address's usual form", addr.String()
	case addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLinkLocalUnicast():
		why = "is no host's own address"
	case r.reserved(s):
		why = "is the broker's own address"
	}
	return why, ""
}

// life reads ttl and overlap.
func life(b hclread.Block) (ttl, overlap time.Duration) {
	if !b.Has("ttl") {
		b.Bad("ttl", "is missing")
	}
	ttl = b.Duration("ttl", minTTL, maxTTL, 0)
	overlap = b.Duration("overlap", 0, maxTTL, 0)
	if ttl > 0 && overlap >= ttl {
		b.Bad("overlap", "%s is not shorter than the ttl, %s", overlap, ttl)
	}
	return ttl, overlap
}
