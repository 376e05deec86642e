// Package instance finds the program that a credential is for, and notices
// when one run of it ends and the next begins.
//
// A unit is looked up at the system manager, over its own socket: which
// process is its main one, which invocation it is in, and whether its control
// group is empty. What a program says of itself, its environment's
// INVOCATION_ID above all, is not looked at, and a user's manager is never
// asked. The package only tells; what follows from it is others' to decide.
package instance

import "errors"

// ErrNotRunning says that no process answers to the description.
var ErrNotRunning = errors.New("the program does not run")
