package openmon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
)

// Run watches and tells until ctx ends. Where the kernel doesn't let it, it says
// so once, and tries again in a while.
func Run(ctx context.Context, o Options) {
	q := newQueue(o.Log, o.Now)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { q.tell(ctx, o.Tell) })
	problem := ""
	for ctx.Err() == nil {
		if err := watch(ctx, o, q); err != nil && err.Error() != problem {
			problem = err.Error()
			o.Log.Warn("who opens the credentials' files is not seen", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryAfter):
		}
	}
}

// Available says what keeps files from being watched by this process.
func Available() error {
	fd, err := open()
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// open makes a group of marks. What it opens for the agent it opens without
// waiting: who owns a file can hold up its opens by a lease on it.
func open() (int, error) {
	const flags, eventFlags = unix.FAN_CLASS_CONTENT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK, unix.O_RDONLY | unix.O_LARGEFILE | unix.O_CLOEXEC | unix.O_NONBLOCK
	fd, err := unix.FanotifyInit(flags|unix.FAN_REPORT_TID, eventFlags)
	if err == unix.EINVAL { // before Linux 4.20
		fd, err = unix.FanotifyInit(flags, eventFlags)
	}
	switch err {
	case nil:
		return fd, nil
	case unix.EPERM:
		return -1, errors.New("witness = true needs CAP_SYS_ADMIN: add packaging/systemd/optional/countersign-agent.service.d/witness.conf, and restart the agent; or take witness out of the config")
	case unix.ENOSYS, unix.EINVAL:
		return -1, fmt.Errorf("this kernel has no fanotify with permission events (CONFIG_FANOTIFY_ACCESS_PERMISSIONS): take witness out of the config: %w", err)
	}
	return -1, fmt.Errorf("fanotify: %w", err)
}

type inode struct{ dev, ino uint64 }

// A place is where a credential's file stands.
type place struct {
	credential int
	path       string
}

// A group is the kernel's with the marks of one run.
type group struct {
	o      Options
	queue  *queue
	visits []chan visit // of each credential

	mu     sync.Mutex // guards what follows
	fd     int        // -1 after the end
	places map[inode]place
}

// A marked is the file that has a place's mark, nil for none. Its handle keeps
// the inode from being used for another file.
type marked struct {
	file  *os.File
	inode inode
}

// A visit is an open that was let through, and is to be judged.
type visit struct {
	path string
	who  visitor
}

// maxVisits bounds those of a credential that wait for their judgement.
const maxVisits = 64

// watch marks files and answers for them until ctx ends or the kernel says what
// isn't understood. When it returns, all opens go through.
func watch(ctx context.Context, o Options, q *queue) error {
	fd, err := open()
	if err != nil {
		return err
	}
	g := &group{o: o, queue: q, fd: fd, places: map[inode]place{}}
	defer g.close()
	wake, stop, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = wake.Close() }()
	defer func() { _ = stop.Close() }()
	defer context.AfterFunc(ctx, func() { _ = stop.Close() })()
	// Marking isn't waited for: a folder's file system may hang. It gives up
	// when it comes back and the group is closed.
	marking, cancel := context.WithCancel(ctx)
	defer cancel()
	for i, c := range o.Credentials {
		visits := make(chan visit, maxVisits)
		g.visits = append(g.visits, visits)
		defer close(visits)
		go g.judge(c, visits)
		go g.keepMarked(marking, i)
	}
	return g.answer(fd, int(wake.Fd()))
}

// close has the kernel let through who waits, and all who come.
func (g *group) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = unix.Close(g.fd)
	g.fd = -1
}

