// Package durable keeps a program's own state: files that are its user's alone, each
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
//	open(tmp, O_CREAT|O_TRUNC), write, fsync, close, rename(tmp, path), fsync(folder)
//
// The name of tmp is path's own, and it is opened for writing alone: IMA may
// measure what root reads, by its name. One path has one writer.
func Write(path string, data []byte) (err error) {
	dir, name := filepath.Split(path)
	tmp := filepath.Join(dir, ".new-"+name)
	if err := write(tmp, data); err != nil {
		return errors.Join(err, Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, Remove(tmp))
	}
	return SyncDir(filepath.Dir(path))
}

func write(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Copy copies a file to a new one, mode 0600, or leaves none.
func Copy(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, os.Remove(to))
	}
	return SyncDir(filepath.Dir(to))
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
