// Package collect looks at one running program on this host.
//
// It trusts the kernel's /proc, and reads one process through one descriptor
// of its folder, so that a pid that is reused meanwhile gives an error and
// never a mixture of two programs. Names that a program can choose for itself,
// argv and its environment, are not read at all.
package collect

import "errors"

// ErrGone says that the process ended, or that there never was one.
var ErrGone = errors.New("the process is gone")
