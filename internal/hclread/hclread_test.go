package hclread_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/countersign/countersign/internal/hclread"
)

func TestTextsBeyondTheirLimitsAreNotParsed(t *testing.T) {
	limits := hclread.Limits{Size: 100, Line: 40, Signs: 3, Nesting: 3}
	for name, c := range map[string]struct{ text, problem string }{
		"size":    {strings.Repeat("a = 1\n", 20), "x.hcl: 120 bytes; at most 100 are read"},
		"line":    {"a = 1\nb = " + strings.Repeat("1", 40), "x.hcl:2: a line of 44 bytes; at most 40 are read"},
		"signs":   {"a = \"$$%%\"", "x.hcl: 4 signs $ and %; at most 3 are read"},
		"nesting": {"a = [[[[1]]]]", "x.hcl:1: nested deeper than 3 levels"},
		"UTF-8":   {"a = \"\xff\"", "x.hcl: not UTF-8"},
		"syntax":  {"a = 1\nb =", "x.hcl:2: Missing expression"},
	} {
		var r hclread.Reader
		if body := r.Parse("x.hcl", []byte(c.text), limits); body != nil {
			t.Errorf("%s: parsed", name)
		}
		if got := r.Problems.Error(); len(r.Problems) != 1 || !strings.HasPrefix(got, c.problem) {
			t.Errorf("%s: %s", name, got)
		}
	}
	var r hclread.Reader
	if r.Parse("x.hcl", []byte("a = \"$$%\"\nb = [[1]]\n"), limits) == nil {
		t.Error(r.Problems)
	}
}

func TestAConfigHasAllItsProblems(t *testing.T) {
	var into struct {
		Name string `hcl:"name"`
		Size int    `hcl:"size,optional"`
	}
	_, err := hclread.Config("a.hcl", []byte("size = \"x\"\nother = 1\n"), &into)
	var problems hclread.Problems
	if !errors.As(err, &problems) || len(problems) != 3 {
		t.Fatalf("%v", err)
	}
	for _, want := range []string{`"name" is required`, "a number is required", `"other" is not expected`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not in %v", want, err)
		}
	}
	slow := "# " + strings.Repeat("$", 60<<10) + "\nname = \"" + strings.Repeat("$", 60<<10) + "\"\n"
	if _, err := hclread.Config("a.hcl", []byte(slow), &into); err == nil || !strings.Contains(err.Error(), "signs $ and %") {
		t.Errorf("a config of many $ is parsed: %.100v", err)
	}
	if _, err := hclread.Config("a.hcl", []byte("name = \"x\"\n"), &into); err != nil || into.Name != "x" {
		t.Errorf("%q %v", into.Name, err)
	}
}
