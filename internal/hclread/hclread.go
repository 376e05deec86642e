// Package hclread reads HCL: the configs of broker, agent and watch, scopes, and
// Vault's policies.
//
// It doesn't trust the text. HCL's parser recurses, and its lexer takes quadratic time for
// unclosed heredocs, long lines and many $ signs, so a text is compared with its Limits
// before it is parsed. Reading is strict. It reports all mistakes at once, with their places
// and suggestions.
package hclread

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/countersign/countersign/internal/bounded"
)

// Limits bound a text before it is parsed. Zero means no limit, except for Nesting, which
// has to be set.
type Limits struct {
	Size    int // bytes
	Line    int // bytes of one line
	Signs   int // $ and % together
	Nesting int // levels
}

// config are the limits of a config file, which root writes.
var config = Limits{Size: 1 << 20, Line: 64 << 10, Signs: 8192, Nesting: 32}

// A Problem is one mistake in a file.
type Problem struct {
	File       string `json:"file"`
	Line       int    `json:"line"` // 0: of the file as a whole
	Column     int    `json:"column"`
	Message    string `json:"message"`
	Suggestion string `json:"suggestion,omitempty"`
}

// String is the problem in one line: FILE:LINE: MESSAGE.
func (p Problem) String() string {
	where := p.File
	if p.Line > 0 {
		where = fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	if p.Suggestion != "" {
		return fmt.Sprintf("%s: %s; did you mean %q?", where, p.Message, p.Suggestion)
	}
	return where + ": " + p.Message
}

// Problems are all mistakes of a file, or of several.
type Problems []Problem

// Error has a line for each problem.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, one := range p {
		lines[i] = one.String()
	}
	return strings.Join(lines, "\n")
}

// Sort orders problems by file, line and column.
func (p Problems) Sort() {
	slices.SortStableFunc(p, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// Or returns p as an error, or nil if there are no problems.
func (p Problems) Or() error {
	if len(p) == 0 {
		return nil
	}
	return p
}

// A Reader collects what is wrong with the texts that it reads.
type Reader struct {
	Problems Problems

	source []byte // of the text being read
}

// Problem notes a mistake.
func (r *Reader) Problem(at hcl.Range, message, suggestion string) {
	r.Problems = append(r.Problems, Problem{File: at.Filename, Line: at.Start.Line, Column: at.Start.Column, Message: message, Suggestion: suggestion})
}

// Parse parses a text. It returns nil if it can't, after noting the problems.
func (r *Reader) Parse(name string, text []byte, l Limits) *hclsyntax.Body {
	r.source = text
	if at, why := l.exceeded(name, text); why != "" {
		r.Problem(at, why, "")
		return nil
	}
	parsed, diags := hclsyntax.ParseConfig(text, name, hcl.InitialPos)
	if diags.HasErrors() {
		r.diagnostics(name, diags)
		return nil
	}
	return parsed.Body.(*hclsyntax.Body) // the native syntax has no other
}

// exceeded returns the first limit that a text exceeds, and where.
func (l Limits) exceeded(name string, text []byte) (at hcl.Range, why string) {
	at = hcl.Range{Filename: name}
	if l.Size > 0 && len(text) > l.Size {
		return at, fmt.Sprintf("%d bytes; at most %d are read", len(text), l.Size)
	}
	if !utf8.Valid(text) {
		return at, "not UTF-8"
	}
	number := 0
	for line := range bytes.Lines(text) {
		if number++; l.Line > 0 && len(line) > l.Line {
			at.Start.Line = number
			return at, fmt.Sprintf("a line of %d bytes; at most %d are read", len(line), l.Line)
		}
	}
	if n := bytes.Count(text, []byte("$")) + bytes.Count(text, []byte("%")); l.Signs > 0 && n > l.Signs {
		return at, fmt.Sprintf("%d signs $ and %%; at most %d are read", n, l.Signs)
	}
	if at, deep := tooDeep(text, name, l.Nesting); deep {
		return at, fmt.Sprintf("nested deeper than %d levels", l.Nesting)
	}
	return at, ""
}

// diagnostics notes the errors that HCL reported.
func (r *Reader) diagnostics(name string, diags hcl.Diagnostics) {
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		at := hcl.Range{Filename: name}
		if d.Subject != nil {
			at = *d.Subject
		}
		message := d.Summary
		if d.Detail != "" {
			message += ": " + d.Detail
		}
		r.Problem(at, strings.Join(strings.Fields(message), " "), "")
	}
}

// Config reads the text of a config file into a struct with gohcl's tags. It returns
// the file's body, by which the caller places what it finds wrong itself; an error is
// a Problems.
func Config(name string, text []byte, into any) (*hclsyntax.Body, error) {
	var r Reader
	body := r.Parse(name, text, config)
	if body != nil {
		r.diagnostics(name, gohcl.DecodeBody(body, nil, into))
	}
	return body, r.Problems.Or()
}

// ReadConfig reads a config file for Config.
func ReadConfig(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > int64(config.Size) {
		return nil, fmt.Errorf("%s has %d bytes; at most %d are read", name, info.Size(), config.Size)
	}
	return bounded.ReadFile(name, int64(config.Size))
}
