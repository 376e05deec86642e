// Package collect reads the measured-boot logs of a host. They are read after
// the quote was made, and proven by its PCRs alone.
package collect

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/countersign/countersign/attestors/boot"
)

// Where Linux and systemd keep them; only root may read them.
const (
	EventLogPath     = "/sys/kernel/security/tpm0/binary_bios_measurements"
	UserspaceLogPath = "/run/log/systemd/tpm2-measure.log"
)

// Read reads a log whole; a host without it has none: nil.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("measured-boot log: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, boot.MaxLog+1))
	if err != nil {
		return nil, fmt.Errorf("measured-boot log: %w", err)
	}
	if len(b) > boot.MaxLog {
		return nil, fmt.Errorf("measured-boot log: %s has more than %d bytes", path, boot.MaxLog)
	}
	return b, nil
}
