// Command report reads `go test -json` and tells people what they want to know of a long
// run: a line as each package ends, the output of what failed, and the slowest tests. It
// fails if a test did, or was skipped: every part that a test needs is installed by
// test/setup.sh. What it reads it also writes to the file that it is given.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// An entry is one line of `go test -json`; see `go doc test2json`.
type entry struct {
	Action     string
	Package    string
	ImportPath string // of a build
	Test       string
	Elapsed    float64 // seconds
	Output     string
}

type result struct {
	name    string
	seconds float64
}

const (
	slowest = 10
	tail    = 150 // lines of what failed
)

func main() {
	log, err := os.Create(os.Args[1])
	if err == nil {
		err = report(io.TeeReader(os.Stdin, log), os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		os.Exit(1)
	}
}

func report(in io.Reader, out io.Writer) error {
	said := map[string][]string{} // output by package and test
	var tests []result
	var failed, skipped []string
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break
		}
		var e entry
		if json.Unmarshal(line, &e) != nil {
			_, _ = out.Write(line) // of the go command itself
			continue
		}
		key := strings.TrimSuffix(cmp.Or(e.Package, e.ImportPath)+" "+e.Test, " ")
		switch e.Action {
		case "output", "build-output":
			said[key] = append(said[key], e.Output)
		case "build-fail":
			failed = append(failed, key)
		case "pass", "fail", "skip":
			empty := e.Action == "skip" && e.Test == "" // a package without tests
			if e.Test == "" && !empty {
				fmt.Fprintf(out, "%-4s %7.1f s  %s\n", e.Action, e.Elapsed, e.Package)
			}
			if e.Test != "" && !strings.Contains(e.Test, "/") {
				tests = append(tests, result{key, e.Elapsed})
			}
			switch {
			case e.Action == "fail":
				failed = append(failed, key)
			case e.Action == "skip" && !empty:
				skipped = append(skipped, key)
			default:
				delete(said, key)
			}
		}
	}

	slices.SortStableFunc(tests, func(a, b result) int { return cmp.Compare(b.seconds, a.seconds) })
	fmt.Fprintln(out, "the slowest tests:")
	for _, t := range tests[:min(slowest, len(tests))] {
		fmt.Fprintf(out, "     %7.1f s  %s\n", t.seconds, t.name)
	}
	for _, key := range failed {
		text := said[key]
		fmt.Fprintf(out, "--- %s failed:\n%s", key, strings.Join(text[max(len(text)-tail, 0):], ""))
	}
	switch {
	case len(failed) > 0:
		return fmt.Errorf("%d failed", len(failed))
	case len(skipped) > 0:
		return fmt.Errorf("skipped tests count as failed: %s", strings.Join(skipped, ", "))
	case len(tests) == 0:
		return fmt.Errorf("no test ran")
	}
	return nil
}
