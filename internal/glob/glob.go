// Package glob is the one dialect of patterns for paths and names: doublestar's. *
// and ? stay inside one folder, ** is any number of folders, [a-z] a class, {a,b} an
// alternative, and \ takes the next character as it is. A ** beside other characters,
// as in /opt/**.so, is any characters, folders too.
//
// A pattern is an operator's or root's; what it is held against may be anybody's.
package glob

import (
	"fmt"
	"regexp"

	"github.com/bmatcuk/doublestar/v4"
)

// inner is a ** that isn't a whole folder's name.
var inner = regexp.MustCompile(`([^/{},]+)\*\*([^/{},]*)|\*\*([^/{},]+)`)

// A Pattern is one that was compiled. The zero value matches nothing.
type Pattern struct{ plain string } // ** is a whole folder's name in it

// Compile reads a pattern.
func Compile(pattern string) (Pattern, error) {
	plain := inner.ReplaceAllString(pattern, `{$1*$2$3,$1*/**/*$2$3}`)
	if pattern == "" || !doublestar.ValidatePattern(plain) {
		return Pattern{}, fmt.Errorf("%q is no glob", pattern)
	}
	return Pattern{plain}, nil
}

// Match reports whether a path or a name is as the pattern says.
func (p Pattern) Match(name string) bool {
	return p.plain != "" && doublestar.MatchUnvalidated(p.plain, name)
}
