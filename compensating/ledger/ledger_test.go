package ledger_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/compensating/ledger"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func load(t testing.TB, entries ...ledger.Entry) *ledger.Index {
	t.Helper()
	var b bytes.Buffer
	for _, e := range entries {
		if err := json.NewEncoder(&b).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	x := ledger.NewIndex(bytes.NewReader(b.Bytes()))
	if err := x.Load(int64(b.Len())); err != nil {
		t.Fatal(err)
	}
	return x
}

func ids(t testing.TB, list []ledger.Entry, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.ID)
	}
	return strings.Join(out, " ")
}

func TestParse(t *testing.T) {
	const whole = `{"id":"L1","scope":"s","host":"h","subject":{"boot":"b","pid":5,"start":100,"unit":"u","invocation":"i","user":"x","parent":{"pid":1,"start":2,"exe":"/sbin/init"},"exe":"/e","sha256":"aa"},` +
		`"kind":"vault","names":{"db_username":"n","vault_lease":"database/creds/ro/id"},"sources":["10.0.0.1","10.1.0.0/16","::ffff:10.0.0.2","10.0.0.3:77"],"audience":["a"],"issued":"2026-03-01T12:00:00Z","expires":"2026-03-01T13:00:00Z","more":{}}`
	e, err := ledger.Parse([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if e.Subject.Parent != "/sbin/init" || e.Subject.Start != "100" || e.Names.Path() != "database/creds/ro" || !e.End().Equal(noon.Add(time.Hour)) {
		t.Errorf("%+v", e)
	}
	if got := fmt.Sprint(e.Prefixes()); got != "[10.0.0.1/32 10.1.0.0/16 10.0.0.2/32 10.0.0.3/32]" {
		t.Errorf("prefixes %s", got)
	}
	again, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := ledger.Parse(again); err != nil || fmt.Sprint(back) != fmt.Sprint(e) {
		t.Errorf("%+v, %v, want %+v", back, err, e)
	}
	for name, line := range map[string]string{
		"no id":              strings.Replace(whole, `"id":"L1",`, "", 1),
		"no scope":           strings.Replace(whole, `"scope":"s",`, "", 1),
		"an id twice":        strings.Replace(whole, `"scope"`, `"id":"L2","scope"`, 1),
		"a source's name":    strings.Replace(whole, "10.0.0.1", "db1", 1),
		"another time":       strings.Replace(whole, "2026-03-01T12", "2026-03-01 12", 1),
		"two objects":        whole + whole,
		"longer than a line": `{"id":"` + strings.Repeat("x", ledger.MaxLine) + `"}`,
	} {
		if e, err := ledger.Parse([]byte(line)); err == nil {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func TestLoadNamesTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"{\"id\":\"a\",\"scope\":\"s\"}\n\nrubbish\n":                   "line 3",
		"{\"id\":\"a\",\"scope\":\"s\"}\n" + strings.Repeat("x", 1<<20): "line 2",
		"{\"id\":\"a\",\"scope\":\"s\"}\n{\"id\":\"b\"}":                "line 2",
	} {
		err := ledger.NewIndex(strings.NewReader(text)).Load(int64(len(text)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want one of %s", err, want)
		}
	}
}

// TestIndex holds the index against a plain list of the same entries, many of which
// share names, come again with others, or came in no order.
func TestIndex(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var lines []ledger.Entry
	now := map[string]ledger.Entry{}
	for i := range 5000 {
		e := ledger.Entry{ID: fmt.Sprint("L", r.IntN(4000)), Kind: "vault", Issued: noon.Add(time.Duration(r.IntN(1e6)) * time.Millisecond)}
		if before, ok := now[e.ID]; ok {
			e = before // it gains what was not known before
			e.Revoked = noon
			e.Names.SSHKeyID = fmt.Sprint("key", r.IntN(100))
		} else {
			e.Host, e.Scope = fmt.Sprint("h", r.IntN(40)), fmt.Sprint("s", r.IntN(3))
			e.Names = ledger.Names{DBUsername: fmt.Sprint("u", i), VaultLease: fmt.Sprint("v/", i), SecretHMAC: fmt.Sprint("m", r.IntN(500))}
		}
		now[e.ID] = e
		lines = append(lines, e)
	}
	x := load(t, lines...)
	if x.Len() != len(now) {
		t.Fatalf("%d entries, want %d", x.Len(), len(now))
	}
	want := map[string][]string{} // by field and name
	programs := map[string]int{}
	for id, e := range now {
		for f, name := range map[ledger.Field]string{ledger.ByID: id, ledger.ByDBUsername: strings.ToLower(e.Names.DBUsername), ledger.ByVaultLease: e.Names.VaultLease,
			ledger.BySSHKeyID: e.Names.SSHKeyID, ledger.BySecret: e.Names.SecretHMAC} {
			if name != "" {
				key := fmt.Sprint(f, " ", name)
				want[key] = append(want[key], id)
			}
		}
		programs[e.Host+" "+e.Scope]++
	}
	for key, list := range want {
		var f ledger.Field
		var name string
		if _, err := fmt.Sscan(key, &f, &name); err != nil {
			t.Fatal(err)
		}
		found, err := x.Find(f, name)
		got := strings.Fields(ids(t, found, err))
		slices.Sort(got)
		slices.Sort(list)
		if !slices.Equal(got, list) {
			t.Fatalf("%s: %v, want %v", key, got, list)
		}
	}
	for f := range ledger.BySecret {
		if found, err := x.Find(f, "nobody's"); len(found) > 0 || err != nil {
			t.Errorf("field %d: %v %v", f, found, err)
		}
	}
	err := x.Programs(func(list []ledger.Entry) error {
		key := list[0].Host + " " + list[0].Scope
		if programs[key] != len(list) {
			t.Errorf("%s has %d entries, want %d", key, len(list), programs[key])
		}
		delete(programs, key)
		if !slices.IsSortedFunc(list, func(a, b ledger.Entry) int { return a.Issued.Compare(b.Issued) }) {
			t.Errorf("%s is not in the order of issue", key)
		}
		return nil
	})
	if err != nil || len(programs) > 0 {
		t.Errorf("%v; not seen: %v", err, programs)
	}
}

func TestAnEntryStaysWhereItIs(t *testing.T) {
	var b bytes.Buffer
	for _, host := range []string{"h1", "h2"} {
		if err := json.NewEncoder(&b).Encode(ledger.Entry{ID: "L", Scope: "s", Host: host}); err != nil {
			t.Fatal(err)
		}
	}
	if err := ledger.NewIndex(bytes.NewReader(b.Bytes())).Load(int64(b.Len())); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("%v, want the second line's", err)
	}
}

func TestAddressesOfAHost(t *testing.T) {
	x := load(t,
		ledger.Entry{ID: "1", Scope: "s", Host: "h", Sources: []string{"10.0.0.1"}, Issued: noon, Expires: noon.Add(time.Hour)},
		ledger.Entry{ID: "2", Scope: "s", Host: "h", Sources: []string{"10.0.0.2"}, Issued: noon.Add(time.Hour), Expires: noon.Add(2 * time.Hour)},
		ledger.Entry{ID: "3", Scope: "s", Host: "h", Sources: []string{"10.0.0.2"}, Issued: noon.Add(2 * time.Hour), Expires: noon.Add(3 * time.Hour)},
		ledger.Entry{ID: "4", Scope: "s", Host: "other", Sources: []string{"10.0.0.4"}, Issued: noon})
	for _, c := range []struct {
		host, address string
		after         time.Duration
		want          bool
	}{
		{"h", "10.0.0.1", 0, true},
		{"h", "10.0.0.1", -30 * time.Second, true},
		{"h", "10.0.0.1", -2 * time.Minute, false},
		{"h", "10.0.0.1", 61 * time.Minute, true},
		{"h", "10.0.0.1", 62 * time.Minute, false},
		{"h", "10.0.0.2", 150 * time.Minute, true},
		{"h", "10.0.0.4", 0, false},
		{"other", "10.0.0.4", 1000 * time.Hour, true},
		{"nobody", "10.0.0.4", 0, false},
	} {
		if got := x.At(c.host, netip.MustParseAddr(c.address), noon.Add(c.after), time.Minute); got != c.want {
			t.Errorf("%s at %s after %s: %v", c.address, c.host, c.after, got)
		}
	}
}

// FuzzParse: what is read is written and read again as the same.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"id":"L1","scope":"s","host":"h","subject":{"pid":5,"start":"7","parent":"/sbin/init"},"sources":["10.0.0.1/8"],"issued":"2026-03-01T12:00:00Z","revoked":null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := ledger.Parse(line)
		if err != nil {
			return
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatalf("%+v: %v", e, err)
		}
		again, err := ledger.Parse(text)
		if err != nil || fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", e) {
			t.Errorf("%+v, %v, want %+v", again, err, e)
		}
	})
}

