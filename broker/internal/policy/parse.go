package policy

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"

	"github.com/countersign/countersign/broker/internal/config/nesting"
)

const (
	maxName     = 64
	maxText     = 4096 // bytes of any string
	maxList     = 256  // entries of any list or map
	maxProblems = 200
	maxSigns    = 1024 // $ and % in a file
	maxNesting  = 16   // scopes need 4; HCL's parser recurses
)

// Options are what scopes are held against beside themselves.
type Options struct {
	// Reserved are the broker's own names and addresses, which no certificate
	// of a scope may have.
	Reserved []string
}

// Parse reads a whole set. The error is a *Problems with every mistake of
// every file.
func Parse(files []File, o Options) (*Set, error) {
	r := reader{options: o, first: map[string]hcl.Range{}}
	set := &Set{scopes: map[string]*Scope{}}
	if len(files) > MaxFiles {
		r.problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d files; at most %d are read", len(files), MaxFiles), "")
		files = nil
	}
	size := 0
	for _, f := range files {
		size += len(f.Content)
	}
	if size > MaxSize {
		r.problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d bytes in all files; at most %d are read", size, MaxSize), "")
		files = nil
	}
	files = slices.SortedStableFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	names := map[string]bool{}
	for _, f := range files {
		where := hcl.Range{Filename: f.Name}
		switch {
		case f.Name == "" || len(f.Name) > 255 || strings.ContainsFunc(f.Name, unprintable):
			where.Filename = fmt.Sprintf("%.64q", f.Name)
			r.problem(where, "a file's name has 1 to 255 printable characters", "")
			continue
		case names[f.Name]:
			r.problem(where, "two files have this name", "")
			continue
		}
		names[f.Name] = true
		for _, s := range r.file(f) {
			set.scopes[s.Name] = s
		}
		set.files = append(set.files, File{Name: f.Name, Content: slices.Clone(f.Content)})
	}
	if len(r.first) > MaxScopes {
		r.problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d scopes; at most %d are read", len(r.first), MaxScopes), "")
	}
	if len(r.problems) > 0 {
		return nil, r.errors()
	}
	return set, nil
}

// A reader collects what is wrong.
type reader struct {
	options  Options
	source   []byte               // of the file being read
	first    map[string]hcl.Range // where a scope's name was used first
	problems []Problem
}

func (r *reader) problem(at hcl.Range, message, suggestion string) {
	r.problems = append(r.problems, Problem{File: at.Filename, Line: at.Start.Line, Column: at.Start.Column, Message: message, Suggestion: suggestion})
}

func (r *reader) errors() *Problems {
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if n := len(r.problems); n > maxProblems {
		r.problems = append(r.problems[:maxProblems], Problem{File: "(set)", Message: fmt.Sprintf("%d more mistakes are not shown", n-maxProblems)})
	}
	return &Problems{List: r.problems}
}

func (r *reader) file(f File) []*Scope {
	r.source = f.Content
	where := hcl.Range{Filename: f.Name}
	if len(f.Content) > MaxFileSize {
		r.problem(where, fmt.Sprintf("%d bytes; at most %d are read", len(f.Content), MaxFileSize), "")
		return nil
	}
	if !utf8.Valid(f.Content) {
		r.problem(where, "not UTF-8", "")
		return nil
	}
	number := 0
	for line := range bytes.Lines(f.Content) {
		if number++; len(line) > MaxLine {
			where.Start.Line = number
			r.problem(where, fmt.Sprintf("a line of %d bytes; at most %d are read", len(line), MaxLine), "")
			return nil
		}
	}
	if n := bytes.Count(f.Content, []byte("$")) + bytes.Count(f.Content, []byte("%")); n > maxSigns {
		r.problem(hcl.Range{Filename: f.Name}, fmt.Sprintf("%d signs $ and %%; at most %d are read", n, maxSigns), "")
		return nil
	}
	if at, deep := nesting.TooDeep(f.Content, f.Name, maxNesting); deep {
		r.problem(at, fmt.Sprintf("nested deeper than %d levels", maxNesting), "")
		return nil
	}
	parsed, diags := hclsyntax.ParseConfig(f.Content, f.Name, hcl.InitialPos)
	if diags.HasErrors() {
		for _, d := range diags {
			if d.Subject != nil {
				where = *d.Subject
			}
			r.problem(where, strings.Join(strings.Fields(d.Summary+": "+d.Detail), " "), "")
		}
		return nil
	}
	b := r.block(parsed.Body.(*hclsyntax.Body), "a scope file", nil, []string{"scope"})
	var out []*Scope
	for _, block := range b.blocks["scope"] {
		if s := r.scope(block); s != nil {
			out = append(out, s)
		}
	}
	return out
}

