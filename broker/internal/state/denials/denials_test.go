package denials_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// A bench is a store with its denial log.
type bench struct {
	*store.Store
	log    *denials.Log
	file   string
	signer note.Signer
	key    note.Verifier
}

func keys(t *testing.T) (note.Signer, note.Verifier) {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, "broker.example/audit")
	check.Nil(t, err)
	return check.Must(note.NewSigner(private))(t), check.Must(note.NewVerifier(public))(t)
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{Store: check.Must(storetest.Open(filepath.Join(dir, "store.db")))(t), file: filepath.Join(dir, "denials.log")}
	b.signer, b.key = keys(t)
	t.Cleanup(func() { check.Nil(t, b.log.Close(), b.Close()) })
	b.open(t)
	return b
}

// open opens the log as a broker does that starts.
func (b *bench) open(t *testing.T) denials.Contents {
	t.Helper()
	c, err := denials.Read(b.file, b.key)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	clock := func() time.Time { return noon }
	b.log = check.Must(denials.Open(t.Context(), b.Store, b.file, b.signer, c, slog.New(slog.NewTextHandler(io.Discard, nil)), clock, clock))(t)
	return c
}

func (b *bench) update(t *testing.T, change func(*store.Tx) error) {
	t.Helper()
	check.Nil(t, b.Update(context.Background(), nil, change))
}

func (b *bench) deny(t *testing.T, names ...string) {
	t.Helper()
	b.update(t, func(tx *store.Tx) error {
		for _, name := range names {
			if err := denials.Set(tx, denials.Denial{Kind: denials.Lease, Name: name, Until: noon.Add(time.Hour)}); err != nil {
				return err
			}
		}
		return nil
	})
}

// said is what the file says, as "name" or "-name" for one that is lifted.
func (b *bench) said(t *testing.T) string {
	t.Helper()
	var names []string
	for _, d := range check.Must(denials.Read(b.file, b.key))(t).Denials {
		if d.Lifted {
			d.Name = "-" + d.Name
		}
		names = append(names, d.Name)
	}
	return strings.Join(names, " ")
}

// What was denied is in the file before Update returns; the same said again adds nothing.
func TestADenialIsInTheFile(t *testing.T) {
	b := newBench(t)
	for i, c := range []struct {
		change func(*store.Tx) error
		want   string
	}{
		{func(*store.Tx) error { return nil }, ""},
		{func(tx *store.Tx) error { return denials.Set(tx, denials.Denial{Kind: denials.Host, Name: "a"}) }, "a"},
		{func(tx *store.Tx) error { return denials.Set(tx, denials.Denial{Kind: denials.Host, Name: "a"}) }, "a"},
		{func(tx *store.Tx) error { return denials.Set(tx, denials.Denial{Kind: denials.Operator, Name: "a"}) }, "a a"},
		{func(tx *store.Tx) error { return denials.Lift(tx, denials.Host, "b") }, "a a"},
		{func(tx *store.Tx) error { return denials.Lift(tx, denials.Host, "a") }, "a -a"},
		{func(tx *store.Tx) error { return denials.Lift(tx, denials.Host, "a") }, "a -a"},
		{func(tx *store.Tx) error { return denials.Set(tx, denials.Denial{Kind: denials.Host, Name: "a"}) }, "a a"},
	} {
		b.update(t, c.change)
		if got := b.said(t); got != c.want {
			t.Errorf("step %d: %q, want %q", i, got, c.want)
		}
	}
	lines := bytes.Count(check.Must(os.ReadFile(b.file))(t), []byte("\n"))
	if lines != 5 {
		t.Errorf("%d lines for 4 changes and the beginning", lines)
	}
	if err := b.Update(t.Context(), nil, func(tx *store.Tx) error {
		if err := denials.Set(tx, denials.Denial{Kind: denials.Host, Name: "undone"}); err != nil {
			return err
		}
		return io.ErrUnexpectedEOF
	}); err == nil || strings.Contains(b.said(t), "undone") {
		t.Errorf("an update that failed: %v, %s", err, b.said(t))
	}
}

