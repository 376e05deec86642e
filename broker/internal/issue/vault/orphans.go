package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/hashicorp/vault/api"
)

// A Token is a Vault token that a broker created for a lease.
type Token struct {
	Accessor string `json:"accessor"`
	Lease    string `json:"grant"`
	Host     string `json:"host"`
	Scope    string `json:"scope"`
	TTL      int64  `json:"ttl"` // seconds that are left
}

// Tokens lists what Vault has of the token roles countersign-*, with an
// operator's client. It looks each accessor up, so it takes as long as Vault
// has tokens.
func Tokens(ctx context.Context, client *api.Client) ([]Token, error) {
	list, err := client.Logical().ListWithContext(ctx, "auth/token/accessors")
	if err != nil || list == nil {
		return nil, err
	}
	accessors, _ := list.Data["keys"].([]any)
	var tokens []Token
	for _, a := range accessors {
		accessor, ok := a.(string)
		if !ok {
			return nil, fmt.Errorf("auth/token/accessors answers with %T", a)
		}
		found, err := client.Logical().WriteWithContext(ctx, "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
		if unknown(err) {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		role, _ := found.Data["role"].(string)
		if !strings.HasPrefix(role, RoleName("")) {
			continue
		}
		t := Token{Accessor: accessor}
		if ttl, ok := found.Data["ttl"].(json.Number); ok {
			t.TTL, _ = ttl.Int64()
		}
		meta, _ := found.Data["meta"].(map[string]any)
		t.Lease, _ = meta["grant"].(string)
		t.Host, _ = meta["host"].(string)
		t.Scope, _ = meta["scope"].(string)
		tokens = append(tokens, t)
	}
	return tokens, nil
}
