package tail_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/tail"
)

type reader struct {
	t    *testing.T
	at   string
	tail *tail.Tail
	now  time.Time
	rest int // bytes behind what was given of long lines
}

func open(t *testing.T, pattern string) *reader {
	r := &reader{t: t, at: pattern, now: time.Unix(1e9, 0)}
	r.restart(nil)
	return r
}

// restart begins anew from places that were kept.
func (r *reader) restart(places []tail.Place) {
	r.t.Helper()
	if r.tail != nil {
		r.tail.Close()
	}
	text, err := json.Marshal(places)
	if err != nil {
		r.t.Fatal(err)
	}
	var kept []tail.Place
	if err := json.Unmarshal(text, &kept); err != nil {
		r.t.Fatal(err)
	}
	if r.tail, err = tail.New(r.at, kept, func() time.Time { return r.now }); err != nil {
		r.t.Fatal(err)
	}
}

// poll says which lines are new, with their numbers.
func (r *reader) poll() string {
	r.t.Helper()
	var out []string
	_, behind, err := r.tail.Poll(always, func(l tail.Line) {
		text := string(l.Text)
		if len(text) > 20 {
			text = fmt.Sprint(len(text))
		}
		out = append(out, fmt.Sprint(filepath.Base(l.Path), ":", l.Number, ":", text))
	}, func(part []byte) { r.rest += len(part) })
	if err != nil || behind {
		r.t.Fatal(behind, err)
	}
	return strings.Join(out, " ")
}

func always() bool { return true }

func (r *reader) want(words string) {
	r.t.Helper()
	if got := r.poll(); got != words {
		r.t.Errorf("read %q, want %q", got, words)
	}
}

func write(t *testing.T, path, text string, flag int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestFollow(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	r := open(t, log)
	r.want("")
	write(t, log, "a\nb", os.O_APPEND)
	r.want("log:1:a")
	write(t, log, "c\n\nd\n", os.O_APPEND)
	r.want("log:2:bc log:3: log:4:d")
	r.want("")
}

func TestRestart(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "a\nb\nhalf", os.O_APPEND)
	r := open(t, log)
	r.want("log:1:a log:2:b")
	r.restart(r.tail.Places())
	write(t, log, " and half\nc\n", os.O_APPEND)
	r.want("log:3:half and half log:4:c")
}

func TestRenamed(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "a\n", os.O_APPEND)
	r := open(t, log)
	r.want("log:1:a")
	write(t, log, "b\n", os.O_APPEND)
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	write(t, log, "x\n", os.O_APPEND)
	r.want("log:2:b log:1:x")
	write(t, log+".1", "c\n", os.O_APPEND) // by who has it open
	r.want("log:3:c")
	r.now = r.now.Add(2 * time.Minute)
	r.want("")
	r.now = r.now.Add(2 * time.Minute)
	r.want("")
	if n := len(r.tail.Places()); n != 1 {
		t.Errorf("%d files are followed, want 1", n)
	}
}

func TestRenamedWhileNobodyRead(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "a\n", os.O_APPEND)
	r := open(t, log)
	r.want("log:1:a")
	places := r.tail.Places()
	write(t, log, "b\n", os.O_APPEND)
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	write(t, log, "x\n", os.O_APPEND)
	r.restart(places)
	r.want("log.1:2:b log:1:x")
	// Compressed and removed: what was behind the place is lost, and that is said.
	places = r.tail.Places()
	if err := os.Remove(log + ".1"); err != nil {
		t.Fatal(err)
	}
	r.restart(places)
	if lost := r.tail.Lost(); !slices.Equal(lost, []string{log + ".1"}) {
		t.Errorf("lost %v", lost)
	}
}

func TestTruncated(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "aaaa\nbbbb\n", os.O_APPEND)
	r := open(t, log)
	r.want("log:1:aaaa log:2:bbbb")
	write(t, log, "c\n", os.O_TRUNC)
	r.want("log:1:c")
	// Written anew, and longer than before.
	write(t, log, "dddd\neeee\nffff\n", os.O_TRUNC)
	r.want("log:1:dddd log:2:eeee log:3:ffff")
	// And while nobody read.
	places := r.tail.Places()
	write(t, log, "gggg\nhhhh\niiii\njjjj\n", os.O_TRUNC)
	r.restart(places)
	r.want("log:1:gggg log:2:hhhh log:3:iiii log:4:jjjj")
}

