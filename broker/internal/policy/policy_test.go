package policy

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/hclread"
)

var update = flag.Bool("update", false, "write golden files anew")

var options = Options{Reserved: []string{"Broker.example.com", "192.0.2.1"}}

// TestOptions are options; kinds_test.go adds the kinds of credentials to them.
var TestOptions = &options

// noon on a Friday, UTC.
var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func load(t *testing.T, dir string) []File {
	t.Helper()
	files, err := LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func parse(t *testing.T, text string) *Set {
	t.Helper()
	set, err := Parse([]File{{Name: "test.hcl", Content: []byte(text)}}, options)
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, text)
	}
	return set
}

func problems(err error) hclread.Problems {
	var p hclread.Problems
	errors.As(err, &p)
	return p
}

func TestParse(t *testing.T) {
	set, err := Parse(load(t, "testdata/good"), options)
	if err != nil {
		t.Fatal(err)
	}
	set.Version = 7
	var names []string
	for _, s := range set.Scopes() {
		names = append(names, s.Name)
	}
	if want := []string{"billing-db", "billing-tls", "web-pki"}; !slices.Equal(names, want) {
		t.Fatalf("scopes %q, want %q", names, want)
	}
	db := *set.Scope("billing-db")
	db.compiled, db.Source = compiled{}, nil
	want := Scope{
		Name: "billing-db", Description: "Billing reads its own schema", Owner: "payments@example.com",
		Audience: []string{"postgres://db1.example.com:5432/billing"}, Reprove: 15 * time.Minute, Grace: time.Hour,
		Host: HostSelector{Labels: map[string]string{"env": "prod", "role": "billing"}, Tier: []string{"certified", "known"}, Reference: "debian12-prod"},
		Process: ProcessSelector{User: "billing", Unit: "billing.service", Exe: "/opt/billing/bin/billingd",
			SHA256: []string{"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}, BeforeStart: true},
		When: "!(has(subject.risk) && subject.risk >= 50)",
		Kind: "vault", TTL: 8 * time.Hour, Overlap: 10 * time.Minute,
	}
	if !reflect.DeepEqual(db, want) {
		t.Errorf("billing-db is\n%+v, want\n%+v", db, want)
	}
	pki := set.Scope("web-pki")
	if !pki.Observe || pki.Kind != "vault" {
		t.Errorf("web-pki is %+v", pki)
	}
	if tls := set.Scope("billing-tls"); tls.Reprove != DefaultReprove || tls.Grace != DefaultGrace || tls.Kind != "certificate" || tls.Overlap != 0 || tls.TTL != 24*time.Hour {
		t.Errorf("billing-tls has other defaults: %+v", tls)
	}
	again, err := Parse(set.Files(), options)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Diff(set, again) {
		if c.Change != Same {
			t.Errorf("a set parsed from its own files: %+v", c)
		}
	}
}

func TestProblems(t *testing.T) {
	_, err := Parse(load(t, "testdata/bad"), options)
	if len(problems(err)) == 0 {
		t.Fatalf("error %v is no Problems", err)
	}
	got := err.Error() + "\n"
	const golden = "testdata/bad.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("mistakes are\n%s\nwant\n%s", got, want)
	}
	files := load(t, "testdata/bad")
	slices.Reverse(files)
	if _, err := Parse(files, options); err == nil || err.Error()+"\n" != got {
		t.Errorf("files in another order have other mistakes: %v", err)
	}
}

// Each starts from an accepted scope and changes one thing.
func TestParseRefuses(t *testing.T) {
	const good = `scope "a" {
  reprove = "10s"
  process { user = "u" }
  vault {
    path = "kv/data/a"
    ttl = "1m"
  }
}
`
	parse(t, good)
	many := func(n int, s string) string { return strings.Repeat(s, n) }
	for name, c := range map[string]struct{ old, new, want string }{
		"name too long":      {`"a"`, `"` + many(65, "a") + `"`, "1 to 64 lowercase"},
		"name with slash":    {`"a"`, `"a/b"`, "1 to 64 lowercase"},
		"reprove over ttl":   {`"10s"`, `"2m"`, "outside of 5s to 1m0s"},
		"ttl under a minute": {`"1m"`, `"59s"`, "outside of 1m0s"},
		"negative ttl":       {`"1m"`, `"-1m"`, "outside of"},
		"leading slash":      {`kv/data/a`, `/kv/data/a`, "not a path inside Vault"},
		"dots":               {`kv/data/a`, `kv/../sys/a`, "not a path inside Vault"},
		"empty part":         {`kv/data/a`, `kv//a`, "not a path inside Vault"},
		"Vault's own":        {`kv/data/a`, `Auth/token/create`, "Vault's own"},
		"policy wildcard":    {`kv/data/a`, `kv/+/a`, "not a path inside Vault"},
		"broker's role":      {`kv/data/a`, `database/creds/countersign-x`, "the broker's own"},
		"unknown block":      {`process {`, `proces {`, `did you mean "process"?`},
		"variable":           {`"u"`, `username`, "wants a plain string"},
		"interpolation":      {`"u"`, `"${u}"`, "wants a plain string"},
		"null":               {`"u"`, `null`, "wants a plain string"},
		"deep nesting":       {`"u"`, many(5000, "["), "nested deeper"},
		"many operators":     {`"u"`, many(5000, "!") + "true", "nested deeper"},
		"template":           {`"u"`, many(500, `"${`), "nested deeper"},
		"not UTF-8":          {`"u"`, "\"\xff\"", "not UTF-8"},
		"too large":          {good, good + "#" + many(MaxFileSize/2, " \n"), "at most 131072"},
		"long line":          {`"u"`, `"` + many(MaxLine, "$") + `"`, "test.hcl:3: a line of"},
		"many signs":         {good, good + many(maxSigns+1, "#$\n"), "at most 1024 are read"},
		"label missing":      {`scope "a"`, `scope`, "a scope has one name"},
		"session scope":      {`user = "u"`, `unit = "session-4.scope"`, "whatever a user starts"},
		"unit template":      {`user = "u"`, `unit = "app@.service"`, "is a template"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(good, c.old, c.new, 1)
			if text == good {
				t.Fatal("nothing was changed")
			}
			_, err := Parse([]File{{Name: "test.hcl", Content: []byte(text)}}, options)
			if len(problems(err)) == 0 || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	if _, err := Parse([]File{{"a.hcl", nil}, {"a.hcl", nil}}, options); err == nil || !strings.Contains(err.Error(), "two files") {
		t.Errorf("a name twice: %v", err)
	}
	if _, err := Parse(make([]File, MaxFiles+1), options); err == nil || !strings.Contains(err.Error(), "at most 256") {
		t.Errorf("too many files: %v", err)
	}
	big := make([]File, MaxSize/MaxFileSize+1)
	for i := range big {
		big[i] = File{Name: strings.Repeat("a", i+1), Content: bytes.Repeat([]byte("#"+strings.Repeat("-", 1022)+"\n"), MaxFileSize/1024)}
	}
	if _, err := Parse(big[1:], options); err != nil {
		t.Errorf("the largest set: %v", err)
	}
	if _, err := Parse(big, options); err == nil || !strings.Contains(err.Error(), "bytes in all files") {
		t.Errorf("too large a set: %v", err)
	}
	var lots bytes.Buffer
	for i := range maxProblems + 10 {
		lots.WriteString("x" + strings.Repeat("y", i) + " = 1\n")
	}
	_, err := Parse([]File{{"a.hcl", lots.Bytes()}}, options)
	if list := problems(err); len(list) != maxProblems+1 || !strings.Contains(err.Error(), "10 more mistakes") {
		t.Errorf("%d problems are listed", len(list))
	}
}

func TestLoadDir(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadDir(dir); err == nil || !strings.Contains(err.Error(), "no scope files") {
		t.Errorf("an empty folder: %v", err)
	}
	for _, name := range []string{"b.hcl", "a.hcl", "notes.txt", ".#a.hcl"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("# "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "sub.hcl"), 0o700); err != nil {
		t.Fatal(err)
	}
	files := load(t, dir)
	if len(files) != 2 || files[0].Name != "a.hcl" || files[1].Name != "b.hcl" || string(files[1].Content) != "# b.hcl" {
		t.Errorf("files are %+v", files)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "c.hcl")); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadDir(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a link: %v", err)
	}
}

func TestDiff(t *testing.T) {
	scope := func(name, user string) string {
		return `scope "` + name + `" {
  process { user = "` + user + `" }
  when = "now > timestamp('2020-01-01T00:00:00Z')"
  certificate { ttl = "1h" }
}
`
	}
	old, new := parse(t, scope("a", "u")+scope("b", "u")+scope("c", "u")), parse(t, scope("d", "u")+scope("c", "v")+scope("b", "u"))
	want := []Change{{"a", Removed}, {"b", Same}, {"c", Changed}, {"d", Added}}
	if got := Diff(old, new); !slices.Equal(got, want) {
		t.Errorf("diff is %v, want %v", got, want)
	}
	if got := Diff(nil, old); len(got) != 3 || got[0].Change != Added {
		t.Errorf("diff with nothing is %v", got)
	}
}

// subject is a program on a host that testdata/good's billing-db is for.
func subject() appraise.Facts {
	return appraise.Facts{
		At: noon,
		Host: appraise.Host{ID: "h1", Name: "db-client", Labels: map[string]string{"env": "prod", "role": "billing", "extra": "x"},
			Tier: appraise.TierCertified, Reference: "debian12-prod", Address: "192.0.2.7", Boot: "boot",
			PCRs: map[int]evidence.Digest{0: evidence.Sum([]byte("zero"))}},
		Program: &process.Program{Boot: "boot", PID: 10, Start: 20, User: "billing", Executables: process.OneFile("/opt/billing/bin/billingd", evidence.Sum([]byte("test"))),
			Linux:    &process.Linux{UID: 990, GID: 990, Groups: []uint32{990, 4}, Unit: "billing.service", Invocation: strings.Repeat("a", 32)},
			Mappings: []process.Mapping{{Path: "/usr/lib/x86_64-linux-gnu/libc.so.6"}}, Parent: &process.Parent{PID: 1, Start: 1, Exe: "/usr/lib/systemd/systemd"}},
	}
}

func find(r Result, name string) Selector {
	for _, s := range r.Selectors {
		if s.Name == name {
			return s
		}
	}
	return Selector{}
}

func TestDecideWantsEvidence(t *testing.T) {
	set := parse(t, `scope "a" {
  process { user = "billing" }
  certificate { ttl = "1h" }
}`)
	if r := set.Evaluate("a", subject(), noon); r.Outcome != Allowed {
		t.Fatalf("the twin is %+v", r)
	}
	d := set.Decide(appraise.Verified{}, "a", noon)
	if d.Allows() || d.Result().Outcome != Fault || d.Scope() != nil {
		t.Errorf("a decision without evidence is %+v", d)
	}
	if (Decision{}).Allows() {
		t.Error("the zero Decision allows")
	}
}

func TestEvaluateIsDeterministic(t *testing.T) {
	set, err := Parse(load(t, "testdata/good"), options)
	if err != nil {
		t.Fatal(err)
	}
	set.Version = 3
	first := set.Evaluate("billing-db", subject(), noon)
	if first.Outcome != Allowed || first.Policy != 3 {
		t.Fatalf("%+v", first)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if r := set.Evaluate("billing-db", subject(), noon); !reflect.DeepEqual(r, first) {
					t.Errorf("%+v, then %+v", first, r)
				}
			}
		})
	}
	wg.Wait()
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/good/*.hcl", "testdata/bad/*.hcl"} {
		paths, _ := filepath.Glob(pattern)
		for _, p := range paths {
			b, err := os.ReadFile(p)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := Parse([]File{{Name: "fuzz.hcl", Content: b}}, options)
		if err != nil {
			list := problems(err)
			if len(list) == 0 || len(list) > maxProblems+1 {
				t.Fatalf("error %v is no list of problems", err)
			}
			return
		}
		for _, s := range set.Scopes() {
			if s.Kind == "" || s.TTL < minTTL || s.Reprove < minReprove || s.Reprove > s.TTL || s.Overlap >= s.TTL {
				t.Fatalf("an accepted scope is %+v", s)
			}
			set.Evaluate(s.Name, subject(), noon)
		}
	})
}
