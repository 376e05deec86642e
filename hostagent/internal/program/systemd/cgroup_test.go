package systemd

import "testing"

// A unit is the system manager's, whatever its processes or a user make below it.
func TestUnitOf(t *testing.T) {
	for cgroup, want := range map[string]string{
		"/system.slice/billing.service":                                     "billing.service",
		"/system.slice/billing.service/.control":                            "billing.service",
		"/system.slice/billing.service/payload/thief.service":               "billing.service",
		"/system.slice/system-getty.slice/getty@tty1.service":               "getty@tty1.service",
		"/user.slice/user-7.slice/user@7.service/app.slice/billing.service": "user@7.service",
		"/user.slice/user-7.slice/session-3.scope":                          "session-3.scope",
		"/init.scope":                   "init.scope",
		"/system.slice/_cgroup.service": "cgroup.service",
		"/system.slice":                 "", "/": "", "": "", "/lxc/payload/system.slice/a.service": "",
	} {
		if got := UnitOf(cgroup); got != want {
			t.Errorf("%s: %q, want %q", cgroup, got, want)
		}
	}
}