func TestPattern(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "postgresql-1.log"), "a\n", os.O_APPEND)
	write(t, filepath.Join(dir, "other"), "o\n", os.O_APPEND)
	if err := os.Mkdir(filepath.Join(dir, "postgresql-d.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("other", filepath.Join(dir, "postgresql-l.log")); err != nil {
		t.Fatal(err)
	}
	r := open(t, filepath.Join(dir, "postgresql-*.log"))
	r.want("postgresql-1.log:1:a")
	write(t, filepath.Join(dir, "postgresql-2.log"), "b\n", os.O_APPEND)
	write(t, filepath.Join(dir, "postgresql-1.log"), "c\n", os.O_APPEND)
	r.want("postgresql-1.log:2:c postgresql-2.log:1:b")
	for _, pattern := range []string{"relative", "/x/[", ""} {
		if _, err := tail.New(pattern, nil, time.Now); err == nil {
			t.Errorf("pattern %q is taken", pattern)
		}
	}
}

func TestLongLines(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, strings.Repeat("x", tail.MaxLine+10), os.O_APPEND)
	r := open(t, log)
	r.want(fmt.Sprint("log:1:", tail.MaxLine))
	r.restart(r.tail.Places())
	write(t, log, strings.Repeat("x", tail.MaxLine)+"\nb\n", os.O_APPEND)
	r.want("log:2:b")
	if want := 10 + tail.MaxLine; r.rest != want {
		t.Errorf("%d bytes behind what was given, want %d", r.rest, want)
	}
}

// TestKilledAnywhere: whatever whole lines a place was kept after, going on from it
// gives each line once.
func TestKilledAnywhere(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	var want []string
	for i := range 300 {
		want = append(want, fmt.Sprint("line ", i, strings.Repeat(".", i%70)))
	}
	text := strings.Join(want, "\n") + "\n"
	var got []string
	var places []tail.Place
	now := func() time.Time { return time.Unix(1e9, 0) }
	for written, step := 0, 0; written < len(text); step++ {
		n := min(len(text)-written, 1+step*37%211)
		write(t, log, text[written:written+n], os.O_APPEND)
		written += n
		if step%11 == 5 {
			if err := os.Rename(log, fmt.Sprint(log, ".", step)); err != nil {
				t.Fatal(err)
			}
			// Writers end a line before they reopen.
			if end := strings.IndexByte(text[written:], '\n'); end >= 0 && text[written-1] != '\n' {
				write(t, fmt.Sprint(log, ".", step), text[written:written+end+1], os.O_APPEND)
				written += end + 1
			}
		}
		f, err := tail.New(log, places, now)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		if _, _, err := f.Poll(always, func(l tail.Line) { lines = append(lines, string(l.Text)) }, nil); err != nil {
			t.Fatal(err)
		}
		if step%3 == 0 { // killed before it kept what it saw
			f.Close()
			continue
		}
		got, places = append(got, lines...), f.Places()
		f.Close()
	}
	f, err := tail.New(log, places, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Poll(always, func(l tail.Line) { got = append(got, string(l.Text)) }, nil); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d lines, want %d", len(got), len(want))
	}
}

// limited is Poll with room for n questions: it returns the lines that came, and
// whether there were more.
func (r *reader) limited(n int) (out []tail.Line, behind bool) {
	r.t.Helper()
	_, behind, err := r.tail.Poll(func() bool { n--; return n >= 0 }, func(l tail.Line) {
		l.Path, l.Text = filepath.Base(l.Path), slices.Clone(l.Text)
		out = append(out, l)
	}, func(part []byte) { r.rest += len(part) })
	if err != nil {
		r.t.Fatal(err)
	}
	return out, behind
}

