package collect

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
)

// A path in /proc/PID/maps is printed as that of /proc/PID/exe is, and is as little believed
// (place_linux.go). /proc/PID/map_files has a handle of each mapped file, by which it is held
// against the host's file of that path. To follow one takes CAP_CHECKPOINT_RESTORE, or before
// Linux 5.9 CAP_SYS_ADMIN. Without it there are the numbers in maps:
//
//   - A file is the host's if device and inode are those of the path.
//   - On an overlay, kernels before 6.8 print the numbers of a lower file. What they print of
//     the host's file shows when it is mapped.
//   - Btrfs has devices of its own for each subvolume, which maps doesn't tell, and inodes of
//     the same number in each: its files can't be told by numbers.
//   - A file that was replaced has none to be compared with.

// A region is one line of /proc/PID/maps: an executable mapping of a file, or of memory.
type region struct {
	span    string // its name in map_files
	path    string // as printed; "" for memory
	deleted bool
	device  string // as printed: hexadecimal, MAJOR:MINOR
	inode   uint64
}

var errMoved = errors.New("its mappings change")

// mappings are the executable mappings of a program that are not of exe, each once.
func (d *dir) mappings(exe executable) (list []process.Mapping, err error) {
	for range attempts {
		if list, err = d.mapped(exe); !errors.Is(err, errMoved) {
			break
		}
	}
	if err != nil {
		err = fmt.Errorf("/proc/%d/maps: %w", d.pid, err)
	}
	return list, err
}

func (d *dir) mapped(exe executable) ([]process.Mapping, error) {
	b, err := d.read("maps")
	if err != nil {
		return nil, err
	}
	regions, err := parseMaps(b)
	if err != nil {
		return nil, err
	}
	seen := map[process.Mapping]bool{}
	var list []process.Mapping
	var odd []region
	for _, r := range regions {
		m, own, err := d.tell(r, exe)
		if err != nil {
			return nil, err
		}
		if m.Inode != 0 {
			odd = append(odd, r)
		}
		if own || seen[m] {
			continue
		}
		seen[m] = true
		if list = append(list, m); len(list) > process.MaxMappings {
			return nil, fmt.Errorf("more than %d executable mappings", process.MaxMappings)
		}
	}
	if len(odd) > 0 {
		if err := d.stay(odd); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(list, func(a, b process.Mapping) int { return strings.Compare(a.Path, b.Path) })
	return list, nil
}

// stay fails if regions are printed in another way by now: a library that a package update
// replaces just now is no foreign one.
func (d *dir) stay(regions []region) error {
	b, err := d.read("maps")
	if err != nil {
		return err
	}
	now, err := parseMaps(b)
	if err != nil {
		return err
	}
	printed := map[region]bool{}
	for _, r := range now {
		printed[r] = true
	}
	for _, r := range regions {
		if !printed[r] {
			return errMoved
		}
	}
	return nil
}

// tell returns the mapping of a region by its path on the host, or says that it is
// the program's own file.
func (d *dir) tell(r region, exe executable) (m process.Mapping, own bool, err error) {
	if r.path == "" {
		return process.Mapping{Path: process.Anonymous}, false, nil
	}
	f := executable{path: r.path, deleted: r.deleted}
	f.file, err = d.mapFile(r)
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
	case errors.Is(err, unix.ENOENT):
		return m, false, errMoved
	case err != nil:
		return m, false, err
	default:
		defer func() { _ = f.file.Close() }()
	}

	if f.path == exe.path && f.deleted == exe.deleted {
		if own, err := r.is(f.file, exe.file); own || err != nil {
			return m, own, err
		}
	}
	m = process.Mapping{Path: filepath.Clean(unescape(r.path)), Deleted: r.deleted}
	if m.Path == r.path && d.isHosts(r, f) {
		return m, false, nil
	}
	folder := process.Foreign
	if m.Path == r.path && f.file != nil && d.isPrivate(f) {
		folder = process.Private
	}
	return process.Mapping{Path: folder + m.Path, Deleted: r.deleted, Device: r.device, Inode: r.inode}, false, nil
}

// mapFile is a region's file, as a mere handle.
func (d *dir) mapFile(r region) (*os.File, error) {
	return openAt(d.fd, "map_files/"+r.span)
}

