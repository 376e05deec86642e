package vault

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/countersign/countersign/broker/internal/policy"
)

// BrokerPolicy is the Vault policy of the broker's own token.
const BrokerPolicy = "countersign-broker"

const prefix = "countersign-"

// RoleName is the name of a scope's token role and of its policy.
func RoleName(scope string) string { return prefix + scope }

// Needs are what a set of scopes wants of Vault, and nothing more.
type Needs struct {
	Broker Policy  `json:"broker"`
	Scopes []Scope `json:"scopes"`
}

// A Scope is what one scope wants: a policy for its tokens, and the role by
// which the broker makes them.
type Scope struct {
	Scope  string        `json:"scope"`
	Path   string        `json:"path"`
	TTL    time.Duration `json:"-"`
	Policy Policy        `json:"policy"`
	Role   Role          `json:"token_role"`
}

// A Policy is a Vault ACL policy.
type Policy struct {
	Name  string `json:"name"`
	Rules []Rule `json:"rules"`
}

// A Rule is one path of a policy.
type Rule struct {
	Path         string              `json:"path"`
	Capabilities []string            `json:"capabilities"`
	Parameters   map[string][]string `json:"allowed_parameters,omitempty"` // none: any, but for those denied
	Denied       map[string][]string `json:"denied_parameters,omitempty"`
}

// noParameters denies all: an empty allowed_parameters would allow any.
func noParameters() map[string][]string { return map[string][]string{"*": {}} }

// A Role is a token role's settings, by the names of Vault's API.
type Role struct {
	Name     string         `json:"name"`
	Settings map[string]any `json:"settings"`
}

// Requirements are what the set's vault scopes need.
//
// The broker may make tokens by the scopes' roles alone, and renew and revoke
// leases under the scopes' paths. Vault can't tell accessors apart, so that its
// power over tokens by accessor reaches every token whose accessor it learns.
func Requirements(set *policy.Set) Needs {
	n := Needs{Scopes: []Scope{}}
	var paths []string
	broker := []Rule{
		{Path: "auth/token/lookup-self", Capabilities: []string{"read"}},
		{Path: "auth/token/renew-self", Capabilities: []string{"update"}},
	}
	for _, s := range set.Scopes() {
		from := source(s)
		if from == nil {
			continue
		}
		n.Scopes = append(n.Scopes, needs(s, from))
		paths = append(paths, from.Path)
		broker = append(broker, Rule{Path: "auth/token/create/" + RoleName(s.Name), Capabilities: []string{"update"}})
	}
	if len(paths) > 0 {
		for _, act := range []string{"lookup", "renew", "revoke"} {
			broker = append(broker, Rule{Path: "auth/token/" + act + "-accessor", Capabilities: []string{"update"}})
		}
	}
	n.Broker = Policy{Name: BrokerPolicy, Rules: withLeases(broker, paths)}
	return n
}

func needs(s *policy.Scope, from *Source) Scope {
	name := RoleName(s.Name)
	rule := Rule{Path: from.Path, Capabilities: []string{"read"}}
	if from.Method == "write" {
		rule.Capabilities = []string{"update"}
		if len(from.Parameters) == 0 {
			rule.Denied = noParameters()
		}
		for k, v := range from.Parameters {
			if rule.Parameters == nil {
				rule.Parameters = map[string][]string{}
			}
			rule.Parameters[k] = []string{}
			if literal(v) {
				rule.Parameters[k] = []string{v}
			}
		}
	}
	return Scope{
		Scope: s.Name, Path: from.Path, TTL: s.TTL,
		Policy: Policy{Name: name, Rules: []Rule{rule}},
		Role: Role{Name: name, Settings: map[string]any{
			"allowed_policies":        []string{name},
			"allowed_policies_glob":   []string{},
			"disallowed_policies":     []string{},
			"orphan":                  true,
			"renewable":               true,
			"token_type":              "service",
			"token_period":            0,
			"token_explicit_max_ttl":  int(s.TTL.Seconds()),
			"token_no_default_policy": true,
			"path_suffix":             "",
		}},
	}
}

// literal says whether a policy can name a value as it is: elsewhere Vault sees
// a pattern or an expression, and any value is allowed.
func literal(v string) bool {
	return !strings.HasPrefix(v, "*") && !strings.HasSuffix(v, "*") && !strings.Contains(v, "${") && !strings.Contains(v, "%{") &&
		!strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) })
}

// withLeases adds the rules for leases under paths. The lease stands in the path
// of a call, where a rule can name its prefix; one in the body would go round
// it, hence the parameters. A lookup has it in the body only.
func withLeases(rules []Rule, paths []string) []Rule {
	rules = slices.Clone(rules)
	slices.Sort(paths)
	paths = slices.Compact(paths)
	var looked []string
	for _, p := range paths {
		rules = append(rules,
			Rule{Path: "sys/leases/renew/" + p + "/*", Capabilities: []string{"update"}, Parameters: map[string][]string{"increment": {}}},
			Rule{Path: "sys/leases/revoke/" + p + "/*", Capabilities: []string{"update"}, Parameters: map[string][]string{"sync": {}}})
		looked = append(looked, p+"/*")
	}
	if looked != nil {
		rules = append(rules, Rule{Path: "sys/leases/lookup", Capabilities: []string{"update"}, Parameters: map[string][]string{"lease_id": looked}})
	}
	slices.SortFunc(rules, func(a, b Rule) int { return strings.Compare(a.Path, b.Path) })
	return rules
}

// HCL is the policy as Vault takes it.
func (p Policy) HCL() string {
	var b strings.Builder
	for i, r := range p.Rules {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "path %s {\n  capabilities = %s\n", quoted(r.Path), list(r.Capabilities))
		writeParameters(&b, "allowed_parameters", r.Parameters)
		writeParameters(&b, "denied_parameters", r.Denied)
		b.WriteString("}\n")
	}
	return b.String()
}

func writeParameters(b *strings.Builder, setting string, parameters map[string][]string) {
	if parameters == nil {
		return
	}
	fmt.Fprintf(b, "  %s = {\n", setting)
	for _, name := range sorted(parameters) {
		fmt.Fprintf(b, "    %s = %s\n", quoted(name), list(parameters[name]))
	}
	b.WriteString("  }\n")
}

// Command is the line by which Vault's own command would make the role.
func (r Role) Command() string {
	words := []string{"vault write auth/token/roles/" + r.Name}
	for _, k := range sorted(r.Settings) {
		switch v := r.Settings[k].(type) {
		case []string:
			words = append(words, k+"="+strings.Join(v, ","))
		case string:
			words = append(words, k+"="+v)
		default:
			words = append(words, fmt.Sprintf("%s=%v", k, v))
		}
	}
	return strings.Join(words, " ")
}

func list(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = quoted(w)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// quoted is a string in HCL; what stands in a policy is literal, or was Vault's.
func quoted(s string) string { return strconv.Quote(s) }
