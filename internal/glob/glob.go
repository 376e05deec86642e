// Package glob matches paths and names against patterns: one dialect for scopes, IMA
// policies and the watch.
//
//   - any characters within one folder
//     ?        one character other than /
//     **       any number of folders; beside other characters, as in /opt/**.so, any characters
//     [a-z]    one of these characters
//     [!a-z]   one other character than these and /
//     {a,b}    a or b
//     \x       the character x itself
//
// Operators and root write patterns; the names may come from anybody. Matching takes time
// linear in the name's length, whatever pattern and name are.
package glob

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// A Pattern is a compiled pattern. The zero value matches nothing.
type Pattern struct {
	prefix, suffix string // the literal ends, which are compared first: it is faster
	whole          *regexp.Regexp
}

const signs = `*?[]{},\`

// Compile reads a pattern.
func Compile(pattern string) (Pattern, error) {
	t := translation{text: pattern}
	for t.at < len(pattern) {
		if err := t.next(); err != nil {
			return Pattern{}, fmt.Errorf("%q is not a valid pattern: %w", pattern, err)
		}
	}
	if pattern == "" || len(t.open) > 0 {
		return Pattern{}, fmt.Errorf("%q is not a valid pattern: it is empty, or has a { without }", pattern)
	}

	// The / beside a ** may be missing with it.
	prefix := strings.TrimSuffix(pattern[:strings.IndexAny(pattern+"*", signs)], "/")
	suffix := strings.TrimPrefix(pattern[strings.LastIndexAny(pattern, signs)+1:], "/")
	whole, err := regexp.Compile(`(?s)^(?:` + t.out.String() + `)$`)
	if err != nil {
		return Pattern{}, fmt.Errorf("%q is not a valid pattern: %w", pattern, err)
	}
	return Pattern{prefix, suffix, whole}, nil
}

// Match reports whether a path or a name is as the pattern says.
func (p Pattern) Match(name string) bool {
	return p.whole != nil && strings.HasPrefix(name, p.prefix) && strings.HasSuffix(name, p.suffix) && p.whole.MatchString(name)
}

// A translation turns a pattern into a regular expression, which RE2 matches in linear
// time.
type translation struct {
	text string
	at   int // where the untranslated rest begins
	place
	open []place // one for each { that isn't closed, as it was in front of it
	out  strings.Builder
}

// A place is the character in front of the rest. It decides what ** means.
type place struct {
	before byte
	inside bool // false: there is none
}

// next translates one sign or character.
func (t *translation) next() error {
	rest := t.text[t.at:]
	switch c := rest[0]; {
	case rest == "/**":
		t.put(rest, `(?:/.*)?`)
	case strings.HasPrefix(rest, "**"):
		stars := rest[:len(rest)-len(strings.TrimLeft(rest, "*"))]
		if whole := !t.inside || t.before == '/'; whole && strings.HasPrefix(rest, "**/") {
			t.put("**/", `(?:.*/)?`)
		} else {
			t.put(stars, `.*`)
		}
	case c == '*':
		t.put("*", `[^/]*`)
	case c == '?':
		t.put("?", `[^/]`)
	case c == '[':
		return t.class()
	case c == '{':
		t.open = append(t.open, t.place)
		t.out.WriteString(`(?:`)
		t.at++
	case c == ',' && len(t.open) > 0:
		t.place = t.open[len(t.open)-1]
		t.out.WriteString(`|`)
		t.at++
	case c == '}':
		if len(t.open) == 0 {
			return errors.New("a } without {")
		}
		t.open = t.open[:len(t.open)-1]
		t.put("}", `)`)
	case c == '\\':
		if len(rest) == 1 {
			return errors.New(`nothing is behind \`)
		}
		t.at++
		t.literal()
	default:
		t.literal()
	}
	return nil
}

// put translates some of the text.
func (t *translation) put(text, as string) {
	t.out.WriteString(as)
	t.at += len(text)
	t.place = place{text[len(text)-1], true}
}

// literal translates a character that stands for itself.
func (t *translation) literal() {
	one := first(t.text[t.at:])
	t.put(one, regexp.QuoteMeta(one))
}

// class translates [a-z].
func (t *translation) class() error {
	var out strings.Builder
	out.WriteString(`[`)
	rest := t.text[t.at+1:]
	if rest != "" && strings.Contains("!^", rest[:1]) {
		out.WriteString(`^/`)
		rest = rest[1:]
	}
	for n := 0; ; n++ {
		switch {
		case rest == "":
			return errors.New("a [ without ]")
		case rest[0] == ']' && n == 0:
			return errors.New("an empty class")
		case rest[0] == ']':
			out.WriteString(`]`)
			t.put(t.text[t.at:len(t.text)-len(rest)+1], out.String())
			return nil
		case rest[0] == '-' && n > 0 && !strings.HasPrefix(rest, "-]"):
			out.WriteString(`-`)
			rest = rest[1:]
			continue
		case rest[0] == '\\':
			if rest = rest[1:]; rest == "" {
				return errors.New(`nothing is behind \`)
			}
		}
		one := first(rest)
		fmt.Fprintf(&out, `\x{%x}`, []rune(one)[0])
		rest = rest[len(one):]
	}
}

// first is the first character of a text.
func first(s string) string {
	for i := range s {
		if i > 0 {
			return s[:i]
		}
	}
	return s
}
