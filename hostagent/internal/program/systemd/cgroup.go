// Package systemd finds programs that are units of the system manager.
//
// A unit is looked up over the manager's own socket: which process is its main
// one, which invocation it is in, and whether its control group is empty. What a
// program says of itself, its environment's INVOCATION_ID above all, is not
// looked at, and a user's manager is never asked.
package systemd

import (
	"path/filepath"
	"strings"
)

// serviceOf is the system manager's service that a control group is of. The
// groups of a user's manager lie below its own service, and are none.
func serviceOf(cgroup string) (string, bool) {
	name := filepath.Base(cgroup)
	if !strings.HasSuffix(name, ".service") || strings.HasPrefix(cgroup, "/user.slice/") || strings.Contains(filepath.Dir(cgroup), ".service/") || strings.HasSuffix(filepath.Dir(cgroup), ".service") {
		return "", false
	}
	return name, true
}

// UnitOf is the system manager's unit, a service's or a scope's, say, that a
// control group is of or lies in: the first name that is no slice. What a unit
// or a user's manager makes below its own group doesn't change it.
func UnitOf(cgroup string) string {
	for name := range strings.SplitSeq(cgroup, "/") {
		if name == "" || strings.HasSuffix(name, ".slice") {
			continue
		}
		if i := strings.LastIndexByte(name, '.'); i > 0 {
			return strings.TrimPrefix(name, "_") // the manager's escape
		}
		return ""
	}
	return ""
}
