package clock_test

import (
	"testing"
	"time"

	"github.com/countersign/countersign/internal/clock"
)

func TestSteadyGoesOnFromItsStart(t *testing.T) {
	start := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	now := clock.Steady(start)
	first := now()
	if first.Before(start) {
		t.Errorf("%v is before its start", first)
	}
	time.Sleep(time.Millisecond)
	if second := now(); !second.After(first) {
		t.Errorf("%v, then %v", first, second)
	}
}
