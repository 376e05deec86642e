// Package terminal writes text for a person, parts of which somebody else wrote: a
// host, a log, a server on the network. It promises that no character of it acts
// on the terminal or changes the order in which the text is read.
package terminal

import (
	"io"
	"strings"
	"unicode"
)

// A Writer replaces what isn't printable, but for line ends and tabs. One Write
// holds whole characters.
type Writer struct{ W io.Writer }

func (t Writer) Write(p []byte) (int, error) {
	lines := strings.Split(string(p), "\n")
	for i, line := range lines {
		lines[i] = Printable(line)
	}
	if _, err := io.WriteString(t.W, strings.Join(lines, "\n")); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Printable returns one line's text, with U+FFFD for what isn't printable.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\t' {
			return r
		}
		return '\uFFFD'
	}, s)
}