// A reader that stops after any number of lines, and is restarted there or not, gives
// each line once and in order.
func TestStopsAnywhere(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	var want []string
	for i := range 5000 {
		want = append(want, fmt.Sprint("line ", i, strings.Repeat(".", i*37%300)))
	}
	write(t, log, strings.Join(want, "\n")+"\n", os.O_APPEND)

	r := open(t, log)
	var got []string
	for turn, behind := 0, true; behind; turn++ {
		var lines []tail.Line
		lines, behind = r.limited(2 + turn*53%97)
		if len(lines) > 99 {
			t.Fatalf("%d lines at once", len(lines))
		}
		for _, l := range lines {
			if got = append(got, string(l.Text)); l.Number != int64(len(got)) {
				t.Fatalf("line %d has the number %d", len(got), l.Number)
			}
		}
		if turn%7 == 3 {
			r.restart(r.tail.Places())
			behind = true
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d lines, want %d", len(got), len(want))
	}
}

// A line that has no end is read in parts, too.
func TestStopsInALongLine(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, strings.Repeat("x", 5*tail.MaxLine)+"\nb\n", os.O_APPEND)
	r := open(t, log)
	turns, lines := 0, 0
	for behind := true; behind; turns++ {
		var some []tail.Line
		some, behind = r.limited(3)
		lines += len(some)
	}
	if turns < 20 || lines != 2 || r.rest != 4*tail.MaxLine {
		t.Errorf("%d turns, %d lines, %d bytes behind what was given", turns, lines, r.rest)
	}
}

// A log that grows as fast as it is read keeps no other from its turn.
func TestTurns(t *testing.T) {
	dir := t.TempDir()
	busy, quiet := filepath.Join(dir, "a.log"), filepath.Join(dir, "b.log")
	write(t, busy, strings.Repeat("busy\n", 10), os.O_APPEND)
	write(t, quiet, "quiet\n", os.O_APPEND)
	r := open(t, filepath.Join(dir, "*.log"))
	for turn := range 20 {
		lines, _ := r.limited(5)
		if slices.ContainsFunc(lines, func(l tail.Line) bool { return l.Path == "b.log" }) {
			return
		}
		write(t, busy, strings.Repeat("busy\n", 5+turn), os.O_APPEND)
	}
	t.Error("the quiet log was never read")
}

// Since is when a line was seen to be there: however long reading takes, what was there
// at its beginning was.
func TestSince(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "a\nb\nc\n", os.O_APPEND)
	r := open(t, log)
	start := r.now
	var got []string
	for behind := true; behind; {
		var lines []tail.Line
		lines, behind = r.limited(3)
		for _, l := range lines {
			got = append(got, fmt.Sprint(string(l.Text), l.Since.Sub(start)))
		}
		if r.now = r.now.Add(time.Minute); r.now.Sub(start) == time.Minute {
			write(t, log, "d\n", os.O_APPEND)
			behind = true
		}
	}
	for _, l := range func() []tail.Line { l, _ := r.limited(9); return l }() {
		got = append(got, fmt.Sprint(string(l.Text), l.Since.Sub(start)))
	}
	if want := "a0s b0s c0s d2m0s"; strings.Join(got, " ") != want {
		t.Errorf("%v, want %s", got, want)
	}
}

// A file that is removed, or truncated, before its turn came.
func TestGoneUnread(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	write(t, log, "a\nb\nc\n", os.O_APPEND)
	r := open(t, log)
	if lines, behind := r.limited(3); len(lines) == 0 || !behind {
		t.Fatal(lines, behind)
	}
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	r.now = r.now.Add(time.Hour)
	lines, _ := r.limited(9)
	if len(lines) == 0 || string(lines[len(lines)-1].Text) != "c" || len(r.tail.Lost()) != 0 {
		t.Errorf("removed: %v", lines)
	}

	write(t, log, "aa\nbb\ncc\n", os.O_APPEND)
	if lines, behind := r.limited(4); len(lines) == 0 || !behind {
		t.Fatal(lines, behind)
	}
	write(t, log, "d\n", os.O_TRUNC)
	lines, _ = r.limited(9)
	if len(lines) != 1 || string(lines[0].Text) != "d" {
		t.Errorf("truncated: %v", lines)
	}
	if lost := r.tail.Lost(); !slices.Equal(lost, []string{log}) || len(r.tail.Lost()) != 0 {
		t.Errorf("lost %v, want %s once", lost, log)
	}
}
