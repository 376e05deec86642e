// Package notify runs the on_change commands of a credential: the check before a new
// credential is committed, and the notification of the program afterwards.
//
// It trusts the config's commands as far as root alone can change them: no other runs
// as root. A check runs as the files' owner, over copies that nobody can exchange. It promises
// that a signal reaches the process that was meant or none, that a command ends at its limit with
// all that it started, that one of another user than root leaves no process behind, and that
// nothing of what a command prints is kept: a check reads the secret.
package notify

import "errors"

// ErrEnded is Notify's answer where the program isn't there any more.
var ErrEnded = errors.New("the program has ended; its next start reads the new files")
