package vault

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/wire/secret"
)

// maxFields bounds what one credential may consist of.
const maxFields = 256

// fill makes the credential of Vault's answer.
func fill(c *issue.Credential, scope *policy.Scope, answer *api.Secret, now time.Time) error {
	data := answer.Data
	if versioned(data) {
		inner, ok := data["data"].(map[string]any)
		if !ok || len(inner) == 0 {
			return fmt.Errorf("%w: the newest version of the KV secret %s is deleted or empty", issue.ErrConfig, scope.Vault.Path)
		}
		data = inner
	}
	if len(data) > maxFields {
		return fmt.Errorf("%w: %s has %d fields; at most %d make a credential", issue.ErrConfig, scope.Vault.Path, len(data), maxFields)
	}
	for _, name := range sorted(data) {
		value, err := text(data[name])
		if err != nil {
			return fmt.Errorf("%s: field %q can't be written down", scope.Vault.Path, name)
		}
		c.Fields = append(c.Fields, issue.Field{Name: name, Value: secret.New(value)})
	}
	c.Names = names(scope, answer, data)
	c.Names["vault_accessor"] = c.Accessor
	if c.VaultLease = answer.LeaseID; c.VaultLease != "" {
		c.Names["vault_lease"] = c.VaultLease
		if end := now.Add(time.Duration(answer.LeaseDuration) * time.Second); answer.LeaseDuration > 0 && end.Before(c.Expires) {
			c.Expires = end
		}
		return nil
	}
	c.Static = scope.Vault.Method != "write"
	c.Expires = now.Add(scope.Vault.TTL)
	if unix, ok := number(data["expiration"]); ok && !c.Static && unix > now.Unix() {
		if end := time.Unix(unix, 0); end.Before(c.Expires) { // a certificate's own
			c.Expires = end
		}
	}
	return nil
}

// versioned says whether an answer is KV version 2's, whose fields lie one
// level down.
func versioned(data map[string]any) bool {
	metadata, ok := data["metadata"].(map[string]any)
	_, inner := data["data"]
	_, version := metadata["version"]
	return ok && inner && version && len(data) == 2
}

// names are by what others know the credential; none of them is secret.
func names(scope *policy.Scope, answer *api.Secret, data map[string]any) map[string]string {
	out := map[string]string{}
	parts := strings.Split(scope.Vault.Path, "/")
	database := answer.MountType == "database" || answer.MountType == "" && len(parts) > 2 &&
		strings.HasSuffix(parts[len(parts)-2], "creds")
	if user, ok := data["username"].(string); ok && database {
		out["db_username"] = user
	}
	if serial, ok := data["serial_number"].(string); ok {
		if _, ssh := data["signed_key"]; ssh || answer.MountType == "ssh" {
			out["ssh_key_id"] = serial
		} else {
			out["certificate_serial"] = serial
		}
	}
	return out
}

// text is a value as a program reads it: a string as it is, a number or truth in
// JSON's words, and anything nested as JSON.
func text(v any) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []byte(v), nil
	case json.Number:
		return []byte(v.String()), nil
	}
	return json.Marshal(v)
}
