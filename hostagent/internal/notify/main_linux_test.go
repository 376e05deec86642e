package notify

import (
	"fmt"
	"os"
	"testing"
)

// Run with this set, the test binary is a test's child.
const childMode = "COUNTERSIGN_NOTIFY_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childMode) == "" {
		os.Exit(m.Run())
	}
	if err := notifyChild(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
