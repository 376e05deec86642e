package fingerprint_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/fingerprint"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
)

func fields(namesAndValues ...string) (list []issue.Field) {
	for i := 0; i < len(namesAndValues); i += 2 {
		list = append(list, issue.Field{Name: namesAndValues[i], Value: secret.New([]byte(namesAndValues[i+1]))})
	}
	return list
}

func TestEqualSecrets(t *testing.T) {
	k := check.Must(fingerprint.Open(t.TempDir()))(t)
	for _, c := range []struct {
		name  string
		a, b  []issue.Field
		equal bool
	}{
		{"one password of two users", fields("username", "a", "password", "x1"), fields("username", "b", "password", "x1"), true},
		{"and of another version's times", fields("password", "x1", "ttl", "1"), fields("password", "x1", "ttl", "2"), true},
		{"two passwords", fields("username", "a", "password", "x1"), fields("username", "a", "password", "x2"), false},
		{"one token", fields("token", "x1"), fields("token", "x1", "username", "b"), true},
		{"in another order", fields("id", "1", "key", "2"), fields("key", "2", "id", "1"), true},
		{"cut elsewhere", fields("a", "12", "b", "3"), fields("a", "1", "b", "23"), false},
		{"a name in a value", fields("a", "1", "b", "2"), fields("a", "1b2"), false},
		{"another field", fields("key", "x1"), fields("token", "x1"), false},
	} {
		if got := k.Of(c.a) == k.Of(c.b); got != c.equal {
			t.Errorf("%s: equal %v", c.name, got)
		}
	}
	for name, none := range map[string][]issue.Field{"nothing": nil, "an empty password": fields("password", "", "x", "y"), "a user name alone": fields("username", "a")} {
		if got := k.Of(none); got != "" {
			t.Errorf("%s has the fingerprint %s", name, got)
		}
	}
}

func TestTheKeyIsMadeOnce(t *testing.T) {
	dir := t.TempDir()
	f := fields("password", "x1")
	first := check.Must(fingerprint.Open(dir))(t).Of(f)
	if again := check.Must(fingerprint.Open(dir))(t).Of(f); again != first {
		t.Error("another key after a restart")
	}
	if other := check.Must(fingerprint.Open(t.TempDir()))(t).Of(f); other == first {
		t.Error("two brokers have one key")
	}
	path := filepath.Join(dir, fingerprint.KeyFile)
	if info := check.Must(os.Stat(path))(t); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	check.Nil(t, os.WriteFile(path, bytes.Repeat([]byte{1}, 31), 0o600))
	if _, err := fingerprint.Open(dir); err == nil || !strings.Contains(err.Error(), "31 bytes") {
		t.Errorf("a key cut short: %v", err)
	}
}

type canned struct {
	issue.Issuer
	c issue.Credential
}

func (c canned) Issue(context.Context, issue.Order) (issue.Credential, error) { return c.c, nil }

func TestItIsAmongTheNames(t *testing.T) {
	k := check.Must(fingerprint.Open(t.TempDir()))(t)
	f := fields("username", "a", "password", "x1")
	i := fingerprint.Issuer{Issuer: canned{c: issue.Credential{Fields: f, Names: map[string]string{"db_username": "a"}}}, Key: k}
	c := check.Must(i.Issue(t.Context(), issue.Order{}))(t)
	if c.Names[fingerprint.Name] != k.Of(f) || c.Names["db_username"] != "a" {
		t.Errorf("names %v", c.Names)
	}
}
