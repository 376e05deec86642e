package hclread

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"

	"github.com/countersign/countersign/internal/bounded"
)

// Bounds of what one argument may hold.
const (
	maxText = 4096 // bytes of any string
	maxList = 256  // entries of any list or map
	maxSaid = 64   // bytes of a wrong value that a problem repeats
)

// A Block is the body of a block. Reader.Block has already noted the unknown names in it.
type Block struct {
	*Reader
	At hcl.Range // the place that problems of the block as a whole name

	what   string
	attrs  hclsyntax.Attributes
	blocks map[string][]*hclsyntax.Block
}

// Block opens a body that may have these arguments and inner blocks; all others are
// problems. what names the body in their messages, such as "a scope".
func (r *Reader) Block(body *hclsyntax.Body, what string, attrs, blocks []string) Block {
	b := Block{Reader: r, At: body.SrcRange, what: what, attrs: body.Attributes, blocks: map[string][]*hclsyntax.Block{}}
	known := slices.Concat(attrs, blocks)
	for _, name := range slices.Sorted(maps.Keys(body.Attributes)) {
		switch {
		case slices.Contains(attrs, name):
		case slices.Contains(blocks, name):
			r.Problem(body.Attributes[name].NameRange, fmt.Sprintf("%s is a block and has no equals sign", name), "")
		default:
			r.Problem(body.Attributes[name].NameRange, fmt.Sprintf("%s has no %q", what, name), Nearest(name, known))
		}
	}
	for _, inner := range body.Blocks {
		switch {
		case slices.Contains(blocks, inner.Type):
			b.blocks[inner.Type] = append(b.blocks[inner.Type], inner)
		case slices.Contains(attrs, inner.Type):
			r.Problem(inner.TypeRange, fmt.Sprintf("%s is an argument and wants an equals sign", inner.Type), "")
		default:
			r.Problem(inner.TypeRange, fmt.Sprintf("%s has no %q block", what, inner.Type), Nearest(inner.Type, known))
		}
	}
	return b
}

// One is the only block of a kind, without labels; nil where there is none.
func (b Block) One(kind string) *hclsyntax.Block {
	list := b.blocks[kind]
	if len(list) == 0 {
		return nil
	}
	for _, again := range list[1:] {
		b.Problem(again.TypeRange, fmt.Sprintf("%s has two %s blocks", b.what, kind), "")
	}
	if len(list[0].LabelRanges) > 0 {
		b.Problem(list[0].LabelRanges[0], fmt.Sprintf("a %s block has no name", kind), "")
	}
	return list[0]
}

// Bad notes a problem with an argument; the block is its place where the argument is
// missing.
func (b Block) Bad(name, format string, args ...any) {
	at, message := b.At, name+": "+fmt.Sprintf(format, args...)
	if a := b.attrs[name]; a != nil {
		at = a.NameRange
	}
	b.Problem(at, message, "")
}

// Has reports whether an argument is set.
func (b Block) Has(name string) bool { return b.attrs[name] != nil }

// Range is where an argument's value stands, and the bytes of it; the block's own
// place where the argument is missing.
func (b Block) Range(name string) (at hcl.Range, text []byte) {
	a := b.attrs[name]
	if a == nil {
		return b.At, nil
	}
	at = a.Expr.Range()
	return at, at.SliceBytes(b.source)
}

// Blocks are the inner blocks of a kind, in the file's order.
func (b Block) Blocks(kind string) []*hclsyntax.Block { return b.blocks[kind] }

// constant is the value of an expression that is a literal. Scopes compute
// nothing: what stands there is what holds.
func (b Block) constant(name string, e hclsyntax.Expression, kind cty.Type, want string) (cty.Value, bool) {
	literal := false
	switch e := e.(type) {
	case *hclsyntax.LiteralValueExpr:
		literal = true
	case *hclsyntax.TemplateExpr:
		literal = !slices.ContainsFunc(e.Parts, func(p hclsyntax.Expression) bool {
			_, ok := p.(*hclsyntax.LiteralValueExpr)
			return !ok
		})
	}
	if literal {
		if v, diags := e.Value(nil); !diags.HasErrors() && v.Type() == kind && !v.IsNull() {
			return v, true
		}
	}
	b.Problem(e.Range(), fmt.Sprintf("%s: wants %s", name, want), "")
	return cty.NilVal, false
}

// A Check says what is wrong with a value, in words that follow it, and what
// was likely meant.
type Check func(s string) (why, meant string)

// login is what a URL must not bring into an error message.
var login = regexp.MustCompile(`//[^/]*@`)

// Anything allows every string.
func Anything(string) (string, string) { return "", "" }

