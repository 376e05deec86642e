package e2e_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
)

// A listed is an answer of a verb that lists, of which only names are read.
type listed struct {
	Hosts []struct {
		Name string `json:"name"`
	} `json:"hosts"`
	References []struct {
		Name    string `json:"name"`
		Version int    `json:"version"`
	} `json:"references"`
	Leases []lease `json:"leases"`
	Next   string  `json:"next"`
}

// Lists come in pages: whole, each row once, and as many as were asked for.
func TestLists(t *testing.T) {
	b := newBroker(t, shortScope, false)
	ctx := check.Within(t, 3*time.Minute)
	const n = 1203 // more than two pages of the broker's
	var csv strings.Builder
	csv.WriteString("name,ek_hash,labels,reference\n")
	for i := range n {
		fmt.Fprintf(&csv, "web-%04d,%x,role=%d,\n", i, sha256.Sum256(fmt.Append(nil, i)), i%400)
	}
	file := filepath.Join(b.dir, "hosts.csv")
	check.Nil(t, os.WriteFile(file, []byte(csv.String()), 0o600))
	check.Must(b.broker.CLI(ctx, "host", "import", "-f", file))(t)

	lines := func(args ...string) []string {
		out := string(check.Must(b.broker.CLI(ctx, args...))(t))
		return strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	}
	list := func(args ...string) (l listed) {
		check.Nil(t, b.broker.JSON(ctx, &l, args...))
		return l
	}
	if got := lines("host", "list"); len(got) != n+1 {
		t.Errorf("host list has %d lines, want a header and %d hosts", len(got), n)
	}
	names := map[string]bool{}
	for _, h := range list("host", "list").Hosts {
		names[h.Name] = true
	}
	if len(names) != n {
		t.Errorf("host list -o json has %d hosts, want %d", len(names), n)
	}
	// Page by page, as a script does it.
	var paged []string
	for after, pages := "", 0; ; pages++ {
		l := list("host", "list", "--limit", "250", "--after", after)
		for _, h := range l.Hosts {
			paged = append(paged, h.Name)
		}
		if after = l.Next; after == "" {
			if pages != n/250 {
				t.Errorf("%d pages", pages+1)
			}
			break
		}
		if len(l.Hosts) != 250 {
			t.Errorf("a page of %d hosts", len(l.Hosts))
		}
	}
	if want := slices.Sorted(maps.Keys(names)); !slices.Equal(paged, want) {
		t.Errorf("%d hosts in pages, want %d, each once, by name", len(paged), len(want))
	}
	// A selector that leaves little, of the far end too.
	var few []string
	for _, h := range list("host", "list", "-l", "role=399", "--sort", "proved", "--state", "registered").Hosts {
		few = append(few, h.Name)
	}
	slices.Sort(few)
	if !slices.Equal(few, []string{"web-0399", "web-0799", "web-1199"}) {
		t.Errorf("selected: %v", few)
	}
	for _, args := range [][]string{{"host", "list", "--sort", "size"}, {"host", "list", "--after", "x"}, {"lease", "list", "--after", "x"}, {"lease", "list", "--sort", "size"}, {"finding", "list", "--after", "x"}} {
		if out, err := b.broker.CLI(ctx, args...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}

	// Leases, by the time of issue.
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	var issued []string
	for pid := range 5 {
		r := check.Must(h.Issue(ctx, s, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7+pid))(t))))(t)
		issued = append(issued, r.GetLeaseId())
	}
	ids := func(l listed) (out []string) {
		for _, one := range l.Leases {
			out = append(out, one.ID)
		}
		return out
	}
	newest := slices.Clone(issued)
	slices.Reverse(newest)
	if got := ids(list("lease", "list")); !slices.Equal(got, newest) {
		t.Errorf("lease list: %v, want %v", got, newest)
	}
	if got := ids(list("lease", "list", "--sort", "oldest", "--scope", "soft")); !slices.Equal(got, issued) {
		t.Errorf("the oldest first: %v, want %v", got, issued)
	}
	for _, args := range [][]string{{}, {"--host", h.ID}, {"--scope", "soft"}, {"--state", "live"}, {"--all"}} {
		var got []string
		for after := ""; ; {
			l := list(append([]string{"lease", "list", "--limit", "2", "--after", after}, args...)...)
			if got = append(got, ids(l)...); l.Next == "" {
				break
			}
			after = l.Next
		}
		if !slices.Equal(got, newest) {
			t.Errorf("lease list %v in pages: %v, want %v", args, got, newest)
		}
	}

	// Versions of reference sets, whose contents fill a page after few.
	set := filepath.Join(b.dir, "set.json")
	allow := make([]map[string]any, 9000)
	for i := range allow {
		allow[i] = map[string]any{"path": fmt.Sprintf("/opt/app/%d", i), "digests": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(fmt.Append(nil, i)))}}
	}
	check.Nil(t, os.WriteFile(set, check.Must(json.Marshal(map[string]any{"ima": map[string]any{"allow": allow}}))(t), 0o600))
	for range 3 {
		check.Must(b.broker.CLI(ctx, "reference", "add", "web", "-f", set))(t)
		check.Must(b.broker.CLI(ctx, "reference", "add", "db", "-f", set))(t)
	}
	var versions []string
	for _, r := range list("reference", "show").References {
		versions = append(versions, fmt.Sprintf("%s@%d", r.Name, r.Version))
	}
	if want := []string{"db@3", "db@2", "db@1", "web@3", "web@2", "web@1"}; !slices.Equal(versions, want) {
		t.Errorf("reference show: %v, want %v", versions, want)
	}
	if got := list("reference", "show", "web@2").References; len(got) != 1 || got[0].Version != 2 {
		t.Errorf("reference show web@2: %v", got)
	}
	if got := lines("reference", "show", "web", "--limit", "2"); len(got) != 3 {
		t.Errorf("reference show web --limit 2: %q", got)
	}
}
