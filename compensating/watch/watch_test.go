package watch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/replay"
	"github.com/countersign/countersign/compensating/sightings"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func away(context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
	return nil, nil, errors.New("the broker is away")
}

// pollNow and settleNow are what the loop does, at once.
func (w *Watch) pollNow() error { return w.poll(context.Background()) }

func (w *Watch) settleNow() error {
	err := w.settled(context.Background())
	found, readErr := w.judge.Reads()
	w.add(found)
	return errors.Join(err, readErr)
}

// tellNow tells, and waits until it was told.
func (w *Watch) tellNow(t *testing.T, s *speaker) {
	w.tell(t.Context(), s)
	for !s.idle() {
		(<-s.done)()
	}
}

func write(t *testing.T, path string, text []byte, flag int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// story is a ledger and a log with honest and dishonest logins.
func story(r *rand.Rand) (entries, log []byte) {
	at := noon
	for i := range 60 {
		user := fmt.Sprintf("v-token-co-billing--abcdefghij%010d-1772366400", i)
		e := ledger.Entry{ID: fmt.Sprint("L", i), Scope: "billing-db", Host: fmt.Sprint("h", i%7), Kind: "vault", Sources: []string{fmt.Sprint("10.0.0.", i%7)},
			Names: ledger.Names{DBUsername: user, VaultLease: fmt.Sprint("database/creds/billing-ro/", i)}, Issued: at, Expires: at.Add(time.Minute)}
		line, err := json.Marshal(e)
		if err != nil {
			panic(err)
		}
		entries = append(append(entries, line...), '\n')
		for range r.IntN(5) {
			from := i % 7
			if r.IntN(5) == 0 {
				from = 100 + r.IntN(3)
			}
			name := user
			if r.IntN(9) == 0 {
				name = strings.Replace(user, "abc", "xyz", 1)
			}
			at = at.Add(time.Duration(r.IntN(4000)) * time.Millisecond)
			stamp := at.Format("2006-01-02 15:04:05.000 UTC")
			log = fmt.Appendf(log, "%s [%d] LOG:  connection received: host=10.0.0.%d port=1\n", stamp, 100+i, from)
			log = fmt.Appendf(log, "%s [%d] LOG:  connection authorized: user=%s database=billing\n", stamp, 100+i, name)
			if r.IntN(4) == 0 {
				log = fmt.Appendf(log, "%s [%d] FATAL:  role %q does not exist\n", stamp, 100+i, name)
			}
		}
	}
	return entries, log
}

func lines(t *testing.T, b finding.Book) string {
	t.Helper()
	var out []string
	for _, f := range b.Sorted() {
		for i := range f.Evidence {
			f.Evidence[i].Source, f.Evidence[i].Line = "", 0
		}
		text, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(text))
	}
	return strings.Join(out, "\n")
}