// Printable allows 1 to 256 printable characters.
func Printable(s string) (why, meant string) {
	if len(s) > 256 || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		why = "is not 1 to 256 printable characters"
	}
	return why, ""
}

// OneOf allows these words alone.
func OneOf(words ...string) Check {
	return func(s string) (string, string) {
		if slices.Contains(words, s) {
			return "", ""
		}
		return "is not " + strings.Join(words, " or "), Nearest(s, words)
	}
}

// word is a constant string that passes its check.
func (b Block) word(name string, e hclsyntax.Expression, ok Check) (string, bool) {
	v, literal := b.constant(name, e, cty.String, "a plain string in quotes; a literal ${ is written $${")
	if !literal {
		return "", false
	}
	s := v.AsString()
	why, meant := "", ""
	switch {
	case s == "":
		b.Problem(e.Range(), name+": is empty", "")
		return "", false
	case len(s) > maxText:
		why = fmt.Sprintf("has %d bytes; at most %d are read", len(s), maxText)
	default:
		why, meant = ok(s)
	}
	if why != "" {
		b.Problem(e.Range(), fmt.Sprintf("%s: %q %s", name, bounded.Text(login.ReplaceAllString(s, "//…@"), maxSaid), why), meant)
	}
	return s, why == ""
}

// Text is a string; empty where it is not there.
func (b Block) Text(name string, ok Check) string {
	if a := b.attrs[name]; a != nil {
		if s, good := b.word(name, a.Expr, ok); good {
			return s
		}
	}
	return ""
}

// Texts is a list of strings; nil where it is not there.
func (b Block) Texts(name string, ok Check) []string {
	a := b.attrs[name]
	if a == nil {
		return nil
	}
	list, isList := a.Expr.(*hclsyntax.TupleConsExpr)
	if !isList {
		b.Bad(name, "wants a list of strings, as [\"…\"]")
		return nil
	}
	if n := len(list.Exprs); n == 0 || n > maxList {
		b.Bad(name, "has %d entries; it wants 1 to %d", n, maxList)
		return nil
	}
	var out []string
	for _, e := range list.Exprs {
		s, good := b.word(name, e, ok)
		if good && slices.Contains(out, s) {
			b.Problem(e.Range(), fmt.Sprintf("%s: %q is in the list twice", name, s), "")
		}
		out = append(out, s)
	}
	return out
}

// Pairs is a map of strings; nil where it is not there.
func (b Block) Pairs(name string, key, value Check) map[string]string {
	a := b.attrs[name]
	if a == nil {
		return nil
	}
	object, isObject := a.Expr.(*hclsyntax.ObjectConsExpr)
	if !isObject {
		b.Bad(name, "wants pairs, as { key = \"value\" }")
		return nil
	}
	if n := len(object.Items); n == 0 || n > maxList {
		b.Bad(name, "has %d pairs; it wants 1 to %d", n, maxList)
		return nil
	}
	out := map[string]string{}
	for _, item := range object.Items {
		k, ok := b.key(name, item.KeyExpr, key)
		v, good := b.word(name, item.ValueExpr, value)
		if !ok || !good {
			continue
		}
		if _, twice := out[k]; twice {
			b.Problem(item.KeyExpr.Range(), fmt.Sprintf("%s: %q is there twice", name, k), "")
		}
		out[k] = v
	}
	return out
}

// key is a map's key: a bare word or a string.
func (b Block) key(name string, e hclsyntax.Expression, ok Check) (string, bool) {
	if wrapped, isKey := e.(*hclsyntax.ObjectConsKeyExpr); isKey && !wrapped.ForceNonLiteral {
		e = wrapped.Wrapped
		if word := hcl.ExprAsKeyword(e); word != "" {
			why, meant := ok(word)
			if why != "" {
				b.Problem(wrapped.Range(), fmt.Sprintf("%s: %q %s", name, bounded.Text(word, maxSaid), why), meant)
			}
			return word, why == ""
		}
	}
	return b.word(name, e, ok)
}

// Flag is a bool; nil where it is not there.
func (b Block) Flag(name string) *bool {
	a := b.attrs[name]
	if a == nil {
		return nil
	}
	v, ok := b.constant(name, a.Expr, cty.Bool, "true or false")
	if !ok {
		return nil
	}
	flag := v.True()
	return &flag
}

// Duration is a time span between two bounds, or the default.
func (b Block) Duration(name string, least, most, otherwise time.Duration) time.Duration {
	text := b.Text(name, Anything)
	if text == "" {
		return otherwise
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		b.Bad(name, "%q is no duration; as 90s, 15m or 8h", text)
		return otherwise
	}
	if d < least || d > most {
		b.Bad(name, "%s is outside of %s to %s", d, least, most)
		return otherwise
	}
	return d
}
