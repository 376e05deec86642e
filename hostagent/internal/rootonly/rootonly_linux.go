package rootonly

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxSymlinks     = 40 // as the kernel
	maxInterpreters = 5  // as the kernel
	maxFirstLine    = 256
)

// Command fails with a [LooseError] if others than root can change the program of argv, the
// interpreter of a script, a file or folder that the arguments name, or a folder on the way to
// one of these. Names in the arguments that don't exist are let be.
func Command(argv []string) error {
	program := argv[0]
	for range maxInterpreters {
		f, err := open(program)
		if err != nil {
			return err
		}
		line, err := firstLine(f)
		_ = f.Close()
		if err != nil {
			return err
		}
		script, ok := strings.CutPrefix(line, "#!")
		if !ok {
			return arguments(argv[1:])
		}
		words := strings.Fields(script)
		if len(words) == 0 || !path.IsAbs(words[0]) {
			return &LooseError{program, "names no interpreter by an absolute path in its first line"}
		}
		if err := arguments(words[1:]); err != nil {
			return err
		}
		program = words[0]
	}
	return &LooseError{argv[0], "has too many interpreters"}
}

// Alone fails with a [LooseError] if others than root can change a file, or what stands in a
// folder, or where the name leads to.
func Alone(name string) error {
	f, err := walk(name)
	if err != nil {
		return err
	}
	return f.Close()
}

// named finds paths inside an argument: of --config=/x, a:/x and sh -c '. /x; y'.
var named = regexp.MustCompile("/[^\\s\"'`=:;,|&<>(){}$*?\\[\\]]+")

func arguments(args []string) error {
	for _, arg := range args {
		paths := named.FindAllString(arg, -1)
		if i := strings.IndexByte(arg, '/'); i >= 0 {
			paths = append(paths, arg[i:]) // one with a space, or another of what ends a name
		}
		if !strings.HasPrefix(arg, "/") && !strings.HasPrefix(arg, "-") {
			paths = append(paths, "/"+arg) // commands run in /
		}
		for _, p := range paths {
			var loose *LooseError
			if err := Alone(p); errors.As(err, &loose) {
				return err
			}
		}
	}
	return nil
}

// open returns the regular file name, open for reading.
func open(name string) (*os.File, error) {
	handle, err := walk(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = handle.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(handle.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is no regular file", name)
	}
	return os.Open("/proc/self/fd/" + strconv.Itoa(int(handle.Fd())))
}

// firstLine is the beginning of a file as far as the kernel reads it for an interpreter.
func firstLine(f *os.File) (string, error) {
	b := make([]byte, maxFirstLine)
	n, err := io.ReadFull(f, b)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return "", err
	}
	line, _, _ := bytes.Cut(b[:n], []byte("\n"))
	return string(line), nil
}

// A place is an open name, and the way by which it was reached.
type place struct {
	fd     int
	name   string // without symlinks
	shared bool   // a sticky folder, where everybody may make new names
}

// walk opens a name from / down, as a mere handle (O_PATH), and fails at the first part that
// others can change.
func walk(name string) (*os.File, error) {
	if !path.IsAbs(name) {
		return nil, fmt.Errorf("%q is not an absolute path", name)
	}
	at, err := root()
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(at.fd) }()

	links := 0
	todo := strings.Split(name, "/")
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		if part == "" || part == "." {
			continue
		}
		next, target, err := at.enter(part)
		if err != nil {
			return nil, err
		}
		if target != "" {
			if links++; links > maxSymlinks {
				return nil, &os.PathError{Op: "open", Path: name, Err: unix.ELOOP}
			}
			todo = append(strings.Split(target, "/"), todo...)
			if !path.IsAbs(target) {
				continue
			}
			if next, err = root(); err != nil {
				return nil, err
			}
		}
		_ = unix.Close(at.fd)
		at = next
	}
	if at.shared {
		return nil, &LooseError{at.name, "is a folder in which everybody may make files"}
	}
	fd, err := unix.FcntlInt(uintptr(at.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), at.name), nil
}

func root() (place, error) {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return place{}, &os.PathError{Op: "open", Path: "/", Err: err}
	}
	p := place{fd: fd, name: "/"}
	if err := p.look(false); err != nil {
		_ = unix.Close(fd)
		return place{}, err
	}
	return p, nil
}

// enter opens one name in p. If it is a symlink, that isn't followed: enter returns its target.
func (p place) enter(name string) (next place, target string, err error) {
	full := path.Join(p.name, name)
	fd, err := unix.Openat(p.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT && p.shared {
		return place{}, "", &LooseError{full, "is not there, in a folder in which everybody may make it"}
	}
	if err != nil {
		return place{}, "", &os.PathError{Op: "open", Path: full, Err: err}
	}
	b := make([]byte, unix.PathMax)
	if n, err := unix.Readlinkat(fd, "", b); err == nil {
		_ = unix.Close(fd)
		if p.shared {
			return place{}, "", &LooseError{full, "is a symlink in a folder in which everybody may make one"}
		}
		return place{}, string(b[:n]), nil
	}
	next = place{fd: fd, name: full}
	if err := next.look(p.shared); err != nil {
		_ = unix.Close(fd)
		return place{}, "", err
	}
	return next, "", nil
}

// look fails if p is another's, or others may write to it. A sticky folder is passed through: a
// folder of root's in it is root's alone, because nobody can rename it, and a folder can't have
// a second name. A group's right includes those of ACLs: the mode has their mask.
func (p *place) look(inShared bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(p.fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: p.name, Err: err}
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(p.fd, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: p.name, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	others := st.Mode&0o022 != 0
	switch {
	case int64(fs.Type) == unix.FUSE_SUPER_MAGIC:
		return &LooseError{p.name, "is in a FUSE file system, whose server can show anything"}
	case kind != unix.S_IFREG && kind != unix.S_IFDIR:
		return nil // a device or a socket: what matters is who may name it
	case st.Uid != 0:
		return &LooseError{p.name, fmt.Sprintf("belongs to uid %d", st.Uid)}
	case kind == unix.S_IFDIR && others && st.Mode&unix.S_ISVTX != 0:
		p.shared = true
	case others:
		return &LooseError{p.name, fmt.Sprintf("can be written by others than root (mode %04o)", st.Mode&0o7777)}
	case kind == unix.S_IFREG && inShared:
		return &LooseError{p.name, "is in a folder in which everybody may make files"}
	}
	return nil
}
