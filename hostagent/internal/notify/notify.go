// Package notify runs what a config says of a credential's change: the check of
// what is staged, before it counts, and the telling of the program, after.
//
// It trusts the config's commands. It promises that a signal reaches the
// process that was meant or none, that a command ends at its limit with all
// that it started, and that nothing of what a command prints is kept: a check
// reads the secret.
package notify

import "errors"

// ErrEnded is Notify's answer where the program isn't there any more.
var ErrEnded = errors.New("the program has ended; its next start reads the new files")
