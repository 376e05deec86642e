package notify

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/account"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/rootonly"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/secret"
)

// maxSiblings bounds how many names of a folder a check sees beside a copy.
const maxSiblings = 1024

// Copies are the new files of a credential as its check sees them:
//
//	RUN_DIR/check/CREDENTIAL/0/NAME   a copy that the check's user can read
//	RUN_DIR/check/CREDENTIAL/0/…      symlinks to what stands beside the file
//
// with a number for each folder of files. The folders are root's, so that no other file can be
// put in a copy's place. The name is the file's own, and what it includes from beside it is found.
type copies struct {
	base  string
	paths []string // in the order of the config's files
}

func checkFolder(runDir string) string { return filepath.Join(runDir, "check") }

// Clean removes what checks of an agent left that was killed.
func Clean(runDir string) error { return os.RemoveAll(checkFolder(runDir)) }

// copyFiles writes the contents where only the user as can read them.
func copyFiles(runDir string, c *config.Credential, as account.Account, contents []secret.Bytes) (_ *copies, err error) {
	all := checkFolder(runDir)
	out := &copies{base: filepath.Join(all, c.Name)}
	if err := os.MkdirAll(all, 0o711); err != nil {
		return nil, err
	}
	if err := os.Chmod(all, 0o711); err != nil { // whatever the umask is
		return nil, err
	}
	if err := os.RemoveAll(out.base); err != nil { // a check that was killed left it
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.remove())
		}
	}()
	if err := folderFor(out.base, as); err != nil {
		return nil, err
	}

	folders := map[string]string{} // of the files: of their copies
	for i, f := range c.Files {
		dir, name := filepath.Split(f.Path)
		if folders[dir] == "" {
			folders[dir] = filepath.Join(out.base, strconv.Itoa(len(folders)))
			if err := folderFor(folders[dir], as); err != nil {
				return nil, err
			}
		}
		path := filepath.Join(folders[dir], name)
		if err := copyFor(path, as, contents[i]); err != nil {
			return nil, err
		}
		out.paths = append(out.paths, path)
	}
	for dir, of := range folders {
		siblings(dir, of, as.UID == 0)
	}
	return out, nil
}

// folderFor makes a folder of root's that only the user can look into.
func folderFor(path string, as account.Account) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if as.UID == os.Geteuid() {
		return nil
	}
	return errors.Join(os.Chown(path, 0, as.GID), os.Chmod(path, 0o750))
}

func copyFor(path string, as account.Account, content secret.Bytes) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content.Reveal())
	if as.UID != os.Geteuid() {
		err = errors.Join(err, f.Chown(as.UID, as.GID))
	}
	return errors.Join(err, f.Chmod(0o400), f.Close())
}

// siblings links to what stands in dir, as far as nothing of the name is in of. A check works
// without them. One of root's sees only what root alone can change.
func siblings(dir, of string, rootsOnly bool) {
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer func() { _ = d.Close() }()
	names, _ := d.Readdirnames(maxSiblings)
	for _, name := range names {
		path := filepath.Join(dir, name)
		if strings.Contains(name, ".countersign-") || rootsOnly && rootonly.Alone(path) != nil {
			continue
		}
		_ = os.Symlink(path, filepath.Join(of, name)) // a copy has the name already
	}
}

// unchanged fails if a copy isn't what was written: its user can change it, and a check of
// something else than what is delivered means nothing.
func (c *copies) unchanged(contents []secret.Bytes) error {
	for i, path := range c.paths {
		b, err := bounded.ReadFile(path, int64(contents[i].Len()))
		if err != nil || !bytes.Equal(b, contents[i].Reveal()) {
			return fmt.Errorf("%s was changed while it was checked", path)
		}
	}
	return nil
}

// remove removes the copies. They are emptied first: their user may have given them another name.
func (c *copies) remove() error {
	var errs []error
	for _, path := range c.paths {
		if err := unix.Truncate(path, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("empty %s: %w", path, err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(c.base))...)
}
