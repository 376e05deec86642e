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
	if _, err := r.tail.Poll(func(path string, number int64, line []byte) {
		text := string(line)
		if len(text) > 20 {
			text = fmt.Sprint(len(text))
		}
		out = append(out, fmt.Sprint(filepath.Base(path), ":", number, ":", text))
	}, func(part []byte) { r.rest += len(part) }); err != nil {
		r.t.Fatal(err)
	}
	return strings.Join(out, " ")
}

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
		if _, err := f.Poll(func(_ string, _ int64, line []byte) { lines = append(lines, string(line)) }, nil); err != nil {
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
	if _, err := f.Poll(func(_ string, _ int64, line []byte) { got = append(got, string(line)) }, nil); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d lines, want %d", len(got), len(want))
	}
}
