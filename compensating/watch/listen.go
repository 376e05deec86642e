package watch

import (
	"bufio"
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/countersign/countersign/compensating/tail"
	"github.com/countersign/countersign/internal/durable"
)

const (
	// maxSpoolFile is where a spool goes on in a new file.
	maxSpoolFile = 64 << 20
	// maxSpool bounds what was sent and is not yet read.
	maxSpool = 1 << 30
	// maxBody bounds one request: it may become one line.
	maxBody = tail.MaxLine
	// maxIdle is how long a sender may say nothing; it connects again.
	maxIdle = 10 * time.Minute
	// maxSenders bounds the connections of one sensor.
	maxSenders = 16
)

var errSpoolFull = errors.New("the watch is behind: too much waits to be read")

// A spool keeps what was sent in files, durably and in whole lines, until it is
// read: a log that is sent is then followed as one that is written to a file.
type spool struct {
	mu      sync.Mutex
	pattern string
	next    int
	f       *os.File
	size    int64
	waiting int64
	failed  string // why nothing comes
	since   time.Time
	turned  int // how often a sender was turned away
	why     string
}

// turnAway notes that a sender was, with what he had.
func (s *spool) turnAway(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turned++
	s.why = why
}

// turnedAway is how often senders were, and why the last one.
func (s *spool) turnedAway() (int, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.turned, s.why
}

// fails notes why nothing comes, until something does.
func (s *spool) fails(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == "" {
		s.since = time.Now()
	}
	s.failed = err.Error()
}

// works notes that something comes, or would.
func (s *spool) works() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = ""
}

// failing is why nothing comes since when; empty: it does, or may.
func (s *spool) failing() (string, time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed, s.since
}

func openSpool(dir string) (*spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &spool{pattern: filepath.Join(dir, "*.log")}
	files, err := filepath.Glob(s.pattern)
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		s.waiting += info.Size()
		var n int
		if _, err := fmt.Sscanf(filepath.Base(path), "%d.log", &n); err == nil {
			s.next = max(s.next, n+1)
		}
	}
	return s, nil
}

// write appends whole lines, and returns when they are on the disk.
func (s *spool) write(lines []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting+int64(len(lines)) > maxSpool {
		return errSpoolFull
	}
	if s.f != nil && s.size > maxSpoolFile {
		_ = s.f.Close()
		s.f = nil
	}
	if s.f == nil {
		f, err := os.OpenFile(strings.Replace(s.pattern, "*", fmt.Sprintf("%08d", s.next), 1), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		if err := durable.SyncDir(filepath.Dir(s.pattern)); err != nil {
			return errors.Join(err, f.Close())
		}
		s.f, s.size = f, 0
		s.next++
	}
	n, err := s.f.Write(lines)
	s.size += int64(n)
	s.waiting += int64(n)
	if err == nil {
		err = s.f.Sync()
	}
	if err != nil {
		// Half a line may stand there: the next ones go elsewhere.
		_ = s.f.Close()
		s.f = nil
	}
	return err
}

// drop removes the files that were read to their end and are written no more.
func (s *spool) drop(places []tail.Place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range places {
		if s.f != nil && p.Path == s.f.Name() {
			continue
		}
		info, err := os.Stat(p.Path)
		if err == nil && info.Size() <= p.Offset && os.Remove(p.Path) == nil {
			s.waiting -= info.Size()
		}
	}
}

// unrepeated is a spool for what may not be sent a second time.
type unrepeated struct{ *spool }

func (o unrepeated) write(lines []byte) error {
	err := o.spool.write(lines)
	if err != nil {
		o.turnAway(err.Error())
	}
	return err
}

// listen takes what is sent to a sensor's address until ctx ends.
func (s Sensor) listen(ctx context.Context, to *spool, log *slog.Logger) error {
	u, err := url.Parse(s.Listen)
	if err != nil {
		return err
	}
	network, address := "tcp", u.Host
	if u.Scheme == "unix" {
		network, address = "unix", u.Path
		if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, network, address)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	if u.Scheme == "http" {
		h := &http.Server{Handler: s.endpoint(to), ReadTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
		go func() {
			if err := h.Serve(l); ctx.Err() == nil {
				to.fails(err)
				log.Error("a sensor takes nothing any more", "sensor", s.Name, "err", err)
			}
		}()
		return nil
	}
	go s.accept(ctx, l, to, log)
	return nil
}

func (s Sensor) accept(ctx context.Context, l net.Listener, to *spool, log *slog.Logger) {
	slots := make(chan struct{}, maxSenders)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return
		}
		if err != nil { // as with too many open files: it passes
			to.fails(err)
			log.Error("a sensor takes no connection", "sensor", s.Name, "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(later):
			}
			continue
		}
		to.works()
		select {
		case slots <- struct{}{}:
		default:
			to.turnAway(fmt.Sprintf("%d others are connected", maxSenders))
			_ = conn.Close()
			continue
		}
		go func() {
			defer func() { <-slots }()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			if err := receive(idler{conn}, unrepeated{to}); err != nil && ctx.Err() == nil {
				log.Warn("a sender was hung up on", "sensor", s.Name, "err", err)
			}
			_ = conn.Close()
		}()
	}
}

// An idler is a connection that ends when nothing comes.
type idler struct{ net.Conn }

func (i idler) Read(b []byte) (int, error) {
	if err := i.SetReadDeadline(time.Now().Add(maxIdle)); err != nil {
		return 0, err
	}
	return i.Conn.Read(b)
}

// receive writes the whole lines of a stream as they come, as many at once as there
// are. Of a line that no reader takes the beginning is written.
func receive(from io.Reader, to interface{ write([]byte) error }) error {
	r := bufio.NewReaderSize(from, 256<<10)
	var lines []byte
	start := 0 // of the last one
	for {
		part, err := r.ReadSlice('\n')
		if room := tail.MaxLine - (len(lines) - start); len(part) > room {
			part = part[:max(room, 0)]
			if err == nil {
				part = append(slices.Clip(part), '\n')
			}
		}
		lines = append(lines, part...)
		if err == nil {
			start = len(lines)
		}
		if err == nil && (r.Buffered() == 0 || len(lines) > 64<<10) {
			if err := to.write(lines); err != nil {
				return err
			}
			lines, start = lines[:0], 0
		}
		switch {
		case errors.Is(err, io.EOF) && len(lines) == 0:
			return nil
		case errors.Is(err, io.EOF):
			return to.write(append(lines, '\n'))
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
	}
}

// endpoint takes events by POST: JSON, one value or one a line.
func (s Sensor) endpoint(to *spool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, err := os.ReadFile(s.TokenFile)
		if err != nil {
			http.Error(w, "the token can't be read", http.StatusServiceUnavailable)
			return
		}
		given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || subtle.ConstantTimeCompare([]byte(given), bytes.TrimSpace(token)) != 1 {
			http.Error(w, "no such token", http.StatusUnauthorized)
			return
		}
		if r.Method != http.MethodPost {
			http.Error(w, "POST events as JSON", http.StatusMethodNotAllowed)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			to.turnAway(err.Error())
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		lines := body
		if json.Valid(body) {
			var one bytes.Buffer
			if err := json.Compact(&one, body); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			lines = one.Bytes()
		}
		if len(lines) > 0 && lines[len(lines)-1] != '\n' {
			lines = append(slices.Clip(lines), '\n')
		}
		if err := (unrepeated{to}).write(lines); err != nil {
			http.Error(w, "what was sent can't be kept; send it again later", http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
}
