// Package rootonly reports whether a command is safe to run as root: whether root alone can
// change what it runs.
//
// It trusts root, and what root mounted. It looks at what is open, one name after another from
// / down, and follows symlinks by itself, so that no folder on the way is left out.
package rootonly

import "fmt"

// A LooseError is returned for what others than root can change.
type LooseError struct {
	Path string
	Why  string
}

func (e *LooseError) Error() string { return fmt.Sprintf("%s %s", e.Path, e.Why) }
