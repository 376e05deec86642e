package main

import (
	"strings"
	"testing"
)

// Text of somebody else's, such as a file's name or a server's words, doesn't act
// on the terminal.
func TestErrorsAreText(t *testing.T) {
	var out, errs strings.Builder
	if code := run(t.Context(), []string{"status", "-c", "/nowhere/\x1b]0;owned\x07"}, &out, &errs); code == 0 {
		t.Error("a config that isn't there is read")
	}
	if text := out.String() + errs.String(); strings.ContainsAny(text, "\x1b\x07") || !strings.Contains(text, "/nowhere/") {
		t.Errorf("%q", text)
	}
}
