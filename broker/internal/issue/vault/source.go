package vault

import (
	"regexp"
	"strings"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/hclread"
)

// Kind describes credentials of HashiCorp Vault or OpenBao.
var Kind = issue.Kind{
	Kind: policy.Kind{Name: "vault", Arguments: []string{"path", "method", "parameters"}, Decode: decode},
	Open: open,
}

// A Source is a scope's vault block: a path of Vault that answers with data.
type Source struct {
	Path       string
	Method     string            // "read" or "write"; PKI and SSH issue on a write
	Parameters map[string]string // of a write
}

// AccountRole returns the role of Vault's database engine, which the engine puts into user
// names, or "" for a source of another engine.
func (s *Source) AccountRole() string {
	mount, role, ok := strings.Cut(s.Path, "/creds/")
	if !ok || mount == "" {
		return ""
	}
	return role
}

// source returns the vault block of a scope, or nil if the scope is of another kind.
func source(s *policy.Scope) *Source {
	if s == nil {
		return nil
	}
	v, _ := s.Source.(*Source)
	return v
}

// No *, + or {{: in Vault's policies they stand for other paths.
var pathPart = regexp.MustCompile(`^[A-Za-z0-9_.@:=-]+$`)

func decode(b hclread.Block, _ policy.Options) policy.Source {
	if !b.Has("path") {
		b.Bad("path", "is missing")
	}
	s := &Source{
		Path:       b.Text("path", credentialPath),
		Method:     b.Text("method", hclread.OneOf("read", "write")),
		Parameters: b.Pairs("parameters", hclread.Printable, hclread.Anything),
	}
	if (s.Method == "read" || !b.Has("method")) && s.Parameters != nil {
		b.Bad("parameters", `only a write has them; add method = "write"`)
	}
	if s.Method == "" {
		s.Method = "read"
	}
	return s
}

func credentialPath(p string) (why, meant string) {
	parts := strings.Split(p, "/")
	switch strings.ToLower(parts[0]) {
	case "sys", "auth", "identity", "cubbyhole":
		return "is Vault's own, and no credential", ""
	}
	for _, part := range parts {
		switch {
		case part == "." || part == ".." || !pathPart.MatchString(part):
			return "is not a path inside Vault, as database/creds/billing", ""
		case strings.HasPrefix(strings.ToLower(part), "countersign-"):
			return "is the broker's own", ""
		}
	}
	return "", ""
}
