package collect

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

// maxProc bounds what is read of one file in /proc; a JVM's maps take some
// hundred kilobytes.
const maxProc = 8 << 20

// deleted is how the kernel marks a path whose file is gone.
const deleted = " (deleted)"

// attempts is how often a program that execs under our eyes is looked at again.
const attempts = 3

// Process is the evidence of one process, without its unit, which only the
// system manager knows.
func Process(pid int) (process.Program, error) {
	var err error
	for range attempts {
		var p process.Program
		if p, err = once(pid); !errors.Is(err, errChanged) {
			return p, err
		}
	}
	return process.Program{}, err
}

var errChanged = errors.New("the process runs another program than a moment ago")

func once(pid int) (process.Program, error) {
	d, err := openProcess(pid)
	if err != nil {
		return process.Program{}, err
	}
	defer d.close()
	p := process.Program{PID: pid, Linux: &process.Linux{}}
	if p.Boot, err = BootID(); err != nil {
		return p, err
	}
	stat, err := d.stat()
	if err != nil {
		return p, err
	}
	p.Start = stat.start
	if err := d.status(&p); err != nil {
		return p, err
	}
	if p.Linux.Cgroup, err = d.cgroup(); err != nil {
		return p, err
	}
	exe, err := d.exe()
	if err != nil {
		return p, err
	}
	defer func() { _ = exe.file.Close() }()
	p.Executables = []process.Executable{{Path: exe.path, Role: process.Main}}
	if err := d.isHostFile(exe); err != nil {
		return p, err
	}
	if p.Executables[0].SHA256, err = digests.of(exe.file); err != nil {
		return p, err
	}
	if p.Mappings, err = d.mappings(exe); err != nil {
		return p, err
	}
	p.Parent = parent(stat.ppid)
	// An exec keeps pid and start time: the file tells.
	again, err := d.exe()
	if err != nil {
		return p, err
	}
	same, err := sameFile(exe.file, again.file)
	_ = again.file.Close()
	if err == nil && !same {
		err = errChanged
	}
	return p, err
}

// BootID is the kernel's random id of this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// A dir is one process's folder in /proc, held open.
type dir struct {
	fd  int
	pid int
}

func openProcess(pid int) (*dir, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, goneOr(pid, err)
	}
	return &dir{fd, pid}, nil
}

func (d *dir) close() { _ = unix.Close(d.fd) }

func goneOr(pid int, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	return fmt.Errorf("pid %d: %w", pid, err)
}

func (d *dir) open(name string) (*os.File, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, goneOr(d.pid, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/%s", d.pid, name)), nil
}

func (d *dir) read(name string) ([]byte, error) {
	f, err := d.open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxProc+1))
	switch {
	case err != nil:
		return nil, goneOr(d.pid, err)
	case len(b) > maxProc:
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxProc)
	}
	return b, nil
}

type stat struct {
	ppid  int
	start uint64
}

func (d *dir) stat() (stat, error) {
	b, err := d.read("stat")
	if err != nil {
		return stat{}, err
	}
	s, err := parseStat(b)
	if err != nil {
		err = fmt.Errorf("/proc/%d/stat: %w", d.pid, err)
	}
	return s, err
}

// parseStat reads proc_pid_stat(5): the name in brackets may hold anything, so
// the fields are counted from its last bracket.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errors.New("no command name")
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return stat{}, errors.New("too few fields")
	}
	if f[0] == "Z" || f[0] == "X" {
		return stat{}, ErrGone
	}
	ppid, err := strconv.Atoi(f[1])
	if err != nil {
		return stat{}, err
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	return stat{ppid, start}, err
}

// status reads who the process is. Processes between two identities are not
// evidence of either.
func (d *dir) status(p *process.Program) error {
	b, err := d.read("status")
	if err != nil {
		return err
	}
	ids := map[string][]uint32{}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name != "Uid" && name != "Gid" && name != "Groups" {
			continue
		}
		for _, f := range strings.Fields(rest) {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return fmt.Errorf("/proc/%d/status: %s: %w", d.pid, name, err)
			}
			ids[name] = append(ids[name], uint32(n))
		}
	}
	for _, name := range []string{"Uid", "Gid"} {
		four := ids[name]
		if len(four) != 4 {
			return fmt.Errorf("/proc/%d/status has no %s", d.pid, name)
		}
		if len(slices.Compact(slices.Clone(four))) != 1 {
			return fmt.Errorf("pid %d runs under several identities (%s %v): a set-id program, or one that changes its user, earns nothing", d.pid, name, four)
		}
	}
	p.Linux.UID, p.Linux.GID, p.Linux.Groups = ids["Uid"][0], ids["Gid"][0], ids["Groups"]
	p.User = userName(p.Linux.UID)
	return nil
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	u, err := user.LookupId(id)
	if err != nil {
		return id
	}
	return u.Username
}

// cgroup is the path in the system manager's hierarchy: the unified one, or
// systemd's own where cgroups are of version 1.
func (d *dir) cgroup() (string, error) {
	b, err := d.read("cgroup")
	if err != nil {
		return "", err
	}
	unified, named := "", ""
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			unified = path
		}
		if _, rest, ok := strings.Cut(line, ":"); ok {
			if path, ok := strings.CutPrefix(rest, "name=systemd:"); ok {
				named = path
			}
		}
	}
	if named != "" && !unifiedCgroups() {
		return named, nil
	}
	return unified, nil
}

// unifiedCgroups says whether the system manager uses version 2.
func unifiedCgroups() bool {
	var fs unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

type executable struct {
	path    string
	deleted bool
	file    *os.File
}

func (d *dir) exe() (executable, error) {
	file, err := d.open("exe")
	if err != nil {
		return executable{}, err
	}
	buf := make([]byte, unix.PathMax+len(deleted))
	n, err := unix.Readlinkat(d.fd, "exe", buf)
	if err != nil {
		_ = file.Close()
		return executable{}, goneOr(d.pid, err)
	}
	path, gone := strings.CutSuffix(string(buf[:n]), deleted)
	return executable{path: path, deleted: gone, file: file}, nil
}

func sameFile(a, b *os.File) (bool, error) {
	ai, err := a.Stat()
	if err != nil {
		return false, err
	}
	bi, err := b.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(ai, bi), nil
}

func parent(pid int) *process.Parent {
	if pid <= 0 {
		return nil
	}
	out := &process.Parent{PID: pid}
	d, err := openProcess(pid)
	if err != nil {
		return out
	}
	defer d.close()
	if s, err := d.stat(); err == nil {
		out.Start = s.start
	}
	if e, err := d.exe(); err == nil {
		if d.isHostFile(e) == nil {
			out.Exe = e.path
		}
		_ = e.file.Close()
	}
	return out
}

// File is the digest of a file that a process will run.
func File(path string) (resolved string, digest evidence.Digest, err error) {
	if resolved, err = filepath.EvalSymlinks(path); err != nil {
		return "", digest, err
	}
	// What isn't a regular file is not waited for; of says what it is.
	f, err := os.OpenFile(resolved, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", digest, err
	}
	defer func() { _ = f.Close() }()
	digest, err = digests.of(f)
	return resolved, digest, err
}
