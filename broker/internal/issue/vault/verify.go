package vault

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// A Finding is one way in which a Vault is not as the scopes need it.
type Finding struct {
	Object  string `json:"object"`  // as "token role countersign-billing-db"
	Problem string `json:"problem"` // what is missing, or too much
	Remedy  string `json:"remedy"`
}

func (f Finding) String() string { return f.Object + ": " + f.Problem + "; " + f.Remedy }

const (
	remedySetup = "run `countersign vault setup`"
	headerList  = "sys/config/auditing/request-headers"
	auditHeader = "audit request header " + correlation
)

// state is what a Vault holds of ours.
type state struct {
	policies map[string]string         // text, by name
	roles    map[string]map[string]any // settings, by name
	plain    bool                      // the audit log shows our correlation id as it is
}

// An operator looks into Vault, and changes it, with a person's token.
type operator struct{ api *api.Client }

func (o operator) call(ctx context.Context, one call) (*api.Secret, error) {
	return (&caller{api: o.api}).do(ctx, one)
}

// read is nil where nothing is.
func (o operator) read(ctx context.Context, path string) (map[string]any, error) {
	s, err := o.call(ctx, call{read: true, path: path, token: o.api.Token()})
	if err != nil || s == nil {
		return nil, err
	}
	return s.Data, nil
}

func (o operator) write(ctx context.Context, path string, body map[string]any) error {
	_, err := o.call(ctx, call{path: path, body: body, token: o.api.Token()})
	return err
}

func (o operator) list(ctx context.Context, path string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := o.api.Logical().ListWithContext(ctx, path)
	if err != nil {
		return nil, failure(call{read: true, path: path}, err)
	}
	if s == nil {
		return nil, nil
	}
	return texts(s.Data["keys"]), nil
}

// look reads what is named like ours.
func (o operator) look(ctx context.Context) (state, error) {
	s := state{policies: map[string]string{}, roles: map[string]map[string]any{}}
	names, err := o.list(ctx, "auth/token/roles")
	if err != nil {
		return s, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		if s.roles[name], err = o.read(ctx, "auth/token/roles/"+name); err != nil {
			return s, err
		}
	}
	if names, err = o.list(ctx, "sys/policies/acl"); err != nil {
		return s, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		p, err := o.read(ctx, "sys/policies/acl/"+name)
		if err != nil {
			return s, err
		}
		s.policies[name], _ = p["policy"].(string)
	}
	headers, err := o.read(ctx, headerList)
	if err != nil {
		return s, err
	}
	all, _ := headers["headers"].(map[string]any)
	for name, settings := range all {
		if strings.EqualFold(name, correlation) {
			hmac, _ := settings.(map[string]any)["hmac"].(bool)
			s.plain = !hmac
		}
	}
	return s, nil
}

// left are the token roles of ours that no scope has.
func (s state) left(n Needs) []string {
	return slices.DeleteFunc(sorted(s.roles), func(name string) bool {
		return slices.ContainsFunc(n.Scopes, func(s Scope) bool { return s.Role.Name == name })
	})
}

// keeping is the broker's policy that can still end the leases of scopes which
// are no more, while their token roles stand.
func (s state) keeping(n Needs) Policy {
	var paths []string
	for _, sc := range n.Scopes {
		paths = append(paths, sc.Path)
	}
	for _, name := range s.left(n) {
		rules, err := parsePolicy(s.policies[name])
		if err != nil {
			continue // found elsewhere
		}
		for path := range rules {
			if isPlain(path) {
				paths = append(paths, path)
			}
		}
	}
	rest := slices.DeleteFunc(slices.Clone(n.Broker.Rules), func(r Rule) bool { return strings.HasPrefix(r.Path, "sys/leases/") })
	return Policy{Name: n.Broker.Name, Rules: withLeases(rest, paths)}
}

// isPlain says whether a policy's path names one path and not many.
func isPlain(path string) bool { return path != "" && !strings.ContainsAny(path, "*+{") }

// Verify holds a Vault against what the scopes need. It finds what is missing
// and what is too much alike: the one stops credentials, the other is a right
// that nobody asked for.
func Verify(ctx context.Context, c *api.Client, n Needs) ([]Finding, error) {
	o := operator{c}
	s, err := o.look(ctx)
	if err != nil {
		return nil, err
	}
	var out []Finding
	if !s.plain {
		out = append(out, Finding{auditHeader, "Vault's audit log does not show it, or only its HMAC", remedySetup})
	}
	out = append(out, s.policy(s.keeping(n))...)
	for _, sc := range n.Scopes {
		out = append(out, s.policy(sc.Policy)...)
		out = append(out, s.role(sc.Role)...)
	}
	for _, name := range s.left(n) {
		scope := strings.TrimPrefix(name, prefix)
		out = append(out, Finding{"token role " + name, fmt.Sprintf("there is no scope %s any more", scope), fmt.Sprintf(
			"when `countersign lease list` shows no lease of it: vault delete auth/token/roles/%s && vault policy delete %s", name, name)})
	}
	for _, name := range sorted(s.policies) {
		if name != n.Broker.Name && s.roles[name] == nil && !slices.ContainsFunc(n.Scopes, func(s Scope) bool { return s.Policy.Name == name }) {
			out = append(out, Finding{"policy " + name, "no scope and no token role has it", "vault policy delete " + name})
		}
	}
	engines, err := o.engines(ctx, n)
	return append(out, engines...), err
}

