package deliver

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"text/template/parse"
	"unicode/utf8"

	"github.com/countersign/countersign/internal/secret"
)

// Templates look like Go's and are its smallest part: text, and actions that
// write one field, or a constant, through encoders:
//
//	{{ .password }}  {{ .password | json }}  {{ json .password }}
//	{{ index . "db-password" | yaml }}  {{ "{{" }}
//
// They are parsed by text/template/parse and evaluated here: without its
// builtins, variables and control structures there is no way around the check
// for control characters, no way to loop, and no error that quotes a value.

// Validate checks a template without values; the error says which line.
func Validate(template string) error {
	_, err := compile(template)
	return err
}

// A piece is text, or a field with its encoders.
type piece struct {
	text     []byte
	field    string // empty: text
	encoders []string
	line     int
}

func compile(template string) ([]piece, error) {
	if len(template) > MaxContent {
		return nil, fmt.Errorf("the template has %d bytes; at most %d are read", len(template), MaxContent)
	}
	known := map[string]any{"index": true} // the parser takes nil for undefined
	for name := range encoders {
		known[name] = true
	}
	trees, err := parse.Parse("template", template, "{{", "}}", known)
	if err != nil {
		return nil, fmt.Errorf("%w (functions are %s; a field with other characters than letters, digits and _ is written {{ index . \"db-password\" }})", err, functions())
	}
	if len(trees) > 1 {
		return nil, fmt.Errorf("template: define and block are not part of a file's template")
	}
	tree := trees["template"]
	if tree == nil || tree.Root == nil { // nothing but space and comments
		return []piece{{text: []byte(template)}}, nil
	}
	var out []piece
	for _, n := range tree.Root.Nodes {
		line := 1 + strings.Count(template[:min(int(n.Position()), len(template))], "\n")
		switch n := n.(type) {
		case *parse.TextNode:
			out = append(out, piece{text: n.Text})
		case *parse.CommentNode:
		case *parse.ActionNode:
			p, err := action(n.Pipe)
			if err != nil {
				return nil, fmt.Errorf("template: line %d: %s: %w", line, n, err)
			}
			p.line = line
			out = append(out, p)
		default:
			return nil, fmt.Errorf("template: line %d: only fields and constants can stand in {{ }}; there is no if, range, with or template", line)
		}
	}
	return out, nil
}

func functions() string {
	names := make([]string, 0, len(encoders))
	for name := range encoders {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// action reads a pipeline: where its value comes from, then encoders.
func action(pipe *parse.PipeNode) (p piece, err error) {
	if len(pipe.Decl) > 0 {
		return p, fmt.Errorf("variables are not part of a file's template")
	}
	first := pipe.Cmds[0].Args
	if name, ok := first[0].(*parse.IdentifierNode); ok && name.Ident != "index" {
		if len(first) != 2 {
			return p, fmt.Errorf("%s takes one value", name.Ident)
		}
		p.encoders = append(p.encoders, name.Ident)
		first = first[1:]
	}
	switch v := first[0].(type) {
	case *parse.FieldNode:
		if len(v.Ident) != 1 || len(first) != 1 {
			return p, fmt.Errorf("a field is one name, as .password")
		}
		p.field = v.Ident[0]
	case *parse.StringNode:
		if len(first) != 1 {
			return p, fmt.Errorf("a constant stands alone")
		}
		p.text = []byte(v.Text)
	case *parse.IdentifierNode: // index
		if len(first) != 3 || first[1].Type() != parse.NodeDot || first[2].Type() != parse.NodeString {
			return p, fmt.Errorf(`index is written index . "name"`)
		}
		p.field = first[2].(*parse.StringNode).Text
	default:
		return p, fmt.Errorf("a value is a field, as .password, or a \"constant\"")
	}
	for _, c := range pipe.Cmds[1:] {
		name, ok := c.Args[0].(*parse.IdentifierNode)
		if !ok || len(c.Args) != 1 || name.Ident == "index" {
			return p, fmt.Errorf("after | stands one of %s", functions())
		}
		p.encoders = append(p.encoders, name.Ident)
	}
	if p.field == "" && len(p.encoders) > 0 {
		return p, fmt.Errorf("a constant needs no encoder")
	}
	return p, nil
}

// Render fills a template in. Its errors name fields, never their values.
func Render(template string, fields map[string]secret.Bytes) (secret.Bytes, error) {
	pieces, err := compile(template)
	if err != nil {
		return secret.Bytes{}, err
	}
	var out bytes.Buffer
	for _, p := range pieces {
		b := p.text
		if p.field != "" {
			if b, err = p.value(fields); err != nil {
				clear(out.Bytes())
				return secret.Bytes{}, fmt.Errorf("template: line %d: field %q: %w", p.line, p.field, err)
			}
		}
		if out.Len()+len(b) > MaxContent {
			clear(out.Bytes())
			return secret.Bytes{}, fmt.Errorf("template: the content is larger than %d bytes", MaxContent)
		}
		out.Write(b)
	}
	return secret.New(out.Bytes()), nil
}

func (p piece) value(fields map[string]secret.Bytes) ([]byte, error) {
	field, ok := fields[p.field]
	if !ok {
		names := make([]string, 0, len(fields))
		for name := range fields {
			names = append(names, name)
		}
		slices.Sort(names)
		return nil, fmt.Errorf("the credential has none of this name; it has %s", strings.Join(names, ", "))
	}
	b := field.Reveal()
	if len(b) > MaxContent {
		return nil, fmt.Errorf("larger than %d bytes", MaxContent)
	}
	names := p.encoders
	if len(names) == 0 {
		names = []string{"plain"}
	}
	if !utf8.Valid(b) {
		return nil, fmt.Errorf("not UTF-8 text")
	}
	for _, name := range names {
		encoded, err := encoders[name](b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		b = encoded
	}
	return b, nil
}
