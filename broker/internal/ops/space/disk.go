package space

import "golang.org/x/sys/unix"

// disk measures what is left for who isn't root: what is kept back for root is for
// mending.
func disk(dir string) (free, size uint64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, err
	}
	block := uint64(s.Bsize)
	return s.Bavail * block, s.Blocks * block, nil
}
