package vault

import (
	"context"
	"fmt"
	"strings"

	"github.com/hashicorp/vault/api"
)

// Setup makes a Vault what the scopes need, and says what it changed. What is
// right already is not written. It deletes nothing: a token role that no scope
// has any more is what its last leases are renewed by.
func Setup(ctx context.Context, c *api.Client, n Needs) ([]string, error) {
	o := operator{c}
	s, err := o.look(ctx)
	if err != nil {
		return nil, err
	}
	var changed []string
	change := func(wrong []Finding, object, path string, body map[string]any) error {
		if len(wrong) == 0 {
			return nil
		}
		if err := o.write(ctx, path, body); err != nil {
			return err
		}
		var why []string
		for _, f := range wrong {
			why = append(why, f.Problem)
		}
		changed = append(changed, fmt.Sprintf("wrote %s: it %s", object, strings.Join(why, ", ")))
		return nil
	}
	var header []Finding
	if !s.plain {
		header = []Finding{{Problem: "was not shown in the audit log"}}
	}
	if err := change(header, auditHeader, headerList+"/"+correlation, map[string]any{"hmac": false}); err != nil {
		return changed, err
	}
	broker := s.keeping(n)
	for _, sc := range append([]Scope{{Policy: broker}}, n.Scopes...) {
		p := sc.Policy
		if err := change(s.policy(p), "policy "+p.Name, "sys/policies/acl/"+p.Name, map[string]any{"policy": p.HCL()}); err != nil {
			return changed, err
		}
		if sc.Role.Name == "" {
			continue
		}
		if err := change(s.role(sc.Role), "token role "+sc.Role.Name, "auth/token/roles/"+sc.Role.Name, sc.Role.Settings); err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// Client is an operator's client of the Vault at address.
func Client(address, caFile, namespace, token string) (*api.Client, error) {
	tlsConfig, err := tlsConfig(caFile)
	if err != nil {
		return nil, err
	}
	c, err := newCaller(address, namespace, newTransport(tlsConfig))
	if err != nil {
		return nil, err
	}
	c.api.SetToken(token)
	return c.api, nil
}