// isHosts reports whether the path of a mapped file means that file on this host.
func (d *dir) isHosts(r region, f executable) bool {
	if f.file != nil {
		return d.isHostFile(f) == nil
	}
	if f.deleted {
		return false
	}
	here, err := openHandle(f.path)
	if err != nil {
		return false
	}
	defer func() { _ = here.Close() }()
	same, err := r.is(nil, here)
	return err == nil && same
}

// isPrivate reports whether the path means the file in the program's mounts, which are of the
// host's root.
func (d *dir) isPrivate(f executable) bool {
	if f.deleted || d.inHostNamespaces() != nil {
		return false
	}
	there, err := openAt(d.fd, "root"+f.path)
	if err != nil {
		return false
	}
	defer func() { _ = there.Close() }()
	same, err := sameFile(f.file, there)
	return err == nil && same
}

// is reports whether the region's file is other. Its handle is nil if it can't be had.
func (r region) is(handle, other *os.File) (bool, error) {
	if handle != nil {
		return sameFile(handle, other)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(other.Fd()), &st); err != nil {
		return false, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(other.Fd()), &fs); err != nil {
		return false, err
	}
	switch {
	case fs.Type == unix.BTRFS_SUPER_MAGIC:
		return false, nil
	case st.Ino == r.inode && deviceName(st.Dev) == r.device:
		return true, nil
	case fs.Type != unix.OVERLAYFS_SUPER_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFREG:
		return false, nil
	}
	as, err := mappedAs(other)
	return err == nil && as.device == r.device && as.inode == r.inode, err
}

// deviceName is a device as maps has it.
func deviceName(dev uint64) string {
	return fmt.Sprintf("%02x:%02x", unix.Major(dev), unix.Minor(dev))
}

// mappedAs maps a regular file here, and returns what maps says of it.
func mappedAs(handle *os.File) (region, error) {
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(handle.Fd())))
	if err != nil {
		return region{}, err
	}
	defer func() { _ = f.Close() }()
	page, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(os.Getpagesize()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return region{}, err
	}
	defer func() { _ = unix.MunmapPtr(page, uintptr(os.Getpagesize())) }()

	self, err := openProcess(os.Getpid())
	if err != nil {
		return region{}, err
	}
	defer self.close()
	b, err := self.read("maps")
	if err != nil {
		return region{}, err
	}
	at := fmt.Sprintf("%x-", uintptr(page))
	for line := range strings.Lines(string(b)) {
		if r, _, err := parseRegion(strings.TrimSuffix(line, "\n")); err == nil && strings.HasPrefix(r.span, at) {
			return r, nil
		}
	}
	return region{}, errors.New("/proc/self/maps lacks a mapping that was made")
}

// openHandle is openAt of a path on the host whose last part is not followed.
func openHandle(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// parseMaps reads the executable regions of proc_pid_maps(5), less the kernel's own.
func parseMaps(b []byte) ([]region, error) {
	var list []region
	s := bufio.NewScanner(bytes.NewReader(b))
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		r, executable, err := parseRegion(s.Text())
		if err != nil {
			return nil, err
		}
		if !executable || r.path == "[vdso]" || r.path == "[vsyscall]" {
			continue
		}
		if !strings.HasPrefix(r.path, "/") {
			r = region{span: r.span}
		}
		list = append(list, r)
	}
	return list, s.Err()
}

func parseRegion(line string) (r region, executable bool, err error) {
	bad := fmt.Errorf("line %q", line)
	f := strings.SplitN(line, " ", 6)
	if len(f) < 6 || len(f[1]) < 3 {
		return r, false, bad
	}
	from, to, ok := strings.Cut(f[0], "-")
	if !ok {
		return r, false, bad
	}
	short := func(address string) string { // map_files has no leading zeros
		if address = strings.TrimLeft(address, "0"); address == "" {
			return "0"
		}
		return address
	}
	r.span = short(from) + "-" + short(to)
	r.device = f[3]
	if r.inode, err = strconv.ParseUint(f[4], 10, 64); err != nil {
		return r, false, bad
	}
	r.path, r.deleted = strings.CutSuffix(strings.TrimLeft(f[5], " "), deleted)
	return r, f[1][2] == 'x', nil
}

// unescape shows a newline in a path as a question mark: the kernel writes it
// as \012, and evidence holds no control characters.
func unescape(path string) string { return strings.ReplaceAll(path, `\012`, "?") }
