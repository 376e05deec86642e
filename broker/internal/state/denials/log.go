package denials

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/durable"
)

// Bounds of a denial log.
const (
	maxLine   = 1 << 20 // bytes
	maxFile   = 1 << 30 // bytes
	perBlock  = 512     // denials of a line
	pruneStep = 512     // of the store, in one update
	compactAt = 1 << 20 // bytes from which a file that is mostly of the past is written anew
)

// fit returns as many denials as one line has room for; at least one.
func fit(list []Denial) []Denial {
	size := 0
	for i, d := range list {
		size += len(d.Detail) + len(d.Name) + 256 // its other fields
		if i > 0 && size > maxLine/2 {
			return list[:i]
		}
	}
	return list
}

// A block is one line of the file, behind its signature in base64 and a space.
type block struct {
	At      time.Time `json:"at"`
	Last    int64     `json:"last"` // the number of the newest denial, whether it is still in the file or not
	Denials []Denial  `json:"denials"`
}

// domain keeps a block's signature from passing for another of the same key.
const domain = "countersign denials 1\n"

// Contents are what a denial log says.
type Contents struct {
	At      time.Time // when its newest line was written
	Last    int64     // number of the newest denial
	Denials []Denial  // the newest of each name, in their order
	Bad     int       // lines that can't be read, or that the key didn't sign
	Written int       // denials, those that later ones replaced too
	whole   int64     // bytes up to the end of its last whole line
}

// Absent reports whether there was no file, or an empty one.
func (c Contents) Absent() bool { return c.At.IsZero() && c.Bad == 0 }

// ErrForeign is returned for a file in which no line is the broker's.
var ErrForeign = errors.New("no line of it was signed by this broker's audit key")

// Read reads a denial log. A line that is bad is counted and leaves the others as they are;
// os.ErrNotExist if there is no file.
func Read(file string, key note.Verifier) (Contents, error) {
	f, err := os.Open(file)
	if err != nil {
		return Contents{}, err
	}
	defer func() { _ = f.Close() }()
	c, err := read(f, key)
	if err == nil && c.At.IsZero() && c.Bad > 0 {
		err = ErrForeign
	}
	if err != nil {
		err = fmt.Errorf("denial log %s: %w", file, err)
	}
	return c, err
}

func read(from io.Reader, key note.Verifier) (c Contents, err error) {
	newest := map[Kind]map[string]Denial{}
	lines := bufio.NewReaderSize(io.LimitReader(from, maxFile), 64<<10)
	for {
		line, err := readLine(lines)
		switch {
		case errors.Is(err, io.EOF):
			if len(line) > 0 {
				c.Bad++ // its writer was interrupted
			}
			for _, named := range newest {
				for _, d := range named {
					c.Denials = append(c.Denials, d)
				}
			}
			slices.SortFunc(c.Denials, func(a, b Denial) int { return int(a.Seq - b.Seq) })
			return c, nil
		case err != nil:
			return c, err
		}
		c.whole += int64(len(line))
		b, err := open(line, key)
		if err != nil {
			c.Bad++
			continue
		}
		c.At, c.Last = b.At, max(c.Last, b.Last)
		c.Written += len(b.Denials)
		for _, d := range b.Denials {
			if newest[d.Kind] == nil {
				newest[d.Kind] = map[string]Denial{}
			}
			if had, ok := newest[d.Kind][d.Name]; !ok || had.Seq < d.Seq {
				newest[d.Kind][d.Name] = d
			}
		}
	}
}

// readLine reads to the end of a line, which it returns with its newline; of one that is
// too long the first part.
func readLine(r *bufio.Reader) (line []byte, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) <= maxLine {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

func open(line []byte, key note.Verifier) (b block, err error) {
	encoded, text, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	if !ok {
		return b, errors.New("no signature")
	}
	signature, err := base64.StdEncoding.DecodeString(string(encoded))
	if err != nil {
		return b, err
	}
	if !key.Verify(append([]byte(domain), text...), signature) {
		return b, errors.New("not signed by the key")
	}
	err = json.Unmarshal(text, &b)
	return b, err
}

func seal(b block, key note.Signer) ([]byte, error) {
	if b.Denials == nil {
		b.Denials = []Denial{}
	}
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	signature, err := key.Sign(append([]byte(domain), text...))
	if err != nil {
		return nil, err
	}
	line := fmt.Appendf(nil, "%s %s\n", base64.StdEncoding.EncodeToString(signature), text)
	if len(line) > maxLine {
		return nil, fmt.Errorf("a denial of %d bytes; at most %d can be read again", len(line), maxLine)
	}
	return line, nil
}

// A Log keeps the file of a running broker.
type Log struct {
	store *store.Store
	file  string
	key   note.Signer
	log   *slog.Logger
	wall  func() time.Time
	sure  func() time.Time

	mu      sync.Mutex
	out     *os.File // guarded by mu
	written int64    // guarded by mu; number of the newest denial that is in the file
	size    int64    // guarded by mu; of the file, in bytes
	entries int      // guarded by mu; denials in the file
	begun   int      // guarded by mu; denials in it when it was written anew
	absent  bool     // guarded by mu; there was no file when the broker started
	behind  error    // guarded by mu; why the file lacks denials of the store
}

// Open opens the file of a store, which has read what the file says, and writes what it
// lacks. From then on each commit is followed by its denials. Sure is what time has surely
// come: denials that have ended by it are forgotten.
func Open(ctx context.Context, s *store.Store, file string, key note.Signer, c Contents, log *slog.Logger, wall, sure func() time.Time) (*Log, error) {
	l := &Log{store: s, file: file, key: key, log: log, wall: wall, sure: sure, written: c.Last, size: c.whole, entries: c.Written, absent: c.Absent()}
	l.mu.Lock()
	defer l.mu.Unlock()
	whole, err := c.covers(ctx, s)
	if err != nil {
		return nil, err
	}
	if whole {
		if err := l.reopen(); err != nil {
			return nil, err
		}
	}
	l.append(ctx)
	s.AfterCommit(l.follow)
	return l, nil
}

// covers reports whether the file is whole, and has every denial of the store up to its last
// number.
func (c Contents) covers(ctx context.Context, s *store.Store) (bool, error) {
	if c.Bad > 0 || c.At.IsZero() {
		return false, nil
	}
	have := map[int64]bool{}
	for _, d := range c.Denials {
		have[d.Seq] = true
	}
	from, whole := int64(0), true
	for more := true; more && whole; {
		if err := s.View(ctx, func(tx *store.Tx) error {
			list, err := after(tx, from, perBlock)
			more = len(list) == perBlock
			for _, d := range list {
				from, whole = d.Seq, whole && (d.Seq > c.Last || have[d.Seq])
			}
			return err
		}); err != nil {
			return false, err
		}
	}
	return whole, nil
}

// Close closes the file.
func (l *Log) Close() error {
	l.store.AfterCommit(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out == nil {
		return nil
	}
	return l.out.Close()
}

// Behind returns why the file lacks denials that the store has; nil: it has them all.
func (l *Log) Behind() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.behind == nil {
		return nil
	}
	return fmt.Errorf("the denial log %s can't be written, so nothing new is issued: %w", l.file, l.behind)
}

// follow writes what a commit denied.
func (l *Log) follow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.append(context.Background())
}

