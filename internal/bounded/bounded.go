// Package bounded reads files that a person names on a command line. They may be
// anything: too large, a pipe that nobody writes to, a folder. It trusts none of
// them, and promises to return: it reads no more than it was told, and waits for no
// writer to open a pipe.
package bounded

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
)

// ReadFile returns what the file holds, or an error if that is more than most
// bytes. A pipe whose writer has it open is read to its end.
func ReadFile(name string, most int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|nonblock, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()

	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s: more than %d bytes", name, most)
	}
	return b, nil
}

// Text returns a peer's text in a form that can be stored and shown: its first most bytes,
// followed by … if there are more, with U+FFFD instead of unprintable characters.
func Text(s string, most int) string {
	end := ""
	if len(s) > most {
		s, end = strings.ToValidUTF8(s[:most], ""), "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s) + end
}