// TestKilledAnywhere: a watch that is killed after any bytes of a log, before or
// after it wrote down what it knows, finds what one that never died does, and as often.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	seeds := uint64(8)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 1))
		entries, text := story(r)
		dir := t.TempDir()
		state := filepath.Join(dir, "state")
		if err := os.Mkdir(state, 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(state, "ledger.jsonl"), entries, os.O_TRUNC)
		log := filepath.Join(dir, "postgresql.log")
		c := &Config{StateDir: state, Sensors: []Sensor{{Kind: "postgres-stderr", Name: "db", Path: log}}}
		now := noon
		open := func() *Watch {
			w, err := Open(c, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
			if err != nil {
				t.Fatal(err)
			}
			return w
		}
		do := func(f func() error) {
			t.Helper()
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}
		w := open()
		for rest := text; len(rest) > 0; {
			n := min(len(rest), 1+r.IntN(400))
			write(t, log, rest[:n], os.O_APPEND)
			if rest = rest[n:]; rest != nil && n > 0 && text[len(text)-len(rest)-1] == '\n' && r.IntN(20) == 0 {
				if err := os.Rename(log, fmt.Sprint(log, ".", len(rest))); err != nil {
					t.Fatal(err)
				}
			}
			do(w.pollNow)
			w.synced = now // the broker has nothing new
			do(w.settleNow)
			if r.IntN(2) == 0 {
				do(w.save)
			}
			if r.IntN(3) == 0 { // killed
				w.Close()
				w = open()
			}
			now = now.Add(time.Second / 2)
		}
		do(w.pollNow)
		now = now.Add(time.Minute)
		w.synced = now
		do(w.pollNow)
		do(w.settleNow)
		got := lines(t, w.book)
		w.Close()

		f, err := os.Open(filepath.Join(state, "ledger.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		index := ledger.NewIndex(f)
		do(func() error { return index.Load(int64(len(entries))) })
		reader, err := sightings.New("postgres-stderr", "db", sightings.Options{})
		if err != nil {
			t.Fatal(err)
		}
		book, err := replay.Run(index, detect.Config{}, []replay.Source{{Name: "db", Kind: "postgres-stderr", Log: strings.NewReader(string(text)), Reader: reader}})
		if err != nil {
			t.Fatal(err)
		}
		for key := range book { // which only the end of a log shows
			if key.Detector == detect.Dormant || key.Detector == detect.SilentSensor {
				delete(book, key)
			}
		}
		if want := lines(t, book); got != want || want == "" {
			t.Fatalf("seed %d: found\n%s\nwant\n%s", seed, got, want)
		}
	}
}

func TestOneWatch(t *testing.T) {
	c := &Config{StateDir: t.TempDir()}
	w, err := Open(c, away, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Open(c, away, slog.New(slog.DiscardHandler), time.Now); err == nil || !strings.Contains(err.Error(), "another watch") {
		t.Errorf("a second watch: %v", err)
	}
}

func TestUnmatchedWaitsForTheBroker(t *testing.T) {
	now := noon
	w, err := Open(&Config{StateDir: t.TempDir(), Governed: []string{"svc-*"}}, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.see(w.queue("db"), sightings.Sighting{Time: noon, Kind: sightings.Login, Account: "svc-x", Source: "db"}, w.now()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Hour)
	if err := w.settleNow(); err != nil || len(w.book) != 0 {
		t.Fatalf("with the broker away: %v %v", w.book, err)
	}
	// It comes back, and knows.
	if err := w.apply(update{entries: []ledger.Entry{{ID: "L", Scope: "s", Host: "h", Names: ledger.Names{DBUsername: "svc-x"}, Issued: noon}}, next: 7, synced: now}); err != nil {
		t.Fatal(err)
	}
	if err := w.settleNow(); err != nil || len(w.book) != 0 || len(w.queue("db").list) != 0 || w.kept.Audit != 7 {
		t.Fatalf("%v %v %+v", w.book, err, w.kept)
	}
	// Or doesn't.
	if err := w.see(w.queue("db"), sightings.Sighting{Time: noon, Kind: sightings.Login, Account: "svc-y", Source: "db"}, w.now()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Hour)
	if err := w.apply(update{next: 7, synced: now}); err != nil {
		t.Fatal(err)
	}
	if err := w.settleNow(); err != nil || len(w.book) != 1 {
		t.Fatalf("%v %v", w.book, err)
	}
}

func TestConfig(t *testing.T) {
	const good = `
state_dir = "/var/lib/countersign-watch"
through   = ["10.1.0.0/16"]
broker {
  socket = "/run/x"
}
sensor "postgres-csv" "db1" {
  path = "/var/log/postgresql/*.csv"
}
response "foreign-source" {
  action = "quarantine"
  scopes = ["billing-db"]
}
`
	load := func(text string) (*Config, error) {
		name := filepath.Join(t.TempDir(), "watch.hcl")
		write(t, name, []byte(text), os.O_TRUNC)
		return Load(name)
	}
	c, err := load(good)
	if err != nil {
		t.Fatal(err)
	}
	for scope, want := range map[string]detect.Response{"billing-db": detect.Quarantine, "other": detect.Revoke} {
		if got := c.response(detect.ForeignSource, scope); got != want {
			t.Errorf("%s: %s, want %s", scope, got, want)
		}
	}
	for old, bad := range map[string]string{
		`state_dir = "/var`: `state_dir = "var`,
		`["10.1.0.0/16"]`:   `["10.1.0.0"]`,
		`socket = "/run/x"`: ``,
		`"postgres-csv"`:    `"postgres"`,
		`path = "/var`:      `path = "var`,
		`"foreign-source"`:  `"foreign"`,
		`action = "quarant`: `action = "quant`,
		`scopes = `:         `scope = `,
	} {
		if _, err := load(strings.Replace(good, old, bad, 1)); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

// What a log's line can bring into a finding, the broker takes.
func TestBrief(t *testing.T) {
	long := strings.Repeat("ä\xff\n", 400)
	for _, s := range []string{"", "plain", long, long[1:], strings.Repeat("x", 513)} {
		if b := brief(s); len(b) > 512 || !utf8.ValidString(b) || len(s) < 512 && utf8.ValidString(s) && b != s {
			t.Errorf("%q of %q", b, s)
		}
	}
	a, b := cause(finding.Key{Cause: long + "a"}), cause(finding.Key{Cause: long + "b"})
	if a == b || len(a) > 512 || cause(finding.Key{Cause: "lease x"}) != "lease x" {
		t.Errorf("%q and %q", a, b)
	}
}

// Evidence reaches the broker however its texts are written down.
func TestShown(t *testing.T) {
	bad := strings.Repeat("\x01", 512)
	s := sightings.Sighting{Time: noon, Kind: sightings.Login, Source: "db", Line: 7, Account: bad, Target: bad, Program: bad, SSHKeyID: bad, VaultLease: bad, VaultPath: bad, Lease: bad, Actor: bad}
	b, err := shown(s)
	var back sightings.Sighting
	if err != nil || len(b) > maxEvidence || json.Unmarshal(b, &back) != nil || back.Line != 7 || !strings.HasPrefix(bad, back.Account) || len(back.Account) < 32 {
		t.Errorf("%v: %d bytes, %+v", err, len(b), back)
	}
	s = sightings.Sighting{Time: noon, Kind: sightings.Login, Account: "svc-x"}
	if b, err := shown(s); err != nil || !strings.Contains(string(b), `"account":"svc-x"`) {
		t.Errorf("%v: %s", err, b)
	}
}

func TestBrake(t *testing.T) {
	for _, c := range []struct {
		n     int
		of    uint64
		share float64
		want  bool
	}{
		{0, 0, 0, true}, // one always may
		{1, 10, 0.02, false},
		{1, 100, 0.02, true},
		{2, 100, 0.02, false},
		{199, 10_000, 0.02, true},
		{200, 10_000, 0.02, false},
	} {
		if got := allowed(c.n, c.of, c.share); got != c.want {
			t.Errorf("one more than %d of %d, share %v: %v", c.n, c.of, c.share, got)
		}
	}
}

// A log that falls silent is called blind, once; one that was never talkative isn't.
func TestBlind(t *testing.T) {
	now, dir := noon, t.TempDir()
	c := &Config{StateDir: filepath.Join(dir, "state"), Sensors: []Sensor{{Kind: "postgres-stderr", Name: "busy", Path: filepath.Join(dir, "busy")},
		{Kind: "postgres-stderr", Name: "slow", Path: filepath.Join(dir, "slow")}, {Kind: "sshd", Name: "absent", Path: filepath.Join(dir, "absent")}}}
	for name, every := range map[string]time.Duration{"busy": time.Second, "slow": time.Hour} {
		var log []byte
		for i := range 30 {
			log = fmt.Appendf(log, "%s [7] LOG:  checkpoint complete\n", noon.Add(time.Duration(i-30)*every).Format("2006-01-02 15:04:05.000 UTC"))
		}
		write(t, filepath.Join(dir, name), log, os.O_TRUNC)
	}
	w, err := Open(c, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, step := range []struct {
		after time.Duration
		want  string
	}{{time.Minute, ""}, {9 * time.Minute, ""}, {time.Minute, "absent"}, {20 * time.Minute, "absent busy"}, {5 * time.Hour, "absent busy"}, {20 * time.Hour, "absent busy slow"}} {
		if err := w.pollNow(); err != nil {
			t.Fatal(err)
		}
		now = now.Add(step.after)
		w.changed = false
		w.blind()
		w.blind()
		var names []string
		for _, f := range w.book {
			names = append(names, f.Account)
			if f.Detector != detect.SilentSensor || f.Count != 1 {
				t.Errorf("%+v", f)
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != step.want {
			t.Errorf("%s later: %q, want %q", step.after, got, step.want)
		}
	}
}

// What a program was long ago, it may be again; and what opens a file under ever other
// names is one finding in the end.
func TestManyAndLongAgo(t *testing.T) {
	t.Parallel()
	w, err := Open(&Config{StateDir: t.TempDir()}, away, slog.New(slog.DiscardHandler), func() time.Time { return noon })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	i := 0
	give := func(exe string, n int) {
		var entries []ledger.Entry
		for range n {
			at := noon.Add(time.Duration(i) * time.Minute)
			entries = append(entries, ledger.Entry{ID: fmt.Sprint("L", i), Scope: "s", Host: "h", Issued: at, Expires: at.Add(time.Hour), Subject: ledger.Subject{Exe: exe}})
			i++
		}
		if err := w.apply(update{entries: entries}); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		give("/opt/nightly", 1)
		give("/opt/daily", 250)
	}
	if len(w.kept.Findings) != 1 || w.kept.Findings[0].Finding.Count != 1 {
		t.Errorf("%d findings: %+v", len(w.kept.Findings), w.kept.Findings)
	}
	var opens []sightings.Sighting
	for i := range 500 {
		opens = append(opens, sightings.Sighting{Time: noon.Add(time.Duration(i) * time.Second), Kind: sightings.Open, Source: "agent", Line: int64(i), Lease: "L7", Program: fmt.Sprint("/tmp/", i)})
	}
	if err := w.apply(update{opens: opens}); err != nil {
		t.Fatal(err)
	}
	if n := len(w.kept.Findings); n != 1+17 {
		t.Errorf("%d findings of 500 programs", n-1)
	}
}

// A canary that is touched before the watch has heard of it, among any number of others.
func TestTouchedEarly(t *testing.T) {
	now := noon
	w, err := Open(&Config{StateDir: t.TempDir()}, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for i := range 2000 {
		account := fmt.Sprint("other", i)
		if i == 10 {
			account = "canary"
		}
		if err := w.see(w.queue("db"), sightings.Sighting{Time: noon.Add(time.Second), Kind: sightings.Attempt, Account: account, Source: "db"}, w.now()); err != nil {
			t.Fatal(err)
		}
	}
	now = now.Add(time.Minute)
	for range 2 { // told anew with each connection
		if err := w.apply(update{canaries: true, entries: []ledger.Entry{{ID: "T", Scope: "s", Kind: ledger.KindCanary, Names: ledger.Names{DBUsername: "canary"}, Issued: noon}}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.apply(update{synced: now}); err != nil {
		t.Fatal(err)
	}
	if err := w.settleNow(); err != nil || len(w.book) != 1 || len(w.queue("db").list) != 0 {
		t.Fatalf("%v, %v, and %d attempts wait", err, w.book, len(w.queue("db").list))
	}
	for _, f := range w.book {
		if f.Detector != detect.Canary || f.Count != 1 {
			t.Errorf("%+v", f)
		}
	}
}