// A file that was cut anywhere, or has a line that isn't the broker's, loses nothing of the
// other lines, and the broker writes what it lacks when it starts.
func TestADamagedFile(t *testing.T) {
	b := newBench(t)
	b.deny(t, "a")
	b.deny(t, "b", "c")
	whole := check.Must(os.ReadFile(b.file))(t)
	lines := bytes.SplitAfter(whole, []byte("\n"))
	check.Nil(t, b.log.Close())

	for name, c := range map[string]struct {
		text []byte
		want string
		bad  int
	}{
		"whole":               {whole, "a b c", 0},
		"none":                {nil, "", 0},
		"cut in its last":     {whole[:len(whole)-5], "a", 1},
		"without its newline": {whole[:len(whole)-1], "a", 1},
		"cut in its first":    {whole[:10], "", 1},
		"a line of garbage":   {bytes.Join([][]byte{lines[0], []byte("garbage\n"), lines[1], lines[2]}, nil), "a b c", 1},
		"a line too long":     {bytes.Join([][]byte{lines[0], append(bytes.Repeat([]byte("x"), 3<<20), '\n'), lines[1], lines[2]}, nil), "a b c", 1},
		"a changed line":      {bytes.Replace(whole, []byte(`"name":"a"`), []byte(`"name":"z"`), 1), "b c", 1},
		"a line less":         {bytes.Join([][]byte{lines[0], lines[2]}, nil), "b c", 0},
	} {
		check.Nil(t, os.WriteFile(b.file, c.text, 0o600))
		read, err := denials.Read(b.file, b.key)
		if name == "cut in its first" {
			if err == nil || !strings.Contains(err.Error(), "audit key") {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || b.said(t) != c.want || read.Bad != c.bad {
			t.Errorf("%s: %v, %q, %d bad; want %q, %d", name, err, b.said(t), read.Bad, c.want, c.bad)
		}
		b.open(t)
		if b.said(t) != "a b c" {
			t.Errorf("%s: after a start %q", name, b.said(t))
		}
		b.update(t, func(*store.Tx) error { return nil })
		check.Nil(t, b.log.Close())
	}
	check.Nil(t, os.Remove(b.file))
	b.open(t)
	if b.said(t) != "a b c" {
		t.Errorf("removed: after a start %q", b.said(t))
	}

	// Another key's lines are none.
	_, other := keys(t)
	if _, err := denials.Read(b.file, other); err == nil {
		t.Error("read by another broker")
	}
}

// Where the file can't be written, denials are taken all the same, and Behind says so until
// it can.
func TestAFullDisk(t *testing.T) {
	check.Root(t) // to mount
	b := newBench(t)
	b.deny(t, "before")
	check.Nil(t, b.log.Close())
	moved := t.TempDir()
	lab := filepath.Join(moved, "denials.log")
	mounted(t, moved, "64k")
	check.Nil(t, os.WriteFile(lab, check.Must(os.ReadFile(b.file))(t), 0o600))
	b.file = lab
	b.open(t)
	check.Nil(t, b.log.Behind())

	filler := filepath.Join(moved, "filler")
	for i := 0; ; i++ {
		f := check.Must(os.OpenFile(filler, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))(t)
		_, err := f.Write(make([]byte, 4096))
		check.Nil(t, f.Close())
		if err != nil {
			break
		}
	}
	for i := range 200 {
		b.deny(t, fmt.Sprint("full ", i))
	}
	if err := b.log.Behind(); err == nil || !strings.Contains(err.Error(), "nothing new is issued") {
		t.Errorf("on a full disk: %v", err)
	}
	if said := b.said(t); !strings.HasPrefix(said, "before") {
		t.Errorf("what was in the file is lost: %.80s", said)
	}
	check.Nil(t, os.Remove(filler))
	b.deny(t, "after")
	if err := b.log.Behind(); err != nil {
		t.Errorf("the disk has space again: %v", err)
	}
	if said := b.said(t); strings.Count(said, "full") != 200 || !strings.HasSuffix(said, "after") {
		t.Errorf("the file lacks denials: %.200s", said)
	}
}

// Many large denials at once are read again, those of one commit and those of a file that is
// written anew.
func TestManyLargeDenials(t *testing.T) {
	b := newBench(t)
	large := json.RawMessage(`{"reason":"` + strings.Repeat("x", 4000) + `"}`)
	b.update(t, func(tx *store.Tx) error {
		for i := range 700 {
			if err := denials.Set(tx, denials.Denial{Kind: denials.Host, Name: fmt.Sprint(i), Detail: large}); err != nil {
				return err
			}
		}
		return nil
	})
	for _, when := range []string{"appended", "written anew"} {
		if c := check.Must(denials.Read(b.file, b.key))(t); len(c.Denials) != 700 || c.Bad != 0 || b.log.Behind() != nil {
			t.Errorf("%s: %d denials, %d bad lines, %v", when, len(c.Denials), c.Bad, b.log.Behind())
		}
		check.Nil(t, b.log.Close(), os.Remove(b.file))
		b.open(t)
	}
}

// A file that appears after the start, as on a disk that was mounted late, is not overwritten.
func TestALateFile(t *testing.T) {
	b := newBench(t)
	b.deny(t, "a", "b")
	kept := check.Must(os.ReadFile(b.file))(t)
	check.Nil(t, b.log.Close())

	b.file = filepath.Join(t.TempDir(), "mounted later", "denials.log")
	b.open(t)
	if b.log.Behind() == nil {
		t.Error("a folder that isn't there is written to")
	}
	check.Nil(t, os.Mkdir(filepath.Dir(b.file), 0o700), os.WriteFile(b.file, kept, 0o600))
	b.deny(t, "c")
	if err := b.log.Behind(); err == nil || !strings.Contains(err.Error(), "restart") {
		t.Errorf("behind: %v", err)
	}
	if b.said(t) != "a b" {
		t.Errorf("the file says %q", b.said(t))
	}
	check.Nil(t, b.log.Close())
	b.open(t)
	if b.log.Behind() != nil || b.said(t) != "a b c" {
		t.Errorf("after a restart: %v, %q", b.log.Behind(), b.said(t))
	}
}
