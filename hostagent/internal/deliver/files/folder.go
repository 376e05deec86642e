package files

import (
	"errors"
	"io"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/secret"
)

// A folder is an open folder of the host. Its operations stay in that folder even if its
// path is replaced, take names of entries in it, and follow no symlinks. Errors wrap
// fs.ErrNotExist and fs.ErrExist; explain turns them into advice.
type folder interface {
	// look reports whether a regular file has the name. It fails if the name belongs to
	// something else.
	look(name string) (bool, error)
	// present reports whether anything has the name.
	present(name string) (bool, error)
	// write creates a file with the content, owner and mode of f, after removing what had
	// the name. Content and attributes are durable on return, the name only after sync.
	// Until Close, the file is held open, so that no other can be mistaken for it; it isn't
	// open for writing.
	write(name string, data secret.Bytes, f *config.File) (io.Closer, error)
	// mark creates an empty file, after removing what had the name.
	mark(name string) error
	// is reports whether name is the file that write returned as held.
	is(name string, held io.Closer) bool
	// link gives a file a second name, after removing what had that name.
	link(name, second string) error
	// rename renames from to to atomically, replacing what had that name.
	rename(from, to string) error
	// renameNew is rename, but fails if something has the name to. Not every file system
	// can guarantee that.
	renameNew(from, to string) error
	// remove removes a name. It succeeds if nothing has the name.
	remove(name string) error
	// read returns the content of a file, if it is still as write made it for f.
	read(name string, f *config.File) (secret.Bytes, error)
	// sync makes all changes of names durable.
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
