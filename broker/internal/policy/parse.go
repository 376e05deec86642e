package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"

	"github.com/countersign/countersign/internal/hclread"
)

const (
	maxName     = 64
	maxProblems = 200
	maxSigns    = 1024 // $ and % in a file
	maxNesting  = 16   // scopes need 4; HCL's parser recurses
)

// Options are what scopes are held against beside themselves.
type Options struct {
	// Kinds lists the kinds of credentials that scopes may have.
	Kinds []Kind
	// Reserved are the broker's own names and addresses, which no certificate
	// of a scope may have.
	Reserved []string
}

// A Kind is a kind of credentials. Its issuer defines it.
type Kind struct {
	Name      string   // of the block in a scope, and of the leases
	Arguments []string // of that block, beside ttl and overlap, which all have

	// Decode reads the block and notes its problems.
	Decode func(b hclread.Block, o Options) Source
}

// A Source is the issuer's settings in a scope, as Decode returned them. Sources are
// compared with reflect.DeepEqual.
type Source any

func (o Options) kinds() (names []string) {
	for _, k := range o.Kinds {
		names = append(names, k.Name)
	}
	return names
}

// Parse reads a whole set. The error is a hclread.Problems with every mistake of
// every file.
func Parse(files []File, o Options) (*Set, error) {
	r := reader{options: o, first: map[string]hcl.Range{}}
	set := &Set{scopes: map[string]*Scope{}}
	if len(files) > MaxFiles {
		r.Problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d files; at most %d are read", len(files), MaxFiles), "")
		files = nil
	}
	size := 0
	for _, f := range files {
		size += len(f.Content)
	}
	if size > MaxSize {
		r.Problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d bytes in all files; at most %d are read", size, MaxSize), "")
		files = nil
	}
	files = slices.SortedStableFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	names := map[string]bool{}
	for _, f := range files {
		where := hcl.Range{Filename: f.Name}
		switch {
		case f.Name == "" || len(f.Name) > 255 || strings.ContainsFunc(f.Name, unprintable):
			where.Filename = fmt.Sprintf("%.64q", f.Name)
			r.Problem(where, "a file's name has 1 to 255 printable characters", "")
			continue
		case names[f.Name]:
			r.Problem(where, "two files have this name", "")
			continue
		}
		names[f.Name] = true
		for _, s := range r.file(f) {
			set.scopes[s.Name] = s
		}
		set.files = append(set.files, File{Name: f.Name, Content: slices.Clone(f.Content)})
	}
	if len(r.first) > MaxScopes {
		r.Problem(hcl.Range{Filename: "(set)"}, fmt.Sprintf("%d scopes; at most %d are read", len(r.first), MaxScopes), "")
	}
	if len(r.Problems) > 0 {
		return nil, r.errors()
	}
	return set, nil
}

// A reader reads the scopes of a set.
type reader struct {
	hclread.Reader

	options Options
	first   map[string]hcl.Range // where a scope's name was used first
}

func (r *reader) errors() hclread.Problems {
	p := r.Problems
	p.Sort()
	if n := len(p); n > maxProblems {
		p = append(p[:maxProblems], hclread.Problem{File: "(set)", Message: fmt.Sprintf("%d more mistakes are not shown", n-maxProblems)})
	}
	return p
}

func (r *reader) file(f File) []*Scope {
	body := r.Parse(f.Name, f.Content, hclread.Limits{Size: MaxFileSize, Line: MaxLine, Signs: maxSigns, Nesting: maxNesting})
	if body == nil {
		return nil
	}
	var out []*Scope
	for _, block := range r.Block(body, "a scope file", nil, []string{"scope"}).Blocks("scope") {
		if s := r.scope(block); s != nil {
			out = append(out, s)
		}
	}
	return out
}