func (s state) policy(want Policy) []Finding {
	object := "policy " + want.Name
	text, ok := s.policies[want.Name]
	if !ok {
		return []Finding{{object, "is missing", remedySetup}}
	}
	have, err := parsePolicy(text)
	if err != nil {
		return []Finding{{object, "can't be compared: " + short(err.Error()), remedySetup}}
	}
	var out []Finding
	bad := func(format string, args ...any) {
		out = append(out, Finding{object, fmt.Sprintf(format, args...), remedySetup})
	}
	for _, r := range want.Rules {
		got, ok := have[r.Path]
		if !ok {
			bad("lacks %s on %s", list(r.Capabilities), r.Path)
			continue
		}
		delete(have, r.Path)
		missing, excess := compare(r.Capabilities, got.Capabilities)
		if missing != nil {
			bad("lacks %s on %s", list(missing), r.Path)
		}
		if excess != nil {
			bad("grants %s on %s, which is not needed", list(excess), r.Path)
		}
		if got.other != nil {
			bad("sets %s on %s, which is not expected", strings.Join(got.other, ", "), r.Path)
		}
		for _, name := range sorted(r.Parameters) {
			values, ok := got.Parameters[name]
			missing, excess := compare(r.Parameters[name], values)
			if !ok || missing != nil || excess != nil {
				bad("allows parameter %s on %s as %s instead of %s", name, r.Path, list(values), list(r.Parameters[name]))
			}
		}
		if r.Parameters != nil && got.Parameters == nil || r.Denied != nil && !denies(got.Denied) {
			bad("allows any parameter on %s", r.Path)
		}
		if r.Denied == nil && got.Denied != nil {
			bad("denies parameters on %s, which is not expected", r.Path)
		}
		for _, name := range sorted(got.Parameters) {
			if _, ok := r.Parameters[name]; !ok {
				bad("names parameter %s on %s, which is not expected", name, r.Path)
			}
		}
	}
	for _, path := range sorted(have) {
		bad("grants %s on %s, which is not needed", list(have[path].Capabilities), path)
	}
	return out
}

// denies reports whether denied parameters are all there are. Vault looks at no value
// beside a "*".
func denies(parameters map[string][]string) bool {
	_, ok := parameters["*"]
	return ok
}