// A block is one body whose unknown names were complained about.
type block struct {
	*reader
	at     hcl.Range
	what   string
	attrs  hclsyntax.Attributes
	blocks map[string][]*hclsyntax.Block
}

func (r *reader) block(body *hclsyntax.Body, what string, attrs, blocks []string) block {
	b := block{reader: r, at: body.SrcRange, what: what, attrs: body.Attributes, blocks: map[string][]*hclsyntax.Block{}}
	known := slices.Concat(attrs, blocks)
	for _, name := range slices.Sorted(maps.Keys(body.Attributes)) {
		switch {
		case slices.Contains(attrs, name):
		case slices.Contains(blocks, name):
			r.problem(body.Attributes[name].NameRange, fmt.Sprintf("%s is a block and has no equals sign", name), "")
		default:
			r.problem(body.Attributes[name].NameRange, fmt.Sprintf("%s has no %q", what, name), nearest(name, known))
		}
	}
	for _, inner := range body.Blocks {
		switch {
		case slices.Contains(blocks, inner.Type):
			b.blocks[inner.Type] = append(b.blocks[inner.Type], inner)
		case slices.Contains(attrs, inner.Type):
			r.problem(inner.TypeRange, fmt.Sprintf("%s is an argument and wants an equals sign", inner.Type), "")
		default:
			r.problem(inner.TypeRange, fmt.Sprintf("%s has no %q block", what, inner.Type), nearest(inner.Type, known))
		}
	}
	return b
}

// one is the only block of a kind, without labels; nil where there is none.
func (b block) one(kind string) *hclsyntax.Block {
	list := b.blocks[kind]
	if len(list) == 0 {
		return nil
	}
	for _, again := range list[1:] {
		b.problem(again.TypeRange, fmt.Sprintf("%s has two %s blocks", b.what, kind), "")
	}
	if len(list[0].LabelRanges) > 0 {
		b.problem(list[0].LabelRanges[0], fmt.Sprintf("a %s block has no name", kind), "")
	}
	return list[0]
}

// bad is a complaint about an argument, or about the block where it is missing.
func (b block) bad(name, format string, args ...any) {
	at, message := b.at, name+": "+fmt.Sprintf(format, args...)
	if a := b.attrs[name]; a != nil {
		at = a.NameRange
	}
	b.problem(at, message, "")
}

func (b block) has(name string) bool { return b.attrs[name] != nil }

// constant is the value of an expression that is a literal. Scopes compute
// nothing: what stands there is what holds.
func (b block) constant(name string, e hclsyntax.Expression, kind cty.Type, want string) (cty.Value, bool) {
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
	b.problem(e.Range(), fmt.Sprintf("%s: wants %s", name, want), "")
	return cty.NilVal, false
}

// A check says what is wrong with a value, in words that follow it, and what
// was likely meant.
type check func(s string) (why, meant string)

// login is what a URL must not bring into an error message.
var login = regexp.MustCompile(`//[^/]*@`)

func anything(string) (string, string) { return "", "" }

