package checkpoint_test

import (
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/internal/checkpoint"
)

func keys(t testing.TB, broker string) (note.Signer, note.Verifier) {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, checkpoint.KeyName(broker))
	if err != nil {
		t.Fatal(err)
	}
	s, err := note.NewSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	v, err := note.NewVerifier(public)
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

func TestOpenReadsWhatSignWrites(t *testing.T) {
	s, v := keys(t, "b")
	want := checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 77, Root: [32]byte{1, 2, 3}}
	signed, err := want.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	got, err := checkpoint.Open(signed, v)
	if err != nil || got != want {
		t.Fatalf("%+v, %v; want %+v", got, err, want)
	}
	_, other := keys(t, "b")
	if _, err := checkpoint.Open(signed, other); err == nil {
		t.Error("opened by another key")
	}
	if _, err := checkpoint.Open([]byte(strings.Replace(string(signed), "77", "78", 1)), v); err == nil {
		t.Error("opened with another size")
	}
	// Signed by the right key, and still not a checkpoint.
	for _, text := range []string{"countersign lease\n{}\n", "countersign/b/2\n077\nAQID\n", "countersign/b/-1\n7\nAQID\n", "countersign/b/2\n7\n"} {
		n, err := note.Sign(&note.Note{Text: text}, s)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := checkpoint.Open(n, v); err == nil {
			t.Errorf("%q was read as %+v", text, c)
		}
	}
}

func TestFollows(t *testing.T) {
	old := checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 7, Root: [32]byte{1}}
	for _, tt := range []struct {
		name  string
		next  checkpoint.Checkpoint
		fresh bool
		ok    bool
	}{
		{"itself", old, false, true},
		{"a new epoch", checkpoint.Checkpoint{Broker: "b", Epoch: 3, Size: 2}, true, true},
		{"an older epoch", checkpoint.Checkpoint{Broker: "b", Epoch: 1, Size: 9}, false, false},
		{"smaller", checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 6}, false, false},
		{"another tree of that size", checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 7, Root: [32]byte{2}}, false, false},
		{"larger without a proof", checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 8}, false, false},
		{"another broker", checkpoint.Checkpoint{Broker: "c", Epoch: 2, Size: 8}, false, false},
	} {
		fresh, err := tt.next.Follows(old, nil)
		if fresh != tt.fresh || (err == nil) != tt.ok {
			t.Errorf("%s: %v, %v", tt.name, fresh, err)
		}
		if !tt.ok && tt.next.Broker == "b" && !errors.Is(err, checkpoint.ErrRolledBack) {
			t.Errorf("%s: %v, want ErrRolledBack", tt.name, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	s, v := keys(f, "b")
	signed, err := checkpoint.Checkpoint{Broker: "b", Epoch: 1, Size: 3}.Sign(s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := checkpoint.Open(b, v)
		if err != nil {
			return
		}
		if again, err := c.Sign(s); err != nil || !strings.HasPrefix(string(b), strings.SplitN(string(again), "\n\n", 2)[0]) {
			t.Errorf("%q was read as %+v", b, c)
		}
	})
}

// An acknowledgement is of one broker's epoch, and no other note passes for one.
func TestAcknowledgements(t *testing.T) {
	s, v := keys(t, "b")
	want := checkpoint.Acknowledgement{Broker: "b", Epoch: 3, Operator: "alice"}
	signed, err := want.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := checkpoint.OpenAcknowledgement(signed, v); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	head, err := checkpoint.Checkpoint{Broker: "b", Epoch: 3}.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	_, stranger := keys(t, "b")
	for name, c := range map[string]struct {
		note []byte
		key  note.Verifier
	}{
		"a checkpoint":  {head, v},
		"another key's": {signed, stranger},
		"changed":       {[]byte(strings.Replace(string(signed), "b/3", "b/4", 1)), v},
		"none":          {nil, v},
		"too long":      {[]byte(strings.Repeat("x", 5000)), v},
	} {
		if got, err := checkpoint.OpenAcknowledgement(c.note, c.key); err == nil {
			t.Errorf("%s: read as %+v", name, got)
		}
	}
	if _, err := checkpoint.Open(signed, v); err == nil {
		t.Error("an acknowledgement was read as a checkpoint")
	}
}