func compare(want, have []string) (missing, excess []string) {
	for _, w := range want {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	for _, h := range have {
		if !slices.Contains(want, h) {
			excess = append(excess, h)
		}
	}
	return missing, excess
}

func (s state) role(want Role) []Finding {
	object := "token role " + want.Name
	have, ok := s.roles[want.Name]
	if !ok {
		return []Finding{{object, "is missing", remedySetup}}
	}
	var out []Finding
	for _, k := range sorted(want.Settings) {
		if got, want := setting(have[k]), setting(want.Settings[k]); got != want {
			out = append(out, Finding{object, fmt.Sprintf("%s is %s, not %s", k, got, want), remedySetup})
		}
	}
	for _, old := range []string{"period", "explicit_max_ttl"} { // set by an older Vault's API
		if v := setting(have[old]); v != "0" && v != `""` {
			out = append(out, Finding{object, fmt.Sprintf("%s is %s", old, v), "vault write auth/token/roles/" + want.Name + " " + old + "=0"})
		}
	}
	return out
}

// setting is a value of Vault's API or of ours, to compare and to print.
func setting(v any) string {
	switch v := v.(type) {
	case nil:
		return `""`
	case []any, []string:
		words := slices.Sorted(slices.Values(texts(v)))
		if len(words) == 0 {
			return `""`
		}
		return list(words)
	case string:
		return quoted(v)
	}
	return fmt.Sprint(v)
}

func texts(v any) []string {
	switch v := v.(type) {
	case []string:
		return v
	case []any:
		var out []string
		for _, one := range v {
			if s, ok := one.(string); ok {
				out = append(out, s)
			}
		}
		return out
	}
	return nil
}

// engines looks at what the scopes' paths lead to.
func (o operator) engines(ctx context.Context, n Needs) ([]Finding, error) {
	if len(n.Scopes) == 0 {
		return nil, nil
	}
	mounts, err := o.read(ctx, "sys/mounts")
	if err != nil {
		return nil, err
	}
	tokens, err := o.read(ctx, "sys/auth/token/tune")
	if err != nil {
		return nil, err
	}
	longest := seconds(tokens["max_lease_ttl"])
	var out []Finding
	for _, sc := range n.Scopes {
		if longest > 0 && longest < sc.TTL {
			out = append(out, Finding{"auth/token", fmt.Sprintf("tokens live for %s at most, scope %s wants %s", longest, sc.Scope, sc.TTL),
				"vault auth tune -max-lease-ttl=" + sc.TTL.String() + " token/, or shorten the scope's ttl"})
		}
		mount, rest, kind, version := locate(mounts, sc.Path)
		var found []Finding
		switch first, name, _ := strings.Cut(rest, "/"); {
		case mount == "":
			found = []Finding{{sc.Path, fmt.Sprintf("no secrets engine is there; scope %s reads it", sc.Scope), "vault secrets enable, or mend the scope's path"}}
		case kind == "database" && first == "creds":
			found, err = o.database(ctx, mount, name, sc)
		case kind == "database" && first == "static-creds":
			found, err = o.exists(ctx, mount+"static-roles/"+name, sc)
		case kind == "pki" && (first == "issue" || first == "sign"):
			found, err = o.pki(ctx, mount, name, sc)
		case kind == "ssh":
			found, err = o.exists(ctx, mount+"roles/"+name, sc)
		case kind == "kv" && version == "2" && first != "data":
			found = []Finding{{sc.Path, "is a path of KV version 2 without data/", "write " + mount + "data/" + rest + " in scope " + sc.Scope}}
		}
		if err != nil && status(err) != http.StatusForbidden {
			return out, err
		}
		if err != nil {
			found = append(found, Finding{sc.Path, "can't be checked: " + short(err.Error()), "verify with a token that may read it"})
		}
		out = append(out, found...)
	}
	return out, nil
}

// locate finds the mount that serves a path.
func locate(mounts map[string]any, path string) (mount, rest, kind, version string) {
	for name, raw := range mounts {
		if m, ok := raw.(map[string]any); ok && strings.HasPrefix(path, name) && len(name) > len(mount) {
			mount, rest = name, strings.TrimPrefix(path, name)
			kind, _ = m["type"].(string)
			options, _ := m["options"].(map[string]any)
			version, _ = options["version"].(string)
		}
	}
	return mount, rest, kind, version
}

func (o operator) exists(ctx context.Context, path string, sc Scope) ([]Finding, error) {
	data, err := o.read(ctx, path)
	if err != nil || data != nil {
		return nil, err
	}
	return []Finding{{path, fmt.Sprintf("is missing; scope %s reads from it", sc.Scope), "create it, or mend the scope's path"}}, nil
}

// database holds a role's own times against the scope's: they decide how long a
// user lives, whatever the broker asks for.
func (o operator) database(ctx context.Context, mount, name string, sc Scope) ([]Finding, error) {
	path := mount + "roles/" + name
	role, err := o.read(ctx, path)
	if err != nil {
		return nil, err
	}
	if role == nil {
		return o.exists(ctx, path, sc)
	}
	tuned, err := o.read(ctx, "sys/mounts/"+mount+"tune")
	if err != nil {
		return nil, err
	}
	longest := seconds(tuned["max_lease_ttl"])
	initial := seconds(role["default_ttl"])
	if initial == 0 {
		initial = seconds(tuned["default_lease_ttl"])
	}
	var out []Finding
	for _, limit := range []struct {
		object, what string
		is           time.Duration
		remedy       string
	}{
		{path, "default_ttl", initial, "vault write " + path + " default_ttl=" + sc.TTL.String()},
		{path, "max_ttl", seconds(role["max_ttl"]), "vault write " + path + " max_ttl=" + sc.TTL.String()},
		{mount, "max_lease_ttl", longest, "vault secrets tune -max-lease-ttl=" + sc.TTL.String() + " " + mount},
	} {
		if limit.is > 0 && limit.is < sc.TTL {
			out = append(out, Finding{limit.object, fmt.Sprintf("%s is %s, shorter than the ttl %s of scope %s", limit.what, limit.is, sc.TTL, sc.Scope),
				limit.remedy + " (keep its other settings), or shorten the scope's ttl"})
		}
	}
	return out, nil
}

// pki wants leases: without one a certificate can't be revoked by the broker.
func (o operator) pki(ctx context.Context, mount, name string, sc Scope) ([]Finding, error) {
	path := mount + "roles/" + name
	role, err := o.read(ctx, path)
	if err != nil {
		return nil, err
	}
	if role == nil {
		return o.exists(ctx, path, sc)
	}
	if leases, _ := role["generate_lease"].(bool); !leases {
		return []Finding{{path, fmt.Sprintf("generate_lease is off: certificates of scope %s can't be revoked", sc.Scope), "vault patch " + path + " generate_lease=true"}}, nil
	}
	return nil, nil
}

// seconds reads a time of Vault's API, a number.
func seconds(v any) time.Duration {
	n, _ := number(v)
	return time.Duration(n) * time.Second
}
