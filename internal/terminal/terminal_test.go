package terminal

import (
	"fmt"
	"strings"
	"testing"
)

func TestWriter(t *testing.T) {
	var out strings.Builder
	text := "größer\tx\x1b[2J\rgood\u202e\u009b2J\x07\nnext"
	if n, err := fmt.Fprint(Writer{&out}, text); err != nil || n != len(text) {
		t.Errorf("%d of %d bytes, %v", n, len(text), err)
	}
	if want := "größer\tx\uFFFD[2J\uFFFDgood\uFFFD\uFFFD2J\uFFFD\nnext"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