// keepMarked looks a credential's files up anew and anew.
func (g *group) keepMarked(ctx context.Context, i int) {
	c := g.o.Credentials[i]
	marks := make([]marked, len(c.Config.Files))
	defer func() {
		for j, f := range c.Config.Files {
			g.unmark(place{i, f.Path}, &marks[j])
		}
	}()
	ticker := time.NewTicker(markEvery)
	defer ticker.Stop()
	problem, next := "", time.Time{}
	for {
		lease, _ := c.Held()
		var errs []error
		for j, f := range c.Config.Files {
			if err := g.follow(place{i, f.Path}, f, lease != "", &marks[j]); err != nil {
				errs = append(errs, err)
			}
		}
		err := errors.Join(errs...)
		switch now := time.Now(); {
		case err == nil:
			problem = ""
		case err.Error() != problem && now.After(next) && ctx.Err() == nil:
			// Not at every change: it is the folder's owner who makes them.
			problem, next = err.Error(), now.Add(retryAfter)
			g.o.Log.Warn("who opens a credential's file is not seen", "credential", c.Config.Name, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// follow has the mark of a place be on what stands there, if that was delivered
// and a lease is held, and on nothing else.
func (g *group) follow(at place, f *config.File, held bool, m *marked) error {
	if !held {
		g.unmark(at, m)
		return nil
	}
	file, err := files.Place(f)
	if err != nil {
		g.unmark(at, m)
		if errors.Is(err, unix.ENOENT) {
			return nil // not delivered yet, or withdrawn
		}
		return err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(file.Fd()), &st)
	now := inode{st.Dev, st.Ino}
	if err == nil && m.file != nil && m.inode == now {
		return file.Close() // marked while it had one name, it stays so with any number
	}
	g.unmark(at, m)
	if err == nil {
		err = files.Delivered(f, file)
	}
	if err == nil {
		err = watchable(self(file))
	}
	if err == nil {
		err = g.mark(at, file, now)
	}
	if err != nil {
		_ = file.Close()
		return fmt.Errorf("%s: not watched: %w", f.Path, err)
	}
	*m = marked{file, now}
	return nil
}

// self is a path of what is open: what is looked at and what is marked is one file.
func self(file *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(file.Fd())) }

func (g *group) mark(at place, file *os.File, now inode) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fd < 0 {
		return nil
	}
	if err := unix.FanotifyMark(g.fd, unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, unix.AT_FDCWD, self(file)); err != nil {
		return fmt.Errorf("fanotify: mark: %w", err)
	}
	g.places[now] = at
	return nil
}

// unmark removes a place's mark, unless another place has it by now.
func (g *group) unmark(at place, m *marked) {
	if m.file == nil {
		return
	}
	g.mu.Lock()
	if g.fd >= 0 && g.places[m.inode] == at {
		delete(g.places, m.inode)
		_ = unix.FanotifyMark(g.fd, unix.FAN_MARK_REMOVE, unix.FAN_OPEN_PERM, unix.AT_FDCWD, self(m.file))
	}
	g.mu.Unlock()
	_ = m.file.Close()
	*m = marked{}
}

// local are file systems that open a file without a word from a network's or a
// user's program. On any other, one open that hangs would keep the agent from
// answering for all credentials. Of an overlay it is a guess: what its layers lie
// on doesn't show.
var local = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, zfsMagic,
	unix.OVERLAYFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.RAMFS_MAGIC}

const zfsMagic = 0x2fc12fc1

// watchable says what keeps a file from being marked. For each event the kernel
// opens the file for the agent, and where that fails it refuses the opener. The
// agent's own program is never marked: while it starts that it can't answer.
func watchable(path string) error {
	var st, own unix.Stat_t
	if err := errors.Join(unix.Stat(path, &st), unix.Stat("/proc/self/exe", &own)); err != nil {
		return fmt.Errorf("whether it is the agent's own program: %w", err)
	}
	if st.Dev == own.Dev && st.Ino == own.Ino {
		return errors.New("it is the agent's own program")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return fmt.Errorf("its file system: %w", err)
	}
	if !slices.Contains(local, int64(fs.Type)) {
		return fmt.Errorf("its file system (type %#x) is none that surely answers: put the file on a local one", fs.Type)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("the agent can't open it: %w", err)
	}
	return unix.Close(fd)
}

// answer lets everybody in, one at a time: so there is never more than one
// descriptor open for an event, for want of which the kernel would refuse an
// open. It returns when stop is closed, or with an error that leaves closing the
// group as the one sure way of letting all through.
func (g *group) answer(fd, stop int) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
	b := make([]byte, metadataSize)
	for {
		// Not by the runtime's poller, which waits for the next edge after EAGAIN;
		// that is also what the kernel says of a file with a lease on it.
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return fmt.Errorf("fanotify: poll: %w", err)
		}
		if fds[1].Revents != 0 {
			return nil
		}
		n, err := unix.Read(fd, b)
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("fanotify: read: %w", err)
		}
		e, err := parse(b[:n])
		if err != nil {
			return err
		}
		if e.fd < 0 {
			continue // more were opened at once than the kernel keeps: it let them through
		}
		if err := g.event(fd, e); err != nil {
			return err
		}
	}
}

