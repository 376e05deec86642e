// Package architecture holds the tree to its design: who may import whom, and
// what the agent links.
package architecture_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/countersign/countersign/"

var update = flag.Bool("update", false, "write the lists anew: a change of them is a decision")

func list(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func golden(t *testing.T, file string, lines []string) {
	t.Helper()
	got := strings.Join(lines, "\n") + "\n"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	old := strings.Split(string(want), "\n")
	for _, l := range lines {
		if !slices.Contains(old, l) {
			t.Errorf("new: %s", l)
		}
	}
	for _, l := range old {
		if l != "" && !slices.Contains(lines, l) {
			t.Errorf("gone: %s", l)
		}
	}
	t.Errorf("%s differs; if that is meant, go test ./test/architecture -update", file)
}

// edges are the imports between packages of this module.
func edges(t *testing.T) [][2]string {
	var all [][2]string
	for _, line := range list(t, "-f", `{{$p := .ImportPath}}{{range .Imports}}{{$p}} {{.}}{{"\n"}}{{end}}`, "./attestors/...", "./broker/...", "./compensating/...", "./hostagent/...", "./internal/...", "./test/...") {
		from, to, ok := strings.Cut(line, " ")
		if ok && strings.HasPrefix(to, module) {
			all = append(all, [2]string{strings.TrimPrefix(from, module), strings.TrimPrefix(to, module)})
		}
	}
	return all
}

func TestImportGraph(t *testing.T) {
	var lines []string
	for _, e := range edges(t) {
		lines = append(lines, e[0]+" -> "+e[1])
	}
	slices.Sort(lines)
	golden(t, "imports.txt", slices.Compact(lines))
}

// room is the top level of a package.
func room(p string) string {
	first, _, _ := strings.Cut(p, "/")
	return first
}

func TestRooms(t *testing.T) {
	for _, e := range edges(t) {
		from, to := e[0], e[1]
		contract := to == "broker/api" || strings.HasPrefix(to, "broker/api/")
		bad := ""
		switch {
		case room(from) == "test":
			continue // tests stand outside
		case room(to) == "test":
			bad = "the product imports its tests"
		case room(to) == "hostagent" && room(from) != "hostagent":
			bad = "nothing imports hostagent"
		case room(from) == "hostagent" && room(to) == "broker" && !contract:
			bad = "the agent imports of the broker only its contract"
		case room(from) == "hostagent" && strings.HasSuffix(to, "/appraise"):
			bad = "the agent must not link an appraiser"
		case room(from) == "internal" && room(to) != "internal":
			bad = "shared code imports nothing of the rooms that share it"
		case room(from) == "attestors" && room(to) != "attestors" && room(to) != "internal":
			bad = "attestors stand alone, beside shared code"
		case room(from) == "compensating" && room(to) != "compensating" && room(to) != "internal" && !contract:
			bad = "compensating imports of the broker only its contract"
		case room(to) == "compensating" && room(from) != "compensating" && !strings.HasPrefix(from, "broker/cmd/"):
			bad = "only broker/cmd imports compensating"
		}
		if bad != "" {
			t.Errorf("%s imports %s: %s", from, to, bad)
		}
	}
}

// stages are the folders of broker/internal. Each imports only those behind it; ops
// maintains them all, and none imports it.
var stages = []string{"front", "lease", "issue", "policy", "verify", "state", "config"}

func TestStages(t *testing.T) {
	const inside = "broker/internal/"
	for _, e := range edges(t) {
		from, isFrom := strings.CutPrefix(e[0], inside)
		to, isTo := strings.CutPrefix(e[1], inside)
		if !isTo {
			continue
		}
		a, b := slices.Index(stages, room(from)), slices.Index(stages, room(to))
		switch {
		case b < 0 && room(to) != "ops":
			t.Errorf("%s is in no stage", e[1])
		case !isFrom || room(from) == "ops":
		case b < 0 || a > b:
			t.Errorf("%s imports %s, which stands above it", e[0], e[1])
		}
	}
}

func TestAgentDependencies(t *testing.T) {
	modules := map[string]bool{}
	for _, line := range list(t, "-deps", "-f", `{{with .Module}}{{.Path}}{{end}}`, "./hostagent/cmd/countersign-agent") {
		if line != "" && line+"/" != module {
			modules[line] = true
		}
	}
	var lines []string
	for m := range modules {
		lines = append(lines, m)
	}
	slices.Sort(lines)
	golden(t, "agent-modules.txt", lines)
}

func TestUntaggedBuildHasNoFaults(t *testing.T) {
	for _, tt := range []struct {
		dir  string
		want bool
	}{{"../../bin", false}, {"../../bin/faults", true}} {
		for _, program := range []string{"countersign", "countersign-agent"} {
			b, err := os.ReadFile(fmt.Sprintf("%s/%s", tt.dir, program))
			if err != nil {
				t.Fatalf("%v: `make test` builds it", err)
			}
			for _, word := range []string{"COUNTERSIGN_KILL_AT", "COUNTERSIGN_CLOCK_FILE"} {
				if has := strings.Contains(string(b), word); has != tt.want {
					t.Errorf("%s/%s: holds %s: %v, want %v", tt.dir, program, word, has, tt.want)
				}
			}
		}
	}
}
