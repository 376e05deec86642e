package secret

import "golang.org/x/sys/unix"

// ProtectProcess keeps what is in this process's memory out of core dumps, and
// from other programs' ptrace.
func ProtectProcess() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}
