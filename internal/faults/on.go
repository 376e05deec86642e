//go:build faults

package faults

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The environment of a faults build:
//
//	COUNTERSIGN_CLOCK_FILE  a file that holds the seconds to add to the clock
//	COUNTERSIGN_KILL_AT     NAME or NAME:N, the point (and its N-th passing) to die at
//	COUNTERSIGN_KILL_MARK   a file that is made just before dying there
const (
	clockFile = "COUNTERSIGN_CLOCK_FILE"
	killAt    = "COUNTERSIGN_KILL_AT"
	killMark  = "COUNTERSIGN_KILL_MARK"
)

var passes = make(chan map[string]int, 1)

func init() { passes <- map[string]int{} }

// Now is the wall clock, stepped by what COUNTERSIGN_CLOCK_FILE says.
func Now() time.Time {
	now := time.Now()
	name := os.Getenv(clockFile)
	if name == "" {
		return now
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return now
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return now
	}
	return now.Round(0).Add(time.Duration(seconds) * time.Second)
}

// Point kills the process by SIGKILL when it is the one that was asked for.
func Point(name string) {
	want, nth, found := strings.Cut(os.Getenv(killAt), ":")
	if want != name {
		return
	}
	n := 1
	if found {
		n, _ = strconv.Atoi(nth)
	}
	counts := <-passes
	counts[name]++
	hit := counts[name] == n
	passes <- counts
	if !hit {
		return
	}
	if mark := os.Getenv(killMark); mark != "" {
		_ = os.WriteFile(mark, []byte(name), 0o600)
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
