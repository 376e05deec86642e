package watch

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/replay"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/test/fakebroker"
)

// A ticking clock goes on by a step each time that somebody looks at it: what takes long
// takes many looks.
type ticking struct {
	t    time.Time
	step time.Duration
}

func (c *ticking) now() time.Time {
	c.t = c.t.Add(c.step)
	return c.t
}

// atNoon is the time for who runs beside the loop.
func atNoon() time.Time { return noon }

// csvLogin is a completed login in csvlog.
func csvLogin(log []byte, n int, at time.Time, account, from string) []byte {
	return fmt.Appendf(log, "%s,%q,\"billing\",%d,\"%s:4000\",69a42ac0.%x,2,\"authentication\",%s,3/2,0,LOG,00000,\"connection authorized: user=%s database=billing application_name=billingd\",,,,,,,,,\"billingd\",\"client backend\",,0\n",
		at.Format("2006-01-02 15:04:05.000 UTC"), account, 1000+n%30_000, from, n, at.Format("2006-01-02 15:04:05 UTC"), account)
}

// catchUp is a watch before a log that is longer than it reads at once, by a clock of its
// own. The broker is there when synced says so.
type catchUp struct {
	*Watch
	t     *testing.T
	clock *ticking
	c     *Config
	speak *speaker
	heard time.Time // when the broker's last word came
}

func newCatchUp(t *testing.T, step time.Duration, logs map[string][]byte) *catchUp {
	dir := t.TempDir()
	x := &catchUp{t: t, clock: &ticking{noon.Add(24 * time.Hour), step}, c: &Config{StateDir: filepath.Join(dir, "state"), Governed: []string{"svc-*"}}}
	for name, text := range logs {
		path := filepath.Join(dir, name+".csv")
		write(t, path, text, os.O_TRUNC)
		x.c.Sensors = append(x.c.Sensors, Sensor{Kind: "postgres-csv", Name: name, Path: path})
	}
	slices.SortFunc(x.c.Sensors, func(a, b Sensor) int { return strings.Compare(a.Name, b.Name) })
	x.open()
	t.Cleanup(func() { x.Close() })
	return x
}

func (x *catchUp) open() {
	x.t.Helper()
	w, err := Open(x.c, away, slog.New(slog.DiscardHandler), x.clock.now)
	if err != nil {
		x.t.Fatal(err)
	}
	x.Watch, x.speak = w, newSpeaker(x.c, away, w.log, atNoon)
	x.heard = time.Time{}
}

// step is one turn of the loop. Where the broker is there, its word comes every 200 ms.
func (x *catchUp) step(broker bool, news ...ledger.Entry) {
	x.t.Helper()
	if now := x.clock.now(); broker && now.Sub(x.heard) > batch {
		x.heard = now
		if err := x.apply(update{entries: news, synced: now.Add(-time.Second)}); err != nil {
			x.t.Fatal(err)
		}
	}
	if err := x.turn(x.t.Context(), x.speak); err != nil {
		x.t.Fatal(err)
	}
	if x.index.Len() == 0 && x.synced.IsZero() || !x.behind {
		x.clock.t = x.clock.t.Add(pollEvery) // it sleeps
	}
	for !x.speak.idle() {
		(<-x.speak.done)()
	}
}

func (x *catchUp) read(name string) int64 {
	for _, s := range x.sensors {
		if s.Name == name {
			return s.reader.Health().Lines
		}
	}
	return 0
}

