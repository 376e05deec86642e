// Package durable keeps the agent's own state: small files, root's alone, each
// always the complete old or the complete new one.
//
// It trusts the folder, which only root can write to. What others read, where
// others may write, is package deliver's.
package durable

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// maxFile bounds what Read takes in.
const maxFile = 1 << 20

// Write replaces the file path by data, mode 0600:
//
//	open(tmp, O_CREAT|O_EXCL), write, fsync, rename(tmp, path), fsync(folder)
func Write(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".new-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tmp.Close(), os.Remove(tmp.Name()))
		}
	}()
	if _, err := tmp.Write(data); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	// From here on path is the new file, whatever else fails.
	closeErr := tmp.Close()
	return errors.Join(closeErr, SyncDir(dir))
}

// Remove deletes the file path, if it is there.
func Remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Read is the file path; os.ErrNotExist where there is none.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return b, err
}
