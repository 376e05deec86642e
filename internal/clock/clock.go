// Package clock is time that setting the wall clock doesn't move. Deadlines of
// leases run by it, on both sides: a clock that is stepped, by NTP or by
// mistake, ends no credential. Certificates are checked by the wall clock, as
// everybody else does.
package clock

import "time"

// Steady starts at the time start and goes on by the machine's own running
// time, sleep included.
func Steady(start time.Time) func() time.Time {
	begin := SinceBoot()
	start = start.Round(0) // without Go's own monotonic reading, which stops in sleep
	return func() time.Time { return start.Add(SinceBoot() - begin) }
}
