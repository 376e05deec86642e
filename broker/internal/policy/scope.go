package policy

import (
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/appraise"
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
		r.problem(hb.TypeRange, `a scope has one name: scope "name" { … }`, "")
		return nil
	}
	s := &Scope{Name: hb.Labels[0]}
	at := hb.LabelRanges[0]
	if !scopeName.MatchString(s.Name) || len(s.Name) > maxName {
		r.problem(at, fmt.Sprintf("scope name %.80q: 1 to %d lowercase letters, digits, - and _, the first no sign", s.Name, maxName), "")
	}
	if first, taken := r.first[s.Name]; taken {
		r.problem(at, fmt.Sprintf("scope %q is already at %s:%d", s.Name, first.Filename, first.Start.Line), "")
	} else {
		r.first[s.Name] = at
	}
	b := r.block(hb.Body, "a scope",
		[]string{"description", "owner", "mode", "audience", "reprove", "grace", "when"},
		[]string{"host", "process", "vault", "certificate"})
	b.at = at
	s.Description, s.Owner, s.Audience = b.text("description"), b.text("owner"), b.texts("audience")
	switch mode := b.text("mode"); mode {
	case "", "enforce":
	case "observe":
		s.Observe = true
	default:
		r.problem(b.attrs["mode"].Expr.Range(), fmt.Sprintf("mode: %q is neither enforce nor observe", mode), nearest(mode, []string{"enforce", "observe"}))
	}
	for _, a := range s.Audience {
		if err := checkAudience(a); a != "" && err != nil {
			b.bad("audience", "%q: %v", a, err)
		}
	}
	if hb := b.one("host"); hb != nil {
		s.Host = r.host(hb)
	}
	if hb := b.one("process"); hb != nil {
		s.Process, s.compiled.mappings = r.process(hb)
	} else {
		r.problem(at, "a scope wants a process block: whose credential is it?", "")
	}
	if b.has("when") {
		s.When, s.compiled.when = b.condition()
	}
	r.source(s, b)
	return s
}

