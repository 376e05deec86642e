package glob_test

import (
	"testing"

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
		{"/opt/{a,b}/*", "/opt/b/c", true},
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
	for _, pattern := range []string{"", "a[", "{a"} {
		if _, err := glob.Compile(pattern); err == nil {
			t.Errorf("%q is taken for a glob", pattern)
		}
	}
	if (glob.Pattern{}).Match("") {
		t.Error("no pattern matches")
	}
}
