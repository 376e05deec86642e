package check

import (
	"bytes"
	"os"
	"strconv"
	"testing"
)

// Root is for tests that need what only root may: other users, mounts, namespaces.
// Without it they are skipped, by `make unit` on a developer's machine; `make test` counts
// a skipped test as failed.
func Root(t testing.TB) {
	t.Helper()
	if !isRoot() {
		t.Skip("needs root, with CAP_SYS_ADMIN")
	}
}

// isRoot says whether the process has CAP_SYS_ADMIN, which containers' root often lacks.
func isRoot() bool {
	const sysAdmin = 21
	status, _ := os.ReadFile("/proc/self/status") // none: not Linux
	for line := range bytes.Lines(status) {
		if hex, ok := bytes.CutPrefix(line, []byte("CapEff:\t")); ok {
			caps, err := strconv.ParseUint(string(bytes.TrimSpace(hex)), 16, 64)
			return err == nil && caps>>sysAdmin&1 == 1 && os.Geteuid() == 0
		}
	}
	return false
}
