package glob_test

import (
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/internal/glob"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"/opt/app/*", "/opt/app/a.so", true},
		{"/opt/app/*", "/opt/app/lib/a.so", false},
		{"/opt/app/?.so", "/opt/app/a.so", true},
		{"/opt/app/?.so", "/opt/app//.so", false},
		{"/opt/**", "/opt/app/lib/a.so", true},
		{"/opt/**/a.so", "/opt/a.so", true},
		{"/opt/**/a.so", "/opt/x/y/a.so", true},
		{"/opt/**.so", "/opt/a.so", true},
		{"/opt/**.so", "/opt/x/y/a.so", true},
		{"/opt/**.so", "/opt/x/y/a.so.1", false},
		{"/opt/app**", "/opt/app", true},
		{"/opt/app**", "/opt/app-2/lib/a.so", true},
		{"/opt/app**", "/opt/ap", false},
		{"/opt/x**y/z", "/opt/x1/2y/z", true},
		{"/opt/x**y/z", "/opt/xy/z", true},
		{"/opt/x**y/z", "/opt/x1/2y/3/z", false},
		{"/opt/x**y**z", "/opt/x1/2y/3/z", true},
		{"/opt/{a,b}**", "/opt/a/lib/a.so", true},
		{"/opt/**{.so,.a}", "/opt/x/y.so", true},
		{"/opt/**{.so,.a}", "/opt/x/y.so.1", false},
		{`/opt/a\**`, "/opt/a*b", true},
		{`/opt/a\**`, "/opt/a*/b", false},
		{"/opt/[a**]x", "/opt/a/x", false},
		{"**/a.so", "a.so", true},
		{"**/a.so", "x/y/a.so", true},
		{"/opt/{**/a,b}.so", "/opt/x/y/a.so", true},
		{"/opt/{**/a,b}.so", "/opt/a.so", true},
		{"/opt/{x,{y,z/**}}/a", "/opt/z/1/2/a", true},
		{"/opt/{a,b}/*", "/opt/b/c", true},
		{"/opt/a,b", "/opt/a,b", true},
		{"v-[!a-c]*", "v-d1", true},
		{"v-[!a-c]*", "v-a1", false},
		{"/opt[!a-c]x", "/opt/x", false},
		{"/opt[^a-c]x", "/opt-x", true},
		{"v-[a-]", "v--", true},
		{`v-[\]]`, "v-]", true},
		{"v-[a-c]*", "v-b1", true},
		{"v-[a-c]*", "v-d1", false},
		{`a\*`, "a*", true},
		{`a\*`, "ab", false},
	} {
		pattern, err := glob.Compile(c.pattern)
		if err != nil {
			t.Error(err)
		}
		if got := pattern.Match(c.name); got != c.want {
			t.Errorf("%q on %q: %v", c.pattern, c.name, got)
		}
	}
	for _, pattern := range []string{"", "a[", "{a", "a}", "[]", "[z-a]", `a\`, `[\`, "[a-"} {
		if _, err := glob.Compile(pattern); err == nil {
			t.Errorf("%q is taken for a glob", pattern)
		}
	}
	if (glob.Pattern{}).Match("") {
		t.Error("no pattern matches")
	}
}

// What a pattern is held against may be made to be slow.
func TestMatchInBoundedTime(t *testing.T) {
	for _, sign := range []string{"/a**", "/**/a*", "{a,/}", "*a", "/*/**"} {
		pattern, err := glob.Compile(strings.Repeat(sign, 64) + "/x")
		if err != nil {
			t.Fatal(err)
		}
		name := strings.Repeat("/aaa", 1000) + "y/x"

		done := make(chan bool)
		go func() { done <- pattern.Match(name) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Errorf("64 times %q takes longer than 10 s", sign)
		}
	}
}
