package store_test

import (
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// grows are the tables that have a row for each host, lease, record or use: a query that
// reads one of them whole takes seconds after a year.
var grows = regexp.MustCompile(`^SCAN (hosts|h|host_eks|grants|g|decisions|d|findings|audit_records|audit_hashes|denials)\b`)

// scans are the queries that read such a table whole, and why that is right.
var scans = map[string]string{
	"WITH there (topic, name, n) AS": "fsck counts what there is, outside of the broker",
}

// ordered are queries that go through an index in its order only as far as they need
// to: a list's first page.
var ordered = regexp.MustCompile(`LIMIT|MAX\(|MIN\(`)

// built are the functions that make a query of parts, whose own tests hold the plans of
// each form of it, and those that take one from their callers.
var built = map[string]bool{"journal.List": true, "journal.Cursors": true, "findings.List": true, "findings.one": true, "inventory.one": true,
	"audit.Append": true, "audit.reader": true, "storetest.named": true}

// TestNoQueryReadsATableWhole asks SQLite how it would answer each query of the broker.
func TestNoQueryReadsATableWhole(t *testing.T) {
	t.Parallel()
	s, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	seen := 0
	for _, q := range queries(t, "../../..") {
		if !q.constant {
			if !built[q.where] {
				t.Errorf("%s: its query isn't constant: write it as one, or test each form's plan there and name it here", q.position)
			}
			continue
		}
		seen++
		for _, step := range plan(t, s, q.text) {
			if !grows.MatchString(step) || strings.Contains(step, "INDEX") && ordered.MatchString(q.text) {
				continue
			}
			if !slices.ContainsFunc(slices.Collect(keys(scans)), func(begin string) bool { return strings.HasPrefix(q.text, begin) }) {
				t.Errorf("%s: %s\n  in %s", q.position, step, q.text)
			}
		}
	}
	if seen < 60 {
		t.Errorf("%d queries were found: the test looks in the wrong places", seen)
	}
}

// sqliteOnly are words that other databases have otherwise, or not at all.
var sqliteOnly = regexp.MustCompile(`(?i)json_each|json_extract|json_type|json_valid|group_concat|\bPRAGMA\b|\browid\b|\bGLOB\b|INSERT OR |REPLACE INTO|AUTOINCREMENT`)

// onlySQLite are the functions whose statements only SQLite answers: what another dialect
// has to bring its own of. journal.List and Cursors are one more, by unary pluses.
var onlySQLite = map[string]string{
	"journal.Forgettable": "looks into a body that may be no JSON",
	"inventory.Names":     "takes a list of ids as JSON",
	"inventory.Get":       "reads a host's EKs as one text",
	"inventory.ByEK":      "the same",
	"inventory.ByAK":      "the same",
	"inventory.Owners":    "the same",
	"inventory.Find":      "the same",
	"inventory.ByName":    "the same",
	"inventory.ByProof":   "the same",
}

// TestPortableStatements holds the list of what isn't.
func TestPortableStatements(t *testing.T) {
	t.Parallel()
	left := maps.Clone(onlySQLite)
	for _, q := range queries(t, "../../..") {
		if !sqliteOnly.MatchString(q.text) {
			continue
		}
		if _, ok := onlySQLite[q.where]; !ok {
			t.Errorf("%s: only SQLite answers %s", q.position, q.text)
		}
		delete(left, q.where)
	}
	if len(left) > 0 {
		t.Errorf("%v are portable by now", left)
	}
}

func keys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func plan(t *testing.T, s *store.Store, query string) (steps []string) {
	t.Helper()
	args := make([]any, strings.Count(query, "?"))
	if err := s.View(t.Context(), func(tx *store.Tx) error {
		return tx.Each(func(row store.Row) error {
			var id, parent, unused int
			var step string
			err := row.Scan(&id, &parent, &unused, &step)
			steps = append(steps, step)
			return err
		}, "EXPLAIN QUERY PLAN "+query, args...)
	}); err != nil {
		t.Errorf("%v\n  in %s", err, query)
	}
	return steps
}

type query struct {
	text     string
	constant bool
	where    string // package.Function
	position string
}

// queries are those of all packages below dir: the arguments of a Tx's methods, and of
// store.Collect.
func queries(t *testing.T, dir string) (found []query) {
	t.Helper()
	folders := map[string]bool{}
	if err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			folders[filepath.Dir(path)] = true
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for folder := range folders {
		if filepath.Base(folder) == "store" || filepath.Base(folder) == "fill" {
			continue
		}
		found = append(found, folderQueries(t, folder)...)
	}
	return found
}

func folderQueries(t *testing.T, folder string) (found []query) {
	t.Helper()
	set := token.NewFileSet()
	var files []*ast.File
	names, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	// Constants fold without the imported packages; their errors don't matter.
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}}
	config := types.Config{Error: func(error) {}, Importer: nil}
	_, _ = config.Check(folder, set, files, info)
	for _, f := range files {
		for _, decl := range f.Decls {
			function, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(function, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				at := argument(call)
				if at < 0 || at >= len(call.Args) {
					return true
				}
				q := query{where: f.Name.Name + "." + function.Name.Name, position: set.Position(call.Pos()).String()}
				if v := info.Types[call.Args[at]].Value; v != nil && v.Kind() == constant.String {
					q.text, q.constant = constant.StringVal(v), true
				}
				found = append(found, q)
				return true
			})
		}
	}
	return found
}

// argument is which argument of a call is a query; -1: none.
func argument(call *ast.CallExpr) int {
	if function, ok := call.Fun.(*ast.Ident); ok && function.Name == "one" {
		return 1
	}
	selector, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return -1
	}
	receiver, ok := selector.X.(*ast.Ident)
	if !ok {
		return -1
	}
	switch receiver.Name + "." + selector.Sel.Name {
	case "tx.Exec", "tx.QueryRow":
		return 0
	case "tx.Each":
		return 1
	case "store.Collect":
		return 2
	}
	return -1
}
