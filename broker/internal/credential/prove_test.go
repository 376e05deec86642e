package credential

import (
	"fmt"
	"slices"
	"testing"
)

func TestTheNewestSourcesAreKept(t *testing.T) {
	at := []string{"10.0.0.1"}
	before := at
	if got := withSource(at, "10.0.0.1"); !slices.Equal(got, at) {
		t.Errorf("the same address: %v", got)
	}
	at = withSource(withSource(at, "10.0.0.2"), "10.0.0.1")
	if !slices.Equal(at, []string{"10.0.0.2", "10.0.0.1"}) || !slices.Equal(before, []string{"10.0.0.1"}) {
		t.Errorf("back again: %v, was %v", at, before)
	}
	for i := range 40 {
		at = withSource(at, fmt.Sprint("192.0.2.", i))
	}
	if len(at) != 16 || at[15] != "192.0.2.39" || at[0] != "192.0.2.24" {
		t.Errorf("%v", at)
	}
}
