package watch

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
)

// TestDocs: the manual says of each detector what the code does, and names every kind
// of log; its example is a config; its alerts speak of metrics that there are.
func TestDocs(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile("../../docs/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	manual := read("WATCH.md")
	for _, e := range detect.Catalogue {
		row := fmt.Sprintf("| `%s` | %s | %s | %s | %s | %s |\n", e.Name, e.Severity, e.NHI, e.Sees, e.Fooled, e.Response)
		if !strings.Contains(manual, row) {
			t.Errorf("docs/WATCH.md lacks the row\n%s", row)
		}
	}
	for _, kind := range sightings.Kinds {
		if !strings.Contains(manual, "`"+kind+"`") {
			t.Errorf("docs/WATCH.md doesn't speak of %s", kind)
		}
	}
	if _, err := Load("../../docs/examples/watch.hcl"); err != nil {
		t.Error(err)
	}
	m := newMeter()
	m.findings.WithLabelValues("", "")
	for _, v := range []interface{ Set(float64) }{m.lines.WithLabelValues(""), m.unreadable.WithLabelValues(""), m.newest.WithLabelValues("")} {
		v.Set(0)
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, f := range families {
		there[f.GetName()] = true
	}
	for _, name := range regexp.MustCompile(`countersign_watch_\w+`).FindAllString(read("examples/watch-alerts.yml"), -1) {
		if !there[name] {
			t.Errorf("docs/examples/watch-alerts.yml speaks of %s", name)
		}
	}
}