// What was asked for before is asked for again after its entries changed.
func TestSharedNamesThatChange(t *testing.T) {
	var b bytes.Buffer
	x := ledger.NewIndex(readerAt{&b})
	add := func(e ledger.Entry) {
		t.Helper()
		e.Scope, e.Host, e.Names.DBUsername = "s", "h", "svc"
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		at := b.Len()
		b.Write(append(line, '\n'))
		if err := x.Add(int64(at), len(line)+1, e); err != nil {
			t.Fatal(err)
		}
	}
	want := func(n int, revoked bool) {
		t.Helper()
		list, err := x.Find(ledger.ByDBUsername, "svc")
		if err != nil || len(list) != n || slices.ContainsFunc(list, func(e ledger.Entry) bool { return e.ID == "2" && !e.Revoked.IsZero() != revoked }) {
			t.Fatalf("%v, %v", list, err)
		}
		clear(list) // the caller's
	}
	add(ledger.Entry{ID: "1"})
	add(ledger.Entry{ID: "2"})
	want(2, false)
	want(2, false)
	add(ledger.Entry{ID: "3"})
	want(3, false)
	add(ledger.Entry{ID: "2", Revoked: noon})
	want(3, true)
}

type readerAt struct{ b *bytes.Buffer }

func (r readerAt) ReadAt(p []byte, at int64) (int, error) { return copy(p, r.b.Bytes()[at:]), nil }

// A lease's subject is the same in either version of the attested program.
func TestSubjects(t *testing.T) {
	for _, name := range []string{"unit", "process", "starting", "least", "odd-names"} {
		var subjects [2]ledger.Subject
		for i, version := range []string{"v1", "v2"} {
			b, err := os.ReadFile(filepath.Join("../../attestors/process/testdata", version, name+".json"))
			if err != nil {
				t.Fatal(err)
			}
			e, err := ledger.OfLease(&v1.Lease{Id: "L1", Subject: b})
			if err != nil {
				t.Fatal(err)
			}
			subjects[i] = e.Subject
		}
		if subjects[0] != subjects[1] || subjects[0].Exe == "" || subjects[0].SHA256 == "" || (subjects[0].Unit == "") != (name == "process" || name == "least") {
			t.Errorf("%s: %+v and %+v", name, subjects[0], subjects[1])
		}
	}
}