func (x *catchUp) counts() string {
	var out []string
	for _, f := range x.book.Sorted() {
		out = append(out, fmt.Sprint(f.Detector, " ", f.Account, " ", f.Count))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func (x *catchUp) waiting() (n int) {
	for _, q := range x.queues {
		n += len(q.list)
	}
	return n
}

const issuedNow = "v-token-co-billing-abcdefghijklmnopqrst-1772366400"

// TestLongLog: of a log with more unknown logins than could ever wait, the first line
// counts as much as the last. Meanwhile other logs are read, the broker is listened to,
// progress is kept, and little is written.
func TestLongLog(t *testing.T) {
	t.Parallel()
	const logins = 70_000 // more than could wait, when each that waited had a place in one list
	at := noon
	log := csvLogin(nil, 0, at, "svc-early", "10.0.0.9")
	for n := range logins {
		at = at.Add(time.Millisecond)
		log = csvLogin(log, n, at, fmt.Sprint("app", n), "10.1.0.1")
	}
	log = csvLogin(log, 1, at, issuedNow, "10.6.6.6")
	log = csvLogin(log, 2, at, "svc-late", "10.0.0.9")
	other := csvLogin(nil, 3, noon, "svc-other", "10.0.0.9")
	x := newCatchUp(t, 20*time.Microsecond, map[string][]byte{"db": log, "other": other})

	var saved, turned time.Time
	var wrote int64
	for turns := 0; x.read("db") < logins+3; turns++ {
		if turned = x.clock.t; turns == 0 {
			saved = turned
		}
		var news []ledger.Entry
		if x.read("db") > logins/2 { // issued while it catches up
			news = []ledger.Entry{{ID: "L1", Scope: "s", Host: "h", Kind: "vault", Sources: []string{"10.0.0.1"}, Issued: noon, Expires: noon.Add(time.Hour),
				Names: ledger.Names{DBUsername: issuedNow, VaultLease: "database/creds/billing/1"}}}
		}
		x.step(true, news...)

		if took := x.clock.t.Sub(turned); took > time.Second {
			t.Fatalf("a turn took %v", took)
		}
		if turns == 3 && x.read("other") != 1 {
			t.Error("the short log waits for the long one")
		}
		if x.disk.wrote > wrote {
			wrote, saved = x.disk.wrote, x.clock.t
		}
		if since := x.clock.t.Sub(saved); since > 5*time.Second {
			t.Fatalf("nothing was saved for %v, with %d lines read", since, x.read("db"))
		}
		for name, q := range x.queues {
			if q.bytes > x.room+(1<<20) {
				t.Fatalf("%d bytes of %s wait, with room for %d", q.bytes, name, x.room)
			}
		}
	}
	for range 60 { // until all of it was judged
		x.step(true)
	}
	if got, want := x.counts(), "foreign-source "+issuedNow+" 1, unmatched-login svc-early 1, unmatched-login svc-late 1, unmatched-login svc-other 1"; got != want {
		t.Errorf("found %s, want %s", got, want)
	}
	if x.waiting() != 0 || x.disk.wrote > 2*int64(len(log)) {
		t.Errorf("%d wait, %d bytes written of a log of %d", x.waiting(), x.disk.wrote, len(log))
	}
}

// TestSavedLittle: a log that goes on for long, with many sessions that stay open, isn't
// paid for again with each second.
func TestSavedLittle(t *testing.T) {
	t.Parallel()
	x := newCatchUp(t, time.Microsecond, map[string][]byte{"db": nil})
	var log []byte
	size, n := 0, 0
	for n < 3000 {
		log = csvLogin(log, n, x.clock.t, fmt.Sprint("app", n), "10.0.0.9")
		n++
	}
	for second := range 60 {
		for range 30 {
			log = csvLogin(log, n, x.clock.t, fmt.Sprintf("app%d", n%50), "10.0.0.9")
			n++
		}
		log = csvLogin(log, n, x.clock.t, fmt.Sprintf("svc-%d", second%5), "10.0.0.9")
		for range 70 {
			log = fmt.Appendf(log, "%s,\"app\",\"billing\",7,\"10.0.0.9:4000\",69a42ac0.f,7,\"SELECT\",2026-03-01 12:00:00 UTC,3/7,0,LOG,00000,\"statement: %s\",,,,,,,,,\"billingd\",\"client backend\",,0\n",
				x.clock.t.Format("2006-01-02 15:04:05.000 UTC"), strings.Repeat("SELECT 1; ", 15))
		}
		size += len(log)
		write(t, x.c.Sensors[0].Path, log, os.O_APPEND)
		log = log[:0]
		for range 4 {
			x.step(true)
		}
	}
	if got := strings.Count(x.counts(), "unmatched-login"); got != 5 {
		t.Errorf("found %s", x.counts())
	}
	ratio := float64(x.disk.wrote) / float64(size)
	t.Logf("%.2f bytes written for each of the log; %d in the file", ratio, x.disk.size)
	if ratio > 2 {
		t.Errorf("%d bytes written of a log of %d", x.disk.wrote, size)
	}
}

// TestKilledInACatchUp: a watch that is killed anywhere in a long log, while the broker
// comes and goes and there is room for little, finds what is to be found, and as often.
func TestKilledInACatchUp(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2) {
		r := rand.New(rand.NewPCG(seed, 2))
		var log []byte
		total := int64(0)
		for at := noon; total < 800; total++ {
			at = at.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
			account := fmt.Sprint("app", r.IntN(1000))
			if r.IntN(10) == 0 {
				account = fmt.Sprint("svc-", r.IntN(20))
			}
			log = csvLogin(log, int(total), at, account, fmt.Sprint("10.0.0.", r.IntN(9)))
		}
		x := newCatchUp(t, time.Millisecond, map[string][]byte{"db": log})
		x.room = 50 << 10
		kills, broker := 0, true
		for x.read("db") < total || x.waiting() > 0 {
			if r.IntN(10) == 0 {
				broker = !broker
			}
			x.step(broker)
			if r.IntN(3) == 0 {
				kills++
				x.Close()
				x.open()
				x.room = 50 << 10
			}
		}
		x.clock.t = x.clock.t.Add(time.Minute)
		for range 40 {
			x.step(true)
		}
		for key := range x.book {
			if key.Detector == detect.SilentSensor {
				delete(x.book, key)
			}
		}
		got := lines(t, x.book)

		reader, err := sightings.New("postgres-csv", "db", sightings.Options{})
		if err != nil {
			t.Fatal(err)
		}
		book, err := replay.Run(ledger.NewIndex(strings.NewReader("")), detect.Config{Governed: x.c.Governed}, []replay.Source{{Name: "db", Kind: "postgres-csv", Log: strings.NewReader(string(log)), Reader: reader}})
		if err != nil {
			t.Fatal(err)
		}
		want := lines(t, book)
		if want == "" || kills < 5 {
			t.Errorf("seed %d: %d kills, found %s", seed, kills, x.counts())
		}
		gotLines, wantLines := strings.Split(got, "\n"), strings.Split(want, "\n")
		for i := range max(len(gotLines), len(wantLines)) {
			if i >= len(gotLines) || i >= len(wantLines) || gotLines[i] != wantLines[i] {
				t.Fatalf("seed %d: found\n%s\nwant\n%s", seed, gotLines[min(i, len(gotLines)-1)], wantLines[min(i, len(wantLines)-1)])
			}
		}
	}
}

// TestFull: while the broker is away, a log with too much that waits stays on the disk,
// and that is a finding. Others are read on. When the broker is back nothing is missing.
func TestFull(t *testing.T) {
	var log []byte
	for n := range 1000 {
		log = csvLogin(log, n, noon.Add(time.Duration(n)*5*time.Second), fmt.Sprint("svc-", n%3), "10.0.0.9")
	}
	x := newCatchUp(t, 100*time.Microsecond, map[string][]byte{"db": log, "other": csvLogin(nil, 7, noon, "x", "10.0.0.9")})
	x.room = 50 << 10
	x.synced = x.clock.t.Add(-time.Hour) // it was there
	for range 40 {
		x.step(false)
	}
	if x.behind || x.read("db") > 200 || x.read("other") != 1 || len(x.book) != 0 {
		t.Errorf("behind %v, %d lines read, %d of the other, found %s", x.behind, x.read("db"), x.read("other"), x.counts())
	}
	for range 1000 {
		x.step(false)
	}
	if got := x.counts(); got != "silent-sensor db 1" {
		t.Errorf("after minutes: found %q", got)
	}
	for range 400 {
		x.step(true)
	}
	if got, want := x.counts(), "silent-sensor db 1, unmatched-login svc-0 334, unmatched-login svc-1 333, unmatched-login svc-2 333"; got != want {
		t.Errorf("found %s, want %s", got, want)
	}
	if r := x.records[finding.Key{Detector: detect.SilentSensor, Cause: "silent db"}]; r == nil || !r.over() {
		t.Error("the log is read again, and still called blind")
	}
}

// TestEndsInACatchUp: the end comes between two lines, and what was read is saved.
func TestEndsInACatchUp(t *testing.T) {
	t.Parallel()
	b, err := fakebroker.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	const logins = 30_000
	var log []byte
	for n := range logins {
		log = csvLogin(log, n, noon.Add(time.Duration(n)*time.Millisecond), fmt.Sprint("app", n), "10.1.0.1")
	}
	path := filepath.Join(t.TempDir(), "log.csv")
	write(t, path, log, os.O_TRUNC)
	c := &Config{StateDir: filepath.Join(filepath.Dir(path), "state"), Sensors: []Sensor{{Kind: "postgres-csv", Name: "db", Path: path}}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w, err := Open(c, b.Dial, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := w.sensors[0]
	s.reader = &ending{s.reader, 5000, cancel}
	if err := w.Run(ctx); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if n := s.reader.Health().Lines; n < 5000 || n > 5001 {
		t.Errorf("%d lines were read, and the end came at the 5000th", n)
	}
	if w, err = Open(c, b.Dial, slog.New(slog.DiscardHandler), time.Now); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if n, kept := w.sensors[0].reader.Health().Lines, w.sensors[0].tail.Places()[0].Line; n < 5000 || kept != n {
		t.Errorf("line %d is kept, and %d were read", kept, n)
	}
}

// An ending reader cancels at a line.
type ending struct {
	sightings.Reader
	left   int
	cancel func()
}

func (e *ending) Line(number int64, line []byte, emit func(sightings.Sighting)) {
	if e.left--; e.left == 0 {
		e.cancel()
	}
	e.Reader.Line(number, line, emit)
}

// deaf is a broker that takes a call and never answers.
type deaf struct {
	countersignv1connect.OperatorServiceClient
	asked chan struct{}
}

func (b *deaf) ReportFinding(ctx context.Context, _ *connect.Request[v1.ReportFindingRequest]) (*connect.Response[v1.ReportFindingResponse], error) {
	b.asked <- struct{}{}
	<-ctx.Done()
	return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
}

// TestDeaf: a broker, or a receiver, that doesn't answer holds up neither reading nor
// saving nor the end.
func TestDeaf(t *testing.T) {
	x := newCatchUp(t, time.Microsecond, map[string][]byte{"db": nil})
	hook := make(chan struct{}, 9)
	ctx, cancel := context.WithCancel(t.Context())
	b := &deaf{asked: make(chan struct{}, 9)}
	s := newSpeaker(x.c, func(context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
		return b, func() {}, nil
	}, x.log, atNoon)
	s.hooks = []receiver{silentHook{hook}}
	s.done = make(chan func(), 2)
	x.add([]detect.Detection{{Detector: detect.UnmatchedLogin, Account: "a", Time: noon}, {Detector: detect.UnmatchedLogin, Account: "b", Time: noon}})
	x.kept.Findings[1].Told = 1 // the broker has it, the receiver hasn't
	x.synced = x.clock.t

	for n := range 20 {
		write(t, x.c.Sensors[0].Path, csvLogin(nil, n, noon, "app", "10.0.0.9"), os.O_APPEND)
		x.clock.t = x.clock.t.Add(2 * time.Second)
		if err := x.turn(ctx, s); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			<-b.asked
			<-hook
		}
	}
	if n := x.read("db"); n != 20 || x.changed {
		t.Errorf("%d lines were read, unsaved %v", n, x.changed)
	}
	if s.idle() || len(b.asked) > 0 || len(hook) > 0 {
		t.Error("it is asked again before it answered")
	}
	cancel()
	s.end(time.Hour)
	if !s.idle() || x.kept.Findings[0].Told != 0 {
		t.Error("an answer that never came counts")
	}
}

type silentHook struct{ asked chan struct{} }

func (silentHook) name() string { return "silent" }
func (silentHook) id() string   { return "silent" }
func (h silentHook) tell(ctx context.Context, _ *record) error {
	h.asked <- struct{}{}
	<-ctx.Done()
	return ctx.Err()
}

// TestLostUnread: what can't be read any more, or was never taken, is a finding.
func TestLostUnread(t *testing.T) {
	var log []byte
	for n := range 500 {
		log = csvLogin(log, n, noon, fmt.Sprint("app", n), "10.0.0.9")
	}
	x := newCatchUp(t, 10*time.Millisecond, map[string][]byte{"db": log})
	x.step(true)
	if n := x.read("db"); n == 0 || n > 400 {
		t.Fatalf("%d lines were read", n)
	}
	write(t, x.c.Sensors[0].Path, []byte("short\n"), os.O_TRUNC)
	x.step(true)
	if got := x.counts(); got != "silent-sensor db 1" {
		t.Errorf("truncated before it was read: found %q", got)
	}

	spool, err := openSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(t.TempDir(), "token")
	write(t, token, []byte("t"), os.O_TRUNC)
	x.sensors[0].spool, spool.waiting = spool, maxSpool
	req := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(`{}`))
	req.Header.Set("Authorization", "Bearer t")
	a := httptest.NewRecorder()
	Sensor{TokenFile: token}.endpoint(spool).ServeHTTP(a, req)
	if a.Code != http.StatusServiceUnavailable {
		t.Errorf("a full spool answers %d", a.Code)
	}
	x.blind()
	x.blind()
	if got := x.counts(); got != "silent-sensor db 1, silent-sensor db 1" {
		t.Errorf("turned away: found %q", got)
	}
}

// TestParts: after a kill at any byte of what is written last, the file is the state of
// the save before; and it stays in proportion to the state.
func TestParts(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.json")
	r := rand.New(rand.NewPCG(3, 3))
	model := map[string]string{}
	p := newPartsFile(path)
	p.fold = 20 << 10
	save := func() {
		if err := p.save(func(s *saving) {
			for k, v := range model {
				s.put(k, v)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	load := func() map[string]string {
		parts, err := newPartsFile(path).load()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for k, text := range parts {
			var v string
			if err := json.Unmarshal(text, &v); err != nil {
				t.Fatal(err)
			}
			got[k] = v
		}
		return got
	}
	same := func(a, b map[string]string) bool {
		return fmt.Sprint(a) == fmt.Sprint(b)
	}
	change := func(n int) {
		for range n {
			k := key("part", fmt.Sprint("a/b%", r.IntN(100)))
			if model[k] = fmt.Sprint(r.Int64(), strings.Repeat("x", r.IntN(600))); r.IntN(3) == 0 {
				delete(model, k)
			}
		}
	}
	change(300)
	save()
	anew := 0
	for range 100 {
		before := fmt.Sprint(model)
		change(20)
		size := p.size
		save()
		if got := load(); !same(got, model) {
			t.Fatal("what was saved isn't what is loaded")
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(text)) <= size || p.size == p.whole {
			anew++
			continue
		}
		for _, cut := range []int{int(size), int(size) + 1, int(size) + r.IntN(len(text)-int(size)), len(text) - 1} {
			write(t, path, text[:cut], os.O_TRUNC)
			if got := load(); fmt.Sprint(got) != before {
				t.Fatalf("killed at byte %d of %d: another state", cut, len(text))
			}
		}
		write(t, path, text, os.O_TRUNC)
		if p.size > 5*(p.whole+p.fold) {
			t.Fatalf("%d bytes, of a state of %d", p.size, p.whole)
		}
	}
	if anew < 5 {
		t.Errorf("it was written anew %d times", anew)
	}
	// Nothing new: nothing is written.
	wrote := p.wrote
	save()
	if p.wrote != wrote {
		t.Error("what is the same is written again")
	}
	// What isn't as it was written in the middle is no kill's doing.
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change(20)
	save()
	full, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	full[len(text)/2] = '\n'
	write(t, path, full, os.O_TRUNC)
	if _, err := newPartsFile(path).load(); err == nil {
		t.Error("a broken file is taken")
	}
	for _, name := range [][]string{{"a"}, {"a/b", "c%2F", "%"}, {"", "x", ""}} {
		if got := words(key(name...)); !slices.Equal(got, name) {
			t.Errorf("%q is %q", name, got)
		}
	}
}
