package store

import (
	"context"
	"path/filepath"
	"testing"
)

// A statement is parsed once for a connection, and one that is being read can be run
// beside itself.
func TestStatementsAreKept(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, name := range []string{"a", "b"} {
		if err := s.Update(t.Context(), Everything(), func(tx *Tx) error {
			_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?)`, name, "x")
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}

	const all = `SELECT name FROM meta WHERE value = ? ORDER BY name`
	var seen string
	read := func(then func(tx *Tx) error) func(*Tx) error {
		return func(tx *Tx) error {
			return tx.Each(func(r Row) error {
				var name string
				if err := r.Scan(&name); err != nil {
					return err
				}
				seen += name
				return then(tx)
			}, all, "x")
		}
	}
	if err := s.Update(t.Context(), Everything(), read(read(func(*Tx) error { return nil }))); err != nil {
		t.Fatal(err)
	}
	if want := "aabbab"; seen != want {
		t.Errorf("read %s, want %s", seen, want)
	}

	conn, err := s.writer.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.Raw(func(driver any) error {
		c := driver.(*preparing)
		kept := c.statements[all]
		if again, err := c.prepared(context.Background(), all); err != nil || kept == nil || again != kept || kept.used {
			t.Errorf("the statement is %+v, kept is %+v, %v", again, kept, err)
		}
		if n := len(c.statements); n > 20 {
			t.Errorf("%d statements are kept after a few", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