// oneOf allows these words alone.
func oneOf(words ...string) check {
	return func(s string) (string, string) {
		if slices.Contains(words, s) {
			return "", ""
		}
		return "is not " + strings.Join(words, " or "), nearest(s, words)
	}
}

// word is a constant string that passes its check.
func (b block) word(name string, e hclsyntax.Expression, ok check) (string, bool) {
	v, literal := b.constant(name, e, cty.String, "a plain string in quotes; a literal ${ is written $${")
	if !literal {
		return "", false
	}
	s := v.AsString()
	why, meant := "", ""
	switch {
	case s == "":
		b.problem(e.Range(), name+": is empty", "")
		return "", false
	case len(s) > maxText:
		why = fmt.Sprintf("has %d bytes; at most %d are read", len(s), maxText)
	default:
		why, meant = ok(s)
	}
	if why != "" {
		b.problem(e.Range(), fmt.Sprintf("%s: %q %s", name, bounded(login.ReplaceAllString(s, "//…@")), why), meant)
	}
	return s, why == ""
}

// text is a string; empty where it is not there.
func (b block) text(name string, ok check) string {
	if a := b.attrs[name]; a != nil {
		if s, good := b.word(name, a.Expr, ok); good {
			return s
		}
	}
	return ""
}

// texts is a list of strings; nil where it is not there.
func (b block) texts(name string, ok check) []string {
	a := b.attrs[name]
	if a == nil {
		return nil
	}
	list, isList := a.Expr.(*hclsyntax.TupleConsExpr)
	if !isList {
		b.bad(name, "wants a list of strings, as [\"…\"]")
		return nil
	}
	if n := len(list.Exprs); n == 0 || n > maxList {
		b.bad(name, "has %d entries; it wants 1 to %d", n, maxList)
		return nil
	}
	var out []string
	for _, e := range list.Exprs {
		s, good := b.word(name, e, ok)
		if good && slices.Contains(out, s) {
			b.problem(e.Range(), fmt.Sprintf("%s: %q is in the list twice", name, s), "")
		}
		out = append(out, s)
	}
	return out
}

// pairs is a map of strings; nil where it is not there.
func (b block) pairs(name string, key, value check) map[string]string {
	a := b.attrs[name]
	if a == nil {
		return nil
	}
	object, isObject := a.Expr.(*hclsyntax.ObjectConsExpr)
	if !isObject {
		b.bad(name, "wants pairs, as { key = \"value\" }")
		return nil
	}
	if n := len(object.Items); n == 0 || n > maxList {
		b.bad(name, "has %d pairs; it wants 1 to %d", n, maxList)
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
			b.problem(item.KeyExpr.Range(), fmt.Sprintf("%s: %q is there twice", name, k), "")
		}
		out[k] = v
	}
	return out
}

// key is a map's key: a bare word or a string.
func (b block) key(name string, e hclsyntax.Expression, ok check) (string, bool) {
	if wrapped, isKey := e.(*hclsyntax.ObjectConsKeyExpr); isKey && !wrapped.ForceNonLiteral {
		e = wrapped.Wrapped
		if word := hcl.ExprAsKeyword(e); word != "" {
			why, meant := ok(word)
			if why != "" {
				b.problem(wrapped.Range(), fmt.Sprintf("%s: %q %s", name, bounded(word), why), meant)
			}
			return word, why == ""
		}
	}
	return b.word(name, e, ok)
}

// flag is a bool; nil where it is not there.
func (b block) flag(name string) *bool {
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

// duration is a time span between two bounds, or the default.
func (b block) duration(name string, least, most, otherwise time.Duration) time.Duration {
	text := b.text(name, anything)
	if text == "" {
		return otherwise
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		b.bad(name, "%q is no duration; as 90s, 15m or 8h", text)
		return otherwise
	}
	if d < least || d > most {
		b.bad(name, "%s is outside of %s to %s", d, least, most)
		return otherwise
	}
	return d
}
