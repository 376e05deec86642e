package bounded_test

import (
	"testing"

	"github.com/countersign/countersign/internal/bounded"
)

func TestText(t *testing.T) {
	for s, want := range map[string]string{
		"": "", "abcdef": "abcdef", "abcdefg": "abcdef…", "abcdeü": "abcde…",
		"a\nb": "a\uFFFDb", "a\x1b[1m": "a\uFFFD[1m", "a\xffb": "a\uFFFDb", "ü\u202eb": "ü\uFFFDb",
	} {
		if got := bounded.Text(s, 6); got != want {
			t.Errorf("%q becomes %q, want %q", s, got, want)
		}
	}
}
