package vault

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"golang.org/x/crypto/ssh"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/secret"
)

// maxFields bounds what one credential may consist of.
const maxFields = 256

// fill makes the credential of Vault's answer.
func fill(c *issue.Credential, scope *policy.Scope, answer *api.Secret, now time.Time) error {
	source := source(scope)
	data := answer.Data
	if versioned(data) {
		inner, ok := data["data"].(map[string]any)
		if !ok || len(inner) == 0 {
			return fmt.Errorf("%w: the newest version of the KV secret %s is deleted or empty", issue.ErrConfig, source.Path)
		}
		data = inner
	}
	if len(data) > maxFields {
		return fmt.Errorf("%w: %s has %d fields; at most %d make a credential", issue.ErrConfig, source.Path, len(data), maxFields)
	}
	for _, name := range sorted(data) {
		value, err := text(data[name])
		if err != nil {
			return fmt.Errorf("%s: field %q can't be written down", source.Path, name)
		}
		c.Fields = append(c.Fields, issue.Field{Name: name, Value: secret.New(value)})
	}
	c.Names = names(scope, answer, data)
	if answer.LeaseID != "" {
		c.Names["vault_lease"] = answer.LeaseID
		if end := now.Add(time.Duration(answer.LeaseDuration) * time.Second); answer.LeaseDuration > 0 && end.Before(c.Expires) {
			c.Expires = end
		}
		return nil
	}
	c.Names["vault_path"] = source.Path
	if v := version(answer.Data); v != "" {
		c.Names["secret_version"] = v
	}
	c.Static = source.Method != "write"
	c.Expires = now.Add(scope.TTL)
	// What is signed has a time of its own.
	end := int64(0)
	if ssh := sshCertificate(data); ssh != nil && ssh.ValidBefore < math.MaxInt64 {
		end = int64(ssh.ValidBefore)
	} else if unix, ok := number(data["expiration"]); ok {
		end = unix
	}
	if !c.Static && end > now.Unix() && end < c.Expires.Unix() {
		c.Expires = time.Unix(end, 0)
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

// version tells one password of a static account from the next: of KV version 2 the
// secret's number, of the database engine's static roles the time of the last rotation.
func version(data map[string]any) string {
	var v any = data["last_vault_rotation"]
	if versioned(data) {
		v = data["metadata"].(map[string]any)["version"]
	}
	switch v := v.(type) {
	case json.Number:
		return v.String()
	case string:
		if at, err := time.Parse(time.RFC3339Nano, v); err == nil {
			return at.UTC().Format(time.RFC3339Nano)
		}
	}
	return ""
}

// forDatabase says whether a place of an audience is a database.
func forDatabase(place string) bool {
	scheme, _, _ := strings.Cut(place, "://")
	return slices.Contains([]string{"postgres", "postgresql", "mysql", "mariadb", "sqlserver", "mssql", "oracle"}, scheme)
}

// maxAccount bounds a user name that isn't Vault's own.
const maxAccount = 256

// names are by what others know the credential; none of them is secret.
func names(scope *policy.Scope, answer *api.Secret, data map[string]any) map[string]string {
	out := map[string]string{}
	source := source(scope)
	parts := strings.Split(source.Path, "/")
	database := answer.MountType == "database" || answer.MountType == "" && len(parts) > 2 &&
		strings.HasSuffix(parts[len(parts)-2], "creds")
	// A static account lies in KV, or in another engine's static roles, as a user name
	// beside its password. Of what isn't said to be for a database, a "username" may be
	// anything, a token too.
	_, password := data["password"]
	static := answer.LeaseID == "" && source.Method != "write" && password && slices.ContainsFunc(scope.Audience, forDatabase)
	if user, ok := data["username"].(string); ok && (database || static && len(user) <= maxAccount) {
		out["db_username"] = user
	}
	serial, numbered := data["serial_number"].(string)
	if c := sshCertificate(data); c != nil {
		out["ssh_key_id"], out["ssh_serial"] = c.KeyId, strconv.FormatUint(c.Serial, 10)
	} else if numbered {
		out["certificate_serial"] = serial
	}
	return out
}

// sshCertificate is what an SSH CA signed; nil where it is none. sshd logs its
// key id and its serial in decimal, where Vault says it in hex.
func sshCertificate(data map[string]any) *ssh.Certificate {
	signed, ok := data["signed_key"].(string)
	if !ok {
		return nil
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(signed))
	if err != nil {
		return nil
	}
	c, _ := key.(*ssh.Certificate)
	return c
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