// source reads where the credential comes from, and the times that hang on it.
func (r *reader) source(s *Scope, b block) {
	vault, certificate := b.one("vault"), b.one("certificate")
	switch {
	case vault != nil && certificate != nil:
		r.problem(certificate.TypeRange, "a scope has a vault or a certificate block, not both", "")
	case vault == nil && certificate == nil:
		r.problem(b.at, "a scope wants a vault or a certificate block: what is the credential?", "")
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
	s.Reprove = b.duration("reprove", minReprove, most, otherwise)
	s.Grace = b.duration("grace", minGrace, maxGrace, DefaultGrace)
}

func checkAudience(a string) error {
	u, err := url.Parse(a)
	switch {
	case err != nil:
		return fmt.Errorf("is no URL")
	case u.Scheme == "" || u.Host == "":
		return fmt.Errorf("wants a scheme and a host, as postgres://db.example.com:5432/billing")
	case u.User != nil:
		return fmt.Errorf("names a user; an audience is a place, and no secret stands in a scope")
	}
	return nil
}

// condition compiles `when`; its mistakes are told by the file's lines.
func (b block) condition() (string, cel.Program) {
	text := b.text("when")
	if text == "" {
		return "", nil
	}
	program, mistakes := compile(text)
	at := b.attrs["when"].Expr.Range()
	first := at.Start.Line
	if bytes.HasPrefix(at.SliceBytes(b.source), []byte("<<")) {
		first++ // the text of a heredoc starts below
	}
	for _, m := range mistakes {
		at.Start.Line = first + m.line - 1
		b.problem(at, "when: "+m.message, m.suggestion)
	}
	return text, program
}

func (r *reader) host(hb *hclsyntax.Block) (h HostSelector) {
	b := r.block(hb.Body, "a host block", []string{"labels", "tier", "secure_boot", "reference", "ima"}, nil)
	h.Labels, h.Tier, h.SecureBoot = b.pairs("labels"), b.texts("tier"), b.flag("secure_boot")
	h.Reference, h.IMA = b.text("reference"), b.text("ima")
	for key, value := range h.Labels {
		if !labelKey.MatchString(key) {
			b.bad("labels", "%q is no label: letters, digits and _ . / -, at most 63", key)
		}
		if value == "" || len(value) > 256 || strings.ContainsFunc(value, unprintable) {
			b.bad("labels", "%s wants 1 to 256 printable characters", key)
		}
	}
	tiers := []string{appraise.TierCertified, appraise.TierKnown}
	for i, tier := range h.Tier {
		if tier != "" && !slices.Contains(tiers, tier) {
			list := b.attrs["tier"].Expr.(*hclsyntax.TupleConsExpr)
			r.problem(list.Exprs[i].Range(), fmt.Sprintf("tier: %q is neither certified nor known", tier), nearest(tier, tiers))
		}
	}
	if h.Reference != "" && (len(h.Reference) > 256 || strings.ContainsFunc(h.Reference, unprintable)) {
		b.bad("reference", "a reference set's name has at most 256 printable characters")
	}
	if h.IMA != "" && h.IMA != "required" {
		r.problem(b.attrs["ima"].Expr.Range(), fmt.Sprintf("ima: %q is not required, the only value", h.IMA), nearest(h.IMA, []string{"required"}))
	}
	return h
}

func (r *reader) process(hb *hclsyntax.Block) (p ProcessSelector, globs []*regexp.Regexp) {
	b := r.block(hb.Body, "a process block", []string{"user", "unit", "exe", "sha256", "before_start", "mappings"}, nil)
	p.User, p.Unit, p.Exe, p.SHA256, p.Mappings = b.text("user"), b.text("unit"), b.text("exe"), b.texts("sha256"), b.texts("mappings")
	if flag := b.flag("before_start"); flag != nil {
		p.BeforeStart = *flag
	}
	if !b.has("user") && !b.has("unit") && !b.has("exe") && !b.has("sha256") {
		r.problem(hb.TypeRange, "a process block wants at least one of user, unit, exe and sha256", "")
	}
	if p.User != "" && (len(p.User) > 256 || strings.ContainsAny(p.User, ":/ ") || strings.ContainsFunc(p.User, unprintable)) {
		b.bad("user", "%.80q is no user's name", p.User)
	}
	if p.Unit != "" {
		if why := checkUnit(p.Unit); why != "" {
			b.bad("unit", "%.80q %s", p.Unit, why)
		}
	}
	if p.Exe != "" && !cleanPath(p.Exe) {
		b.bad("exe", "%q is not an absolute path without . and ..", p.Exe)
	}
	for _, digest := range p.SHA256 {
		if _, err := evidence.ParseDigest(digest); digest != "" && err != nil {
			b.bad("sha256", "%.80q: %v", digest, err)
		}
	}
	if p.BeforeStart && !b.has("unit") {
		b.bad("before_start", "wants a unit: nothing else has a start to wait for")
	}
	for _, m := range p.Mappings {
		switch {
		case m == "":
		case !cleanPath(m):
			b.bad("mappings", "%q is not an absolute path, as /usr/lib/**", m)
		default:
			globs = append(globs, glob(m))
		}
	}
	return p, globs
}

// checkUnit says what is wrong with a unit's name, in words.
func checkUnit(unit string) string {
	name, _, _ := strings.Cut(unit, ".")
	switch {
	case !unitName.MatchString(unit):
		return "is no unit's name; as billing.service"
	case strings.HasSuffix(name, "@"):
		return "is a template; name its instance"
	case strings.HasPrefix(unit, "user@") || strings.HasPrefix(unit, "session-") && strings.HasSuffix(unit, ".scope"):
		return "holds whatever a user starts; a unit of the system manager is wanted"
	}
	return ""
}

func cleanPath(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && p != "/" && !strings.ContainsFunc(p, unprintable)
}

// glob compiles a pattern: ** is anything, * and ? stay inside one folder.
func glob(pattern string) *regexp.Regexp {
	quoted := regexp.QuoteMeta(pattern)
	return regexp.MustCompile("^" + strings.NewReplacer(`\*\*`, `.*`, `\*`, `[^/]*`, `\?`, `[^/]`).Replace(quoted) + "$")
}

func (r *reader) vault(hb *hclsyntax.Block) *VaultSource {
	b := r.block(hb.Body, "a vault block", []string{"path", "method", "parameters", "ttl", "overlap"}, nil)
	v := &VaultSource{Path: b.text("path"), Method: b.text("method"), Parameters: b.pairs("parameters")}
	if !b.has("path") {
		b.bad("path", "is missing")
	} else if v.Path != "" {
		if why := checkVaultPath(v.Path); why != "" {
			b.bad("path", "%q %s", v.Path, why)
		}
	}
	switch v.Method {
	case "":
		v.Method = "read"
	case "read", "write":
	default:
		r.problem(b.attrs["method"].Expr.Range(), fmt.Sprintf("method: %q is neither read nor write", v.Method), nearest(v.Method, []string{"read", "write"}))
	}
	if v.Method == "read" && v.Parameters != nil {
		b.bad("parameters", `only a write has them; add method = "write"`)
	}
	v.TTL, v.Overlap = b.life()
	return v
}

// checkVaultPath says what is wrong with a path, in words.
func checkVaultPath(p string) string {
	parts := strings.Split(p, "/")
	switch strings.ToLower(parts[0]) {
	case "sys", "auth", "identity", "cubbyhole":
		return "is Vault's own, and no credential"
	}
	for _, part := range parts {
		switch {
		case part == "." || part == ".." || !vaultPart.MatchString(part):
			return "is not a path inside Vault, as database/creds/billing"
		case strings.HasPrefix(strings.ToLower(part), "countersign-"):
			return "is the broker's own"
		}
	}
	return ""
}

func (r *reader) certificate(hb *hclsyntax.Block) *CertificateSource {
	b := r.block(hb.Body, "a certificate block", []string{"dns", "ips", "ttl", "overlap"}, nil)
	c := &CertificateSource{DNS: b.texts("dns"), IPs: b.texts("ips")}
	for _, name := range c.DNS {
		if why := checkDNS(name); name != "" && why != "" {
			b.bad("dns", "%.80q %s", name, why)
		} else if r.reserved(name) {
			b.bad("dns", "%q is the broker's own name", name)
		}
	}
	for _, ip := range c.IPs {
		addr, err := netip.ParseAddr(ip)
		switch {
		case ip == "":
		case err != nil || addr.Zone() != "" || addr.Is4In6() || addr.String() != ip:
			b.bad("ips", "%.80q is no IP address in its usual form", ip)
		case addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLinkLocalUnicast():
			b.bad("ips", "%s is no host's own address", ip)
		case r.reserved(ip):
			b.bad("ips", "%s is the broker's own address", ip)
		}
	}
	c.TTL, c.Overlap = b.life()
	return c
}

func (r *reader) reserved(name string) bool {
	return slices.ContainsFunc(r.options.Reserved, func(own string) bool {
		return strings.EqualFold(strings.TrimSuffix(own, "."), name)
	})
}

// checkDNS says what is wrong with a DNS name, in words.
func checkDNS(name string) string {
	labels := strings.Split(name, ".")
	if len(name) > 253 || slices.ContainsFunc(labels, func(l string) bool { return !dnsLabel.MatchString(l) }) {
		return "is no DNS name in lowercase; wildcards are not issued"
	}
	last := labels[len(labels)-1]
	if strings.Trim(last, "0123456789") == "" {
		return "looks like an address; those belong into ips"
	}
	if last == "localhost" || name == "localhost.localdomain" {
		return "means another host on each host"
	}
	return ""
}

// life reads ttl and overlap.
func (b block) life() (ttl, overlap time.Duration) {
	if !b.has("ttl") {
		b.bad("ttl", "is missing")
	}
	ttl = b.duration("ttl", minTTL, maxTTL, 0)
	overlap = b.duration("overlap", 0, maxTTL, 0)
	if ttl > 0 && overlap >= ttl {
		b.bad("overlap", "%s is not shorter than the ttl, %s", overlap, ttl)
	}
	return ttl, overlap
}
