package strictjson

import (
	"errors"
	"slices"
	"testing"
)

func TestKeys(t *testing.T) {
	for text, good := range map[string]bool{
		`{"a":1,"b":{"a":2}}`:               true,
		`[{"a":1},{"a":1}]`:                 true,
		`{"a":["a","a"],"b":"a"}`:           true,
		`{"a":1} {"a":1}`:                   true,
		`"a"`:                               true,
		`{"a":1,"a":1}`:                     false,
		`{"a":1,"A":1}`:                     false,
		`{"a":1,"\u0061":1}`:                false,
		`{"b":[{"a":{"x":1,"y":2,"x":3}}]}`: false,
		`{"a":1`:                            false,
		`{"a" 1}`:                           false,
	} {
		if err := Keys([]byte(text), func(_, _ string) error { return nil }); (err == nil) != good {
			t.Errorf("%s: %v", text, err)
		}
	}

	var seen []string
	err := Keys([]byte(`{"a":{"b":1},"c":[{"d":2}],"e":3}`), func(under, key string) error {
		seen = append(seen, under+"/"+key)
		return nil
	})
	if want := []string{"/a", "a/b", "/c", "c/d", "/e"}; err != nil || !slices.Equal(seen, want) {
		t.Errorf("%v, %v", seen, err)
	}
	odd := errors.New("odd")
	if err := Keys([]byte(`{"a":{"b":1}}`), func(under, _ string) error {
		if under == "a" {
			return odd
		}
		return nil
	}); !errors.Is(err, odd) {
		t.Errorf("%v", err)
	}
}
