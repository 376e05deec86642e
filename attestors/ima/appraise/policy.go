package appraise

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/ima"
	"github.com/countersign/countersign/internal/glob"
)

// A Policy says which measured files a host may show. It is part of a
// reference set, and is written as JSON.
type Policy struct {
	// Allow names digests for paths. A path that no entry matches, and no
	// signature or exclusion speaks for, is not allowed.
	Allow []Allowed `json:"allow"`
	// Exclude are globs of paths that are not looked at, as "/var/lib/app/**".
	// What is excluded can be anything.
	Exclude []string `json:"exclude,omitempty"`
	// Keys are PEM certificates or public keys, RSA or ECDSA. A file whose
	// security.ima signature one of them made is allowed by it.
	Keys []string `json:"keys,omitempty"`
	// Files says which files are held against the policy: "root", which is the default, are
	// those that the hosts' IMA policy measures into PCR 10, which is to be what root runs;
	// "all" are also those that it measures into another PCR; "programs" are none, for policies that
	// measure what everybody runs into PCR 10: only scopes' own programs are held then.
	Files string `json:"files,omitempty"`
	// Violations is what to do about one: "reject" or "ignore". The kernel has them in PCR 10,
	// whoever caused them: the default is to reject if all files are held, else to ignore.
	Violations string `json:"violations,omitempty"`
	// Mode is "enforce", which is the default, or "observe": what would have
	// failed is told, and fails nothing.
	Mode string `json:"mode,omitempty"`
}

// An Allowed is digests for the paths of one glob, where ** crosses folders.
// Paths are as in IMA's list, with '_' for a space.
type Allowed struct {
	Path    string   `json:"path"`
	Digests []string `json:"digests"` // as "sha256:…"
}

// Rules are a compiled policy.
type Rules struct {
	exact      map[string]map[string]bool
	globs      []allowed
	exclude    []glob.Pattern
	keys       []verifier
	violations bool // are ignored
	files      string
	observe    bool
}

type allowed struct {
	path    glob.Pattern
	digests []string
}

const maxGlobs = 4096 // each is tried against each new entry

var digestText = regexp.MustCompile(`^(verity:)?[a-z0-9-]+:[0-9a-f]{32,128}$`)

// Compile checks p as a whole.
func (p Policy) Compile() (*Rules, error) {
	r := &Rules{exact: map[string]map[string]bool{}, files: p.Files, observe: p.Mode == "observe"}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	r.violations = p.Violations == "ignore" || p.Violations == "" && r.files != "all"
	if !slices.Contains([]string{"", "root", "all", "programs"}, p.Files) {
		bad("files: %q is neither root nor all nor programs", p.Files)
	}
	if !slices.Contains([]string{"", "reject", "ignore"}, p.Violations) {
		bad("violations: %q is neither reject nor ignore", p.Violations)
	}
	if !slices.Contains([]string{"", "enforce", "observe"}, p.Mode) {
		bad("mode: %q is neither enforce nor observe", p.Mode)
	}
	for _, a := range p.Allow {
		for _, d := range a.Digests {
			if !digestText.MatchString(d) {
				bad("allow %s: %q is no digest as sha256:<hex>", a.Path, d)
			}
		}
		if path, one := literal(a.Path); one {
			of := r.exact[path]
			if of == nil {
				of = map[string]bool{}
				r.exact[path] = of
			}
			for _, d := range a.Digests {
				of[d] = true
			}
			continue
		}
		pattern, err := glob.Compile(a.Path)
		if err != nil {
			bad("allow: %w", err)
			continue
		}
		r.globs = append(r.globs, allowed{pattern, a.Digests})
	}
	for _, e := range p.Exclude {
		pattern, err := glob.Compile(e)
		if err != nil {
			bad("exclude: %w", err)
			continue
		}
		r.exclude = append(r.exclude, pattern)
	}
	if n := len(r.globs) + len(r.exclude); n > maxGlobs {
		bad("%d globs; %d are tried", n, maxGlobs)
	}
	for i, text := range p.Keys {
		key, err := parseKey(text)
		if err != nil {
			bad("key %d: %v", i+1, err)
			continue
		}
		r.keys = append(r.keys, key)
	}
	return r, errors.Join(errs...)
}

// literal is the path that a glob stands for, if it is one: what is learned has
// paths with brackets, escaped, and they needn't be tried one by one.
func literal(pattern string) (path string, one bool) {
	var b strings.Builder
	for i := 0; i < len(pattern); i++ {
		switch pattern[i] {
		case '*', '?', '[', '{':
			return "", false
		case '\\':
			if i++; i == len(pattern) {
				return "", false
			}
		}
		b.WriteByte(pattern[i])
	}
	return b.String(), true
}

// Observes says that what Judge finds fails nothing.
func (r *Rules) Observes() bool { return r.observe }

// Holds reports whether a measurement that isn't allowed fails its host: of those that don't, any
// user of the host may be the cause.
func (r *Rules) Holds(m Measurement) bool {
	return r.files == "all" || r.files != "programs" && m.PCR == ima.DefaultPCR
}

// Counts reports whether a measurement shows that the IMA policy is in force.
func (r *Rules) Counts(m Measurement) bool { return r.files == "programs" || r.Holds(m) }

// Judge says why m is not allowed; empty: it is.
func (r *Rules) Judge(m Measurement) (why string) {
	switch {
	case m.IsAggregate():
		return ""
	case m.Violation:
		if r.violations {
			return ""
		}
		return fmt.Sprintf("%sa violation, a file that was written while it was measured; the list calls it %s", where(m), quote(m.Name))
	case r.excluded(m.Name), r.exact[m.Name][m.Digest]:
		return ""
	}
	spoken := r.exact[m.Name] != nil
	for _, a := range r.globs {
		if a.path.Match(m.Name) {
			if spoken = true; slices.Contains(a.digests, m.Digest) {
				return ""
			}
		}
	}
	signature := "is not signed"
	if m.Signature != nil {
		signature = "is signed by none of the policy's keys"
		if r.signed(m) {
			return ""
		}
	}
	why = "is of no allowed path"
	if spoken {
		why = "is none of its path's allowed digests"
	}
	if len(r.keys) > 0 {
		why += " and " + signature
	}
	return fmt.Sprintf("%s%s with %s %s", where(m), quote(m.Name), m.Digest, why)
}

// where is the entry, as far as it is known.
func where(m Measurement) string {
	if m.Index < 0 {
		return ""
	}
	return fmt.Sprintf("entry %d, ", m.Index)
}

func (r *Rules) excluded(name string) bool {
	return slices.ContainsFunc(r.exclude, func(g glob.Pattern) bool { return g.Match(name) })
}
