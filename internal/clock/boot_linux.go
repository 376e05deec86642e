package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// SinceBoot is how long the machine has been running.
func SinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // every kernel since 2.6.39 has it
	}
	return time.Duration(ts.Nano())
}