// append writes what the file lacks; l.mu is held.
func (l *Log) append(ctx context.Context) {
	err := l.catchUp(ctx)
	if err != nil && l.behind == nil {
		l.log.Error("the denial log can't be written; revoking goes on, and nothing new is issued", "file", l.file, "err", err)
	}
	if err == nil && l.behind != nil {
		l.log.Info("the denial log is written again", "file", l.file)
	}
	l.behind = err
}

func (l *Log) catchUp(ctx context.Context) error {
	if l.out == nil {
		// It is begun, or what it lacks, or is torn or nobody's, is mended. A file that came
		// meanwhile, as with a disk that was mounted late, may know more than the store.
		if info, err := os.Stat(l.file); l.absent && err == nil && info.Size() > 0 {
			return errors.New("it was not there when the broker started: restart the broker, which takes over what it has")
		}
		return l.rewrite(ctx)
	}
	for {
		var list []Denial
		var newest int64
		err := l.store.View(ctx, func(tx *store.Tx) (err error) {
			if newest, err = Last(tx); err == nil {
				list, err = after(tx, l.written, perBlock)
			}
			return err
		})
		if err != nil || newest <= l.written && len(list) == 0 {
			return err
		}
		whole := len(list) < perBlock
		if some := fit(list); len(some) < len(list) {
			list, whole = some, false
		}
		if !whole {
			newest = list[len(list)-1].Seq
		}
		line, err := seal(block{At: l.wall().UTC(), Last: newest, Denials: list}, l.key)
		if err != nil {
			return err
		}
		if err := l.write(line); err != nil {
			return err
		}
		l.written, l.entries = newest, l.entries+len(list)
	}
}

// write appends a line, or leaves the file as it was.
func (l *Log) write(line []byte) error {
	_, err := l.out.WriteAt(line, l.size)
	if err == nil {
		err = l.out.Sync()
	}
	if err != nil {
		return errors.Join(err, l.out.Truncate(l.size))
	}
	l.size += int64(len(line))
	return nil
}

func (l *Log) reopen() (err error) {
	if l.out != nil {
		_ = l.out.Close()
	}
	l.out, err = os.OpenFile(l.file, os.O_WRONLY, 0o600)
	return err
}

// rewrite writes the file anew, with what is in force; l.mu is held.
func (l *Log) rewrite(ctx context.Context) error {
	var text []byte
	var newest, from int64
	entries := 0
	err := l.store.View(ctx, func(tx *store.Tx) (err error) {
		if newest, err = Last(tx); err != nil {
			return err
		}
		for {
			list, err := after(tx, from, perBlock)
			if err != nil {
				return err
			}
			some := fit(list)
			line, err := seal(block{At: l.wall().UTC(), Last: newest, Denials: some}, l.key)
			if err != nil {
				return err
			}
			text, entries = append(text, line...), entries+len(some)
			if len(some) == len(list) && len(list) < perBlock {
				return nil
			}
			from = some[len(some)-1].Seq
		}
	})
	if err != nil {
		return err
	}
	if err := durable.Write(l.file, text); err != nil {
		return err
	}
	l.written, l.size, l.entries, l.begun = newest, int64(len(text)), entries, entries
	return l.reopen()
}

// look is how often the log looks for denials that have ended.
const look = time.Hour

// Run forgets denials that have ended, and writes the file anew when most of it is of the
// past, until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	retry := time.NewTicker(10 * time.Second)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-retry.C:
			if l.Behind() != nil {
				l.follow()
			}
		case <-ticker.C:
			if err := l.tidy(ctx); err != nil && ctx.Err() == nil {
				l.log.Error("the denial log is not tidied", "file", l.file, "err", err)
			}
		}
	}
}

func (l *Log) tidy(ctx context.Context) error {
	if l.Behind() != nil {
		return nil
	}
	for n := int64(pruneStep); n == pruneStep; {
		if err := l.store.Update(ctx, nil, func(tx *store.Tx) (err error) {
			n, err = prune(tx, l.sure(), pruneStep)
			return err
		}); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size < compactAt || l.entries < 2*l.begun {
		return nil
	}
	return l.rewrite(ctx)
}
