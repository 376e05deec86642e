package main

import (
	"bytes"
	"strings"
	"testing"
)

// Each step, spoiled by an accident that it should notice, says so, ends the
// demo and makes it fail.
func TestEachStepCanFail(t *testing.T) {
	for _, s := range steps {
		t.Run(s.key, func(t *testing.T) {
			var out bytes.Buffer
			err := run(t.Context(), &out, s.key, false)
			t.Log(out.String())
			if err == nil {
				t.Fatal("passed, though it was spoiled")
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(lines) < 2 || !strings.HasSuffix(lines[len(lines)-1], ", 1 failed") {
				t.Fatalf("the last line is %q", lines[len(lines)-1])
			}
			if failed := lines[len(lines)-2]; !strings.HasPrefix(failed, "failed") || !strings.Contains(failed, s.what) {
				t.Errorf("failed elsewhere: %q", failed)
			}
		})
	}
}
