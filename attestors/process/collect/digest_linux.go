package collect

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/countersign/countersign/attestors/evidence"
)

// maxExe bounds the file that is hashed.
const maxExe = 4 << 30

// A cacheKey changes whenever a file's content does: ctime can't be set back
// by anybody but the clock.
type cacheKey struct {
	dev, ino     uint64
	size         int64
	ctime, mtime syscall.Timespec
}

// A digestCache spares hashing the same file at every proof.
type digestCache struct {
	mu   sync.Mutex
	sums map[cacheKey]evidence.Digest // guarded by mu
}

// maxCached bounds the cache; a host runs few programs that have credentials.
const maxCached = 256

var digests = &digestCache{sums: map[cacheKey]evidence.Digest{}}

func keyOf(f *os.File) (cacheKey, error) {
	info, err := f.Stat()
	if err != nil {
		return cacheKey{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return cacheKey{}, fmt.Errorf("%s is not a regular file", f.Name())
	}
	if st.Size > maxExe {
		return cacheKey{}, fmt.Errorf("%s is larger than %d bytes", f.Name(), int64(maxExe))
	}
	return cacheKey{st.Dev, st.Ino, st.Size, st.Ctim, st.Mtim}, nil
}

func (c *digestCache) of(f *os.File) (evidence.Digest, error) {
	key, err := keyOf(f)
	if err != nil {
		return evidence.Digest{}, err
	}
	c.mu.Lock()
	sum, ok := c.sums[key]
	c.mu.Unlock()
	if ok {
		return sum, nil
	}
	h := sha256.New()
	// One that grows meanwhile is told by its key.
	if _, err := io.Copy(h, io.LimitReader(f, key.size+1)); err != nil {
		return evidence.Digest{}, err
	}
	after, err := keyOf(f)
	if err != nil {
		return evidence.Digest{}, err
	}
	if after != key {
		return evidence.Digest{}, errors.New("the program's file was written to while it was read")
	}
	sum = evidence.Digest(h.Sum(nil))
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sums) >= maxCached {
		clear(c.sums)
	}
	c.sums[key] = sum
	return sum, nil
}
