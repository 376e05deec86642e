// Package collect reads the kernel's list of measurements on a host. It is
// read after the quote was made, so that what the quote covers is in it.
package collect

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/countersign/countersign/attestors/ima"
)

// Path is where Linux shows the list, to root.
const Path = "/sys/kernel/security/ima/binary_runtime_measurements"

// Read reads the list at path from an offset on. A host without IMA has none:
// nil. A list shorter than the offset is of another boot; it is read whole,
// and the offset from which it was read is returned.
func Read(path string, offset int64) (list []byte, from int64, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("IMA list: %w", err)
	}
	defer func() { _ = f.Close() }()
	// The file has no size and no seeking behind its end: what is known is read
	// over.
	if skipped, err := io.CopyN(io.Discard, f, offset); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, fmt.Errorf("IMA list: %w", err)
	} else if skipped < offset {
		return Read(path, 0)
	}
	list, err = io.ReadAll(io.LimitReader(f, ima.MaxList+1-offset))
	if err != nil {
		return nil, 0, fmt.Errorf("IMA list: %w", err)
	}
	if offset+int64(len(list)) > ima.MaxList {
		return nil, 0, fmt.Errorf("IMA list: more than %d bytes since boot; an IMA policy that measures less, and a reboot, help", ima.MaxList)
	}
	return list, offset, nil
}
