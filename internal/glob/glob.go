// Package glob is the one dialect of patterns for paths and names. * and ? stay inside
// one folder, ** is any number of folders, [a-z] a class and [!a-z] what is not in it,
// {a,b} an alternative, and \ takes the next character as it is. A ** beside other
// characters, as in /opt/**.so, is any characters, folders too.
//
// A pattern is an operator's or root's; what it is held against may be anybody's, and is
// matched in time that grows with its length and the pattern's, however these are made.
package glob

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// A Pattern is one that was compiled. The zero value matches nothing.
type Pattern struct {
	prefix, suffix string // around all signs; told sooner than the whole
	whole          *regexp.Regexp
}

const signs = `*?[]{},\`

// Compile reads a pattern.
func Compile(pattern string) (Pattern, error) {
	t := translation{text: pattern}
	for err := error(nil); t.at < len(pattern); {
		if err = t.next(); err != nil {
			return Pattern{}, fmt.Errorf("%q is no glob: %w", pattern, err)
		}
	}
	if pattern == "" || len(t.open) > 0 {
		return Pattern{}, fmt.Errorf("%q is no glob: it is empty, or has a { without }", pattern)
	}

	// The / beside a ** may be missing with it.
	prefix := strings.TrimSuffix(pattern[:strings.IndexAny(pattern+"*", signs)], "/")
	suffix := strings.TrimPrefix(pattern[strings.LastIndexAny(pattern, signs)+1:], "/")
	whole, err := regexp.Compile(`(?s)^(?:` + t.out.String() + `)$`)
	if err != nil {
		return Pattern{}, fmt.Errorf("%q is no glob: %w", pattern, err)
	}
	return Pattern{prefix, suffix, whole}, nil
}

// Match reports whether a path or a name is as the pattern says.
func (p Pattern) Match(name string) bool {
	return p.whole != nil && strings.HasPrefix(name, p.prefix) && strings.HasSuffix(name, p.suffix) && p.whole.MatchString(name)
}

// A translation is of a pattern into a regular expression, which is matched in linear time.
type translation struct {
	text   string
	at     int  // of what is to be translated
	before byte // what stands there in front of it; 0: nothing, or one of several
	inside bool // before is one
	open   []place
	out    strings.Builder
}

// A place is what stands in front of a { that is open.
type place struct {
	before byte
	inside bool
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
		t.open = append(t.open, place{t.before, t.inside})
		t.out.WriteString(`(?:`)
		t.at++
	case c == ',' && len(t.open) > 0:
		was := t.open[len(t.open)-1]
		t.before, t.inside = was.before, was.inside
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
	t.before, t.inside = text[len(text)-1], true
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
		out.WriteString(`^`)
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
