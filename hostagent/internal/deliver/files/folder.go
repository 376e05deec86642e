package files

import (
	"errors"
	"io"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// A folder is one folder of the host, held open: whatever its path comes to mean
// later, its operations stay in it. Names are of entries in it. No operation
// follows a symlink. Errors wrap fs.ErrNotExist and fs.ErrExist where they mean
// that; explain makes of them what a person reads.
type folder interface {
	// look reports whether a file stands under a name; an error where something
	// else does.
	look(name string) (bool, error)
	// present reports whether anything stands under a name.
	present(name string) (bool, error)
	// write makes a file with the content, owner and mode of f. What stood there
	// is removed. Content and attributes are on disk then, the name not yet. The
	// file is held until Close, and not for writing: no other one can be taken
	// for it.
	write(name string, data secret.Bytes, f *config.File) (io.Closer, error)
	// mark makes an empty file in the place of what stood there.
	mark(name string) error
	// is reports whether name is a file that write returned.
	is(name string, held io.Closer) bool
	// link gives a file a second name; what stood there is removed.
	link(name, second string) error
	// rename puts from in to's place, in one step.
	rename(from, to string) error
	// renameNew is rename to a name that nothing has, as far as the file system
	// can hold to that.
	renameNew(from, to string) error
	// remove removes a name; a missing one is fine.
	remove(name string) error
	// read returns a file's content, if it still is as write made it for f.
	read(name string, f *config.File) (secret.Bytes, error)
	// sync returns when all that was done to names is on disk.
	sync() error
	Close() error
}

var (
	errSymlink    = errors.New("is a symlink, and symlinks are not followed here: name the place itself in the config, or remove the symlink")
	errNotRegular = errors.New("is there and is not a regular file: remove it")
	errReplaced   = errors.New("somebody put another file in the new one's place")
)

// step is called between a folder's operations by the tests that die there.
var step = func(string) {}