// An event is that a thread waits for its open.
type event struct {
	fd     int // of the file, to be closed; negative: none
	thread int
}

// metadataSize is that of the kernel's struct fanotify_event_metadata, which has
// this form since Linux 2.6.37.
const metadataSize = 24

// parse reads one event:
//
//	u32 event_len, u8 vers, u8 reserved, u16 metadata_len, u64 mask, s32 fd, s32 pid
func parse(b []byte) (event, error) {
	if len(b) < metadataSize {
		return event{}, fmt.Errorf("fanotify: an event of %d bytes", len(b))
	}
	o := binary.NativeEndian
	length, version, metadata := o.Uint32(b), b[4], o.Uint16(b[6:])
	if version != unix.FANOTIFY_METADATA_VERSION || int(length) != len(b) || int(metadata) != metadataSize {
		return event{}, fmt.Errorf("fanotify: an event of version %d with %d bytes, %d of them metadata: not known here", version, length, metadata)
	}
	return event{fd: int(int32(o.Uint32(b[16:]))), thread: int(int32(o.Uint32(b[20:])))}, nil
}

// event looks and answers, and leaves the judgement to judge. The file is closed before the
// answer: the opener finds it as nobody's but its own.
func (g *group) event(fd int, e event) error {
	v := look(e.thread)
	var st unix.Stat_t
	err := unix.Fstat(e.fd, &st)
	_ = unix.Close(e.fd)
	answer := binary.NativeEndian.AppendUint32(nil, uint32(e.fd)) // the event's name still
	answer = binary.NativeEndian.AppendUint32(answer, unix.FAN_ALLOW)
	if _, err := unix.Write(fd, answer); err != nil && err != unix.ENOENT { // killed while it waited
		return fmt.Errorf("fanotify: answer: %w", err)
	}
	if err != nil {
		return nil
	}
	g.mu.Lock()
	at, known := g.places[inode{st.Dev, st.Ino}]
	g.mu.Unlock()
	if !known {
		return nil // was replaced in this moment
	}
	select {
	case g.visits[at.credential] <- visit{at.path, v}:
	default: // it is so many at once that this one is missed
	}
	return nil
}

// judge enters a credential's visits of strangers. It is not done by who answers:
// it asks the Runner, which may be opening a file of its own just now.
func (g *group) judge(c Credential, visits <-chan visit) {
	for v := range visits {
		lease, program := c.Held()
		if lease == "" || owns(c.Config.Process, program, os.Getpid(), v.who) {
			continue
		}
		k := kind{credential: c.Config.Name, exe: text(v.who.exe), uid: v.who.uid, unit: text(v.who.unit)}
		g.queue.enter(&seen{k, attest.FileOpen{Lease: lease, Path: text(v.path), PID: v.who.pid, Exe: k.exe, Unit: k.unit}})
	}
}
