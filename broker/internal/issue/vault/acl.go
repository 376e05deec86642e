package vault

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/zclconf/go-cty/cty"

	"github.com/countersign/countersign/internal/hclread"
)

// limits bound the text of a policy that is read.
var limits = hclread.Limits{Size: 1 << 20, Nesting: 16}

// A held rule is one path of a policy as Vault holds it.
type held struct {
	Rule
	other []string // settings beyond capabilities and parameters
}

// parsePolicy reads the HCL that `vault policy write` takes, without its JSON
// form. What it doesn't know is an error, so that nothing is taken for harmless.
func parsePolicy(text string) (map[string]held, error) {
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		return nil, errors.New("it is JSON; write it as HCL")
	}
	var r hclread.Reader
	body := r.Parse("policy", []byte(text), limits)
	if body == nil {
		return nil, r.Problems
	}
	for name := range body.Attributes {
		if name != "name" {
			return nil, fmt.Errorf("unknown setting %q", name)
		}
	}
	rules := map[string]held{}
	for _, block := range body.Blocks {
		if block.Type != "path" || len(block.Labels) != 1 {
			return nil, fmt.Errorf("unknown block %q", block.Type)
		}
		r := rules[block.Labels[0]] // Vault adds up what is named twice
		r.Path = block.Labels[0]
		for _, inner := range block.Body.Blocks {
			r.other = append(r.other, inner.Type)
		}
		for _, name := range sorted(block.Body.Attributes) {
			value, diags := block.Body.Attributes[name].Expr.Value(nil)
			if diags.HasErrors() {
				return nil, fmt.Errorf("%s of %s: %s", name, r.Path, diags[0].Summary)
			}
			var err error
			switch name {
			case "capabilities":
				var more []string
				more, err = words(value)
				r.Capabilities = append(r.Capabilities, more...)
			case "allowed_parameters":
				r.Parameters, err = parameters(value)
			case "denied_parameters":
				r.Denied, err = parameters(value)
			default:
				r.other = append(r.other, name)
			}
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w", name, r.Path, err)
			}
		}
		slices.Sort(r.Capabilities)
		r.Capabilities = slices.Compact(r.Capabilities)
		rules[r.Path] = r
	}
	return rules, nil
}

// words are a list of strings.
func words(v cty.Value) ([]string, error) {
	if v.IsNull() || !v.CanIterateElements() {
		return nil, errors.New("is no list")
	}
	out := []string{}
	for _, e := range v.AsValueSlice() {
		if e.IsNull() || e.Type() != cty.String {
			return nil, errors.New("is no list of strings")
		}
		out = append(out, e.AsString())
	}
	return out, nil
}

func parameters(v cty.Value) (map[string][]string, error) {
	if v.IsNull() || !v.Type().IsObjectType() {
		return nil, errors.New("is no map")
	}
	out := map[string][]string{}
	for name, values := range v.AsValueMap() {
		list, err := words(values)
		if err != nil {
			return nil, err
		}
		out[name] = list
	}
	return out, nil
}
