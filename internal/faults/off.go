//go:build !faults

package faults

import "time"

// Now is the wall clock.
func Now() time.Time { return time.Now() }

// Point does nothing.
func Point(string) {}
