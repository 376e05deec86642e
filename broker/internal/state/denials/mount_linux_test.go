package denials_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/test/check"
)

// mounted puts a file system of this size on dir.
func mounted(t *testing.T, dir, size string) {
	t.Helper()
	check.Nil(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { check.Nil(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}
