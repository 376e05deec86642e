// Package policy decides who may have which credential: it reads scopes, holds
// them against facts, and says allowed, refused or fault, with every selector
// and what it saw.
//
// It trusts operators for the scopes, and still bounds what a file of them may
// cost. Deny is the default. It promises that a subject is refused only where
// every selector was evaluated and one said no; that equal facts, time and set
// give equal results, but for conditions that hang on the order of a map's
// keys; and that a Decision comes from verified evidence alone.
package policy

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/bounded"
)

// Limits of one set. HCL's lexer is quadratic on some input, as unclosed
// heredocs, long lines and many $: within these, and maxSigns, a file takes
// it a second or two at worst.
const (
	MaxFiles    = 256
	MaxFileSize = 128 << 10
	MaxLine     = 8 << 10
	MaxSize     = 4 << 20 // of all files
	MaxScopes   = 2000
)

// A File is one source of a set.
type File struct {
	Name    string // without folder
	Content []byte
}

// LoadDir reads the *.hcl files of a folder, by name; folders in it and files
// whose name starts with a dot are left out.
func LoadDir(dir string) ([]File, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var files []File
	for _, e := range entries {
		name := e.Name()
		if !strings.HasSuffix(name, ".hcl") || strings.HasPrefix(name, ".") || e.IsDir() {
			continue
		}
		if len(files) == MaxFiles {
			return nil, fmt.Errorf("%s holds more than %d scope files", dir, MaxFiles)
		}
		content, err := readRegular(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		files = append(files, File{Name: name, Content: content})
	}
	if files == nil {
		return nil, fmt.Errorf("%s holds no scope files (*.hcl)", dir)
	}
	return files, nil
}

// readRegular follows no link: a scope that is silently another file's, or
// missing, is worse than an error.
func readRegular(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxFileSize {
		return nil, fmt.Errorf("%s is larger than the %d bytes that a scope file may have", path, MaxFileSize)
	}
	return b, nil
}

// A Set is all scopes that are in force together. Parse makes it, and it
// doesn't change afterwards; its applier gives the version.
type Set struct {
	Version int64

	files  []File
	scopes map[string]*Scope
}

// Files are what the set was parsed from.
func (s *Set) Files() []File { return slices.Clone(s.files) }

// Scopes are the set's, by name.
func (s *Set) Scopes() []*Scope {
	out := make([]*Scope, 0, len(s.scopes))
	for _, name := range slices.Sorted(maps.Keys(s.scopes)) {
		out = append(out, s.scopes[name])
	}
	return out
}

// Scope finds a scope by its name; nil where there is none.
func (s *Set) Scope(name string) *Scope { return s.scopes[name] }

// Decide is Evaluate on verified evidence.
func (s *Set) Decide(v appraise.Verified, scope string, now time.Time) Decision {
	f := v.Facts()
	if f == nil {
		return Decision{result: Result{Scope: bounded.Text(scope, maxName), Outcome: Fault, Policy: s.Version, Reason: "no evidence was verified"}}
	}
	return Decision{result: s.Evaluate(scope, *f, now), scope: s.Scope(scope), facts: *f}
}

// What became of a scope between two sets.
const (
	Added   = "added"
	Changed = "changed"
	Removed = "removed"
	Same    = "same"
)

// A Change is what became of one scope.
type Change struct {
	Scope  string `json:"scope"`
	Change string `json:"change"`
}

// Diff compares two sets, by scope name; a nil one is empty.
func Diff(before, after *Set) []Change {
	var old, new map[string]*Scope
	if before != nil {
		old = before.scopes
	}
	if after != nil {
		new = after.scopes
	}
	names := maps.Clone(old)
	if names == nil {
		names = map[string]*Scope{}
	}
	maps.Copy(names, new)
	var out []Change
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c := Change{Scope: name, Change: Same}
		switch a, b := old[name], new[name]; {
		case a == nil:
			c.Change = Added
		case b == nil:
			c.Change = Removed
		case !a.equal(b):
			c.Change = Changed
		}
		out = append(out, c)
	}
	return out
}

// equal compares what was written, not what was compiled from it.
func (s *Scope) equal(other *Scope) bool {
	a, b := *s, *other
	a.compiled, b.compiled = compiled{}, compiled{}
	return reflect.DeepEqual(a, b)
}
