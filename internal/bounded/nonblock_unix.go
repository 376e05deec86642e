//go:build unix

package bounded

import "syscall"

// nonblock has open return at once where a pipe has no writer.
const nonblock = syscall.O_NONBLOCK
