package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// seed is of a day, as drawn ones are.
const seed = 20_000*perDay + 42

// files writes a corpus and returns its files by name.
func files(t *testing.T, seed uint64, stories int) map[string]string {
	t.Helper()
	dir := t.TempDir()
	if _, err := newWorld(seed, stories).write(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

func TestSameSeedSameBytes(t *testing.T) {
	a, b, other := files(t, seed, 300), files(t, seed, 300), files(t, seed+1, 300)
	if len(a) != len(b) {
		t.Fatalf("%d files, then %d", len(a), len(b))
	}
	for name := range a {
		if a[name] != b[name] {
			t.Errorf("%s differs", name)
		}
	}
	if a[ledgerFile] == other[ledgerFile] {
		t.Error("another seed has the same ledger")
	}
}

// A name that two stories own, or a target that nothing has, would give one story's
// finding to another.
func TestLabelsNameWhatIsThere(t *testing.T) {
	w := newWorld(seed, 1000)
	leases, owners, wanted := map[string]*lease{}, map[string]int{}, map[string]int{}
	for _, l := range w.ledger {
		if leases[l.ID] != nil {
			t.Fatalf("lease %s twice", l.ID)
		}
		leases[l.ID] = l
	}
	for i, l := range w.labels {
		for _, name := range l.Owns {
			if j, ok := owners[name]; ok && j != i {
				t.Errorf("%s belongs to %q and to %q", name, w.labels[j].Story, l.Story)
			}
			owners[name] = i
		}
		for _, target := range l.Targets {
			if !slices.Contains(l.Owns, target) {
				t.Errorf("%s: wants %s, which is not its own", l.Story, target)
			}
		}
		for _, d := range l.Wants {
			wanted[d]++
		}
		if honest := strings.HasPrefix(l.Story, "honest/"); honest != (len(l.Wants) == 0) || len(l.Wants) > 0 && len(l.Targets) == 0 {
			t.Errorf("%s: wants %q of %q", l.Story, l.Wants, l.Targets)
		}
	}
	for id, l := range leases {
		if _, ok := owners[id]; !ok {
			t.Errorf("no story owns lease %s of %s", id, l.Scope)
		}
		if !l.until().After(l.Issued) {
			t.Errorf("lease %s ends before it begins", id)
		}
	}
	if len(wanted) != len(guiltyStories) {
		t.Errorf("%d detectors are wanted, of %d: %v", len(wanted), len(guiltyStories), wanted)
	}
	if guilty := len(w.labels) - len(slices.DeleteFunc(slices.Clone(w.labels), func(l label) bool { return len(l.Wants) > 0 })); guilty*3 > len(w.labels) {
		t.Errorf("%d of %d stories are guilty", guilty, len(w.labels))
	}
}

// Vault's part of a user name holds eight letters of the role: two roles that share
// them would be one pattern.
func TestRolesDifferWhereUserNamesShowThem(t *testing.T) {
	w, seen := newWorld(seed, 1000), map[string]string{}
	for _, l := range w.ledger {
		short := l.app.role[:8]
		if scope, ok := seen[short]; ok && scope != l.app.role {
			t.Errorf("%s and %s", scope, l.app.role)
		}
		seen[short] = l.app.role
	}
}

// The logs show a login with every lease but those that nobody is to have used.
func TestLogsShowWhatLabelsSay(t *testing.T) {
	all := files(t, seed, 600)
	var logs strings.Builder
	for name, text := range all {
		if name != ledgerFile && name != labelsFile && name != "vault.json" {
			logs.WriteString(text)
		}
	}
	text := logs.String()
	var ledger []lease
	for line := range strings.Lines(all[ledgerFile]) {
		var l lease
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		ledger = append(ledger, l)
	}
	for line := range strings.Lines(all[labelsFile]) {
		var label label
		if err := json.Unmarshal([]byte(line), &label); err != nil {
			t.Fatal(err)
		}
		for _, l := range ledger {
			name := l.Names.DBUsername + l.Names.SSHKeyID
			if strings.HasPrefix(name, "api_") {
				if strings.Contains(text, name) {
					t.Errorf("%s: %s is in a log", label.Story, name)
				}
				continue
			}
			if name == "" || !slices.Contains(label.Owns, l.ID) || label.Story == "honest/untouched canary" || label.Story == "honest/just issued" || label.Story == "honest/before the log" {
				continue
			}
			login := strings.Contains(text, "user="+name+" database=") || strings.Contains(text, " ID "+name+" (serial ") ||
				strings.Contains(text, `"user":{"name":"`+name+`"`) || strings.Contains(text, `"TargetUserName":"`+name+`"`) || strings.Contains(text, `"TargetUserName":"`+strings.ToUpper(name)+`"`)
			if tried := slices.Contains(label.Wants, "dormant"); !login && !tried {
				t.Errorf("%s: no login of %s", label.Story, name)
			} else if tried && strings.Contains(text, "user="+name+" database=") {
				t.Errorf("%s: %s logs in", label.Story, name)
			}
		}
	}
}

// No kernel gives a pid twice at once.
func TestPidsAreOfOneSessionAtATime(t *testing.T) {
	w := newWorld(seed, 1000)
	for _, s := range w.postgres {
		s.render(w)
		until := map[int]time.Time{}
		for _, c := range s.sessions {
			if c.at.Before(until[c.pid]) {
				t.Fatalf("%s: pid %d at %s, in use until %s", s.file, c.pid, c.at, until[c.pid])
			}
			until[c.pid] = c.at.Add(c.long)
			if c.open {
				until[c.pid] = w.end
			} else if c.failure != "" {
				until[c.pid] = c.at
			}
		}
	}
}

func TestScore(t *testing.T) {
	labels := []label{
		{Story: "theft", Wants: []string{"foreign-source"}, Targets: []string{"l1"}, Owns: []string{"l1", "h1"}, Also: []string{"human-use"}},
		{Story: "honest/pool", Owns: []string{"l2"}},
		{Story: "drift", Wants: []string{"subject-drift"}, Targets: []string{"l4"}, Owns: []string{"l3", "l4"}},
		{Story: "silent", Wants: []string{"silent-sensor"}, Targets: []string{"db1.csv"}, Owns: []string{"db1.csv"}},
	}
	for _, tt := range []struct {
		name                  string
		found                 finding
		detector              string
		right, missed, madeUp int
	}{
		{"right", finding{Detector: "foreign-source", Lease: "l1"}, "foreign-source", 1, 0, 0},
		{"another detector that is right too", finding{Detector: "human-use", Lease: "l1"}, "human-use", 0, 0, 0},
		{"another that is not", finding{Detector: "dormant", Lease: "l1"}, "dormant", 0, 0, 1},
		{"an honest lease", finding{Detector: "foreign-source", Lease: "l2"}, "foreign-source", 0, 1, 1},
		{"the wrong lease of the story", finding{Detector: "subject-drift", Lease: "l3"}, "subject-drift", 0, 1, 1},
		{"no story's lease", finding{Detector: "canary", Lease: "l9"}, "canary", 0, 0, 1},
		{"a sensor in a folder", finding{Detector: "silent-sensor", Account: "/tmp/x/db1.csv"}, "silent-sensor", 1, 0, 0},
	} {
		got := score(labels, []finding{tt.found})[tt.detector]
		if got.found != tt.right || len(got.missed) != tt.missed || len(got.false) != tt.madeUp {
			t.Errorf("%s: found %d, missed %q, false %q", tt.name, got.found, got.missed, got.false)
		}
	}
	twice := score(labels, []finding{{Detector: "foreign-source", Lease: "l1"}, {Detector: "foreign-source", Lease: "l1"}})["foreign-source"]
	if twice.found != 1 || len(twice.false) != 1 {
		t.Errorf("one cause found twice: found %d, false %q", twice.found, twice.false)
	}
	if report(new(strings.Builder), score(labels, nil)) {
		t.Error("nothing found passes")
	}
	if report(new(strings.Builder), map[string]*tally{"canary": {guilty: 1000, found: 1000, false: make([]string, 11)}}) {
		t.Error("a precision of 0.989 passes")
	}
}
