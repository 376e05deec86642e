//go:build !linux

package clock

import "time"

var started = time.Now()

// SinceBoot is how long this program has been running: an instant that is only
// good for differences.
func SinceBoot() time.Duration { return time.Since(started) }
