package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/countersign/countersign/internal/terminal"
)

// What a host wrote neither acts on an operator's terminal nor makes a row.
func TestHostsTextInTables(t *testing.T) {
	var out strings.Builder
	table(&out, "ID REASON", func(row func(...any)) { row("l1", "x\x1b[2K\x1b[1Aevil\tTAB\nFAKE  row\u202e\u009b2J") })
	if lines := strings.Count(out.String(), "\n"); lines != 2 || strings.ContainsAny(out.String(), "\x1b\u202e\u009b") {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	fmt.Fprintf(terminal.Writer{W: &out}, "reason: %s\n", "x\x1b[2J\rgood")
	if out.String() != "reason: x\uFFFD[2J\uFFFDgood\n" {
		t.Errorf("%q", out.String())
	}
}
