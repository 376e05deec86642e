package expiry

import (
	"crypto/x509"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/test/check"
)

const day = 24 * time.Hour

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func ending(in time.Duration) *x509.Certificate { return &x509.Certificate{NotAfter: now.Add(in)} }

// alarms are the things that an alarm is about.
func alarms(k Known, at time.Time) (things []string) {
	for _, a := range Alarms(List(k, at), at) {
		thing, _, _ := strings.Cut(a, " end")
		things = append(things, thing)
	}
	return things
}

// An end that no program renews is an alarm from 30 days before it on.
func TestThirtyDaysBefore(t *testing.T) {
	all := func(in time.Duration) Known {
		return Known{HostCA: ending(in), EKRoots: []*x509.Certificate{ending(in)},
			Issuers:   []issue.End{{What: ca.EndRoot, At: now.Add(in), Do: "make a new one"}, {What: ca.EndCRL, At: now.Add(in)}, {What: vault.EndToken, At: now.Add(in), Do: "make a new one"}},
			Operators: []OperatorKey{{Name: "alice", Role: "admin", Created: now.Add(in - 90*day), Expires: now.Add(in)}}}
	}
	want := []string{"ek-root", "host-ca", "operator alice", "vault-token", "workload-ca"}
	for in, want := range map[time.Duration][]string{31 * day: nil, 30 * day: want, day: want, 0: want, -day: want} {
		if got := alarms(all(in), now); !slices.Equal(got, want) {
			t.Errorf("%s before: %q, want %q", in, got, want)
		}
	}
	for _, a := range Alarms(List(all(-day), now), now) {
		if !strings.Contains(a, " ended at 2026-02-28T12:00:00Z: ") {
			t.Errorf("%q", a)
		}
	}
	if got := List(Known{}, now); got != nil {
		t.Errorf("of nothing: %v", got)
	}
}

// A program that renews its own certificate is an alarm once it should have, and didn't.
func TestOperators(t *testing.T) {
	for _, c := range []struct {
		what string
		keys []OperatorKey
		want []string
	}{
		{"a short one, made just now", []OperatorKey{{Name: "bob", Created: now, Expires: now.Add(day)}}, nil},
		{"a short one, near its end", []OperatorKey{{Name: "bob", Created: now.Add(-18 * time.Hour), Expires: now.Add(6 * time.Hour)}}, []string{"operator bob"}},
		{"a program, due since an hour", []OperatorKey{{Name: "watch", Program: true, Created: now.Add(-60*day - time.Hour), Expires: now.Add(30*day - time.Hour)}}, nil},
		{"a program, due since two days", []OperatorKey{{Name: "watch", Program: true, Created: now.Add(-62 * day), Expires: now.Add(28 * day)}}, []string{"operator watch"}},
		{"one that was made anew", []OperatorKey{{Name: "bob", Created: now.Add(-90 * day), Expires: now.Add(-day)}, {Name: "bob", Created: now, Expires: now.Add(90 * day)}}, nil},
		{"one that ended long ago", []OperatorKey{{Name: "bob", Created: now.Add(-190 * day), Expires: now.Add(-31 * day)}}, nil},
	} {
		if got := alarms(Known{Operators: c.keys}, now); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
}

// The table in docs/OPERATIONS.md is Kinds, row by row; every end has a kind.
func TestTheDocsTable(t *testing.T) {
	text := string(check.Must(os.ReadFile("../../../../docs/OPERATIONS.md"))(t))
	_, section, ok := strings.Cut(text, "## What ends by itself\n")
	if !ok {
		t.Fatal("docs/OPERATIONS.md has no such section")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var rows []string
	for _, line := range strings.Split(section, "\n") {
		if strings.HasPrefix(line, "| ") {
			rows = append(rows, line)
		}
	}
	cell := func(s string) string {
		if s == "" {
			return "–"
		}
		return s
	}
	want := []string{"| what | life | renewed by | if nobody does | metric `what` |"}
	for _, k := range Kinds {
		what := k.What
		if what != "" {
			what = "`" + strings.ReplaceAll(what, ", ", "`, `") + "`"
		}
		want = append(want, fmt.Sprintf("| %s | %s | %s | %s | %s |", k.Thing, k.Life, cell(k.Renewer), cell(k.Otherwise), cell(what)))
	}
	if !slices.Equal(rows, want) {
		t.Errorf("the docs have\n%s\nwant\n%s", strings.Join(rows, "\n"), strings.Join(want, "\n"))
	}

	for _, what := range []string{HostCA, Operator, EKRoot, ca.EndRoot, ca.EndIssuer, ca.EndCRL, vault.EndToken, vault.EndSecretID} {
		if !slices.ContainsFunc(Kinds, func(k Kind) bool { return regexp.MustCompile(`\b` + what + `\b`).MatchString(k.What) }) {
			t.Errorf("%s is of no kind", what)
		}
	}
}
