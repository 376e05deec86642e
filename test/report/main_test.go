package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const good = `{"Action":"output","Package":"p","Test":"TestA","Output":"noise\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":2.5}
{"Action":"pass","Package":"p","Test":"TestA/sub","Elapsed":9}
{"Action":"pass","Package":"p","Test":"TestB","Elapsed":3.5}
{"Action":"pass","Package":"p","Elapsed":6.5}
{"Action":"skip","Package":"empty","Elapsed":0}
`
	for name, c := range map[string]struct {
		more, err string
		says      []string
	}{
		"all is well": {"", "", []string{"pass     6.5 s  p\n", "the slowest tests:\n         3.5 s  p TestB\n         2.5 s  p TestA\n"}},
		"a failure": {`{"Action":"output","Package":"q","Test":"TestC","Output":"it broke\n"}
{"Action":"fail","Package":"q","Test":"TestC","Elapsed":1}
{"Action":"fail","Package":"q","Elapsed":1}
`, "2 failed", []string{"fail     1.0 s  q\n", "--- q TestC failed:\nit broke\n"}},
		"a skipped test": {`{"Action":"skip","Package":"q","Test":"TestC","Elapsed":0}
`, "skipped tests count as failed: q TestC", nil},
		"a build that fails": {`{"ImportPath":"q","Action":"build-output","Output":"x.go:1: no\n"}
{"ImportPath":"q","Action":"build-fail"}
{"Action":"fail","Package":"q","Elapsed":0}
`, "2 failed", []string{"x.go:1: no\n"}},
	} {
		var out strings.Builder
		err := report(strings.NewReader(good+c.more), &out)
		if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err {
			t.Errorf("%s: %v", name, err)
		}
		for _, text := range c.says {
			if !strings.Contains(out.String(), text) {
				t.Errorf("%s: no %q in\n%s", name, text, out.String())
			}
		}
		if strings.Contains(out.String(), "noise") {
			t.Errorf("%s: it says what a passing test said:\n%s", name, out.String())
		}
	}
	if err := report(strings.NewReader(""), &strings.Builder{}); err == nil {
		t.Error("a run without a test passed")
	}
}
