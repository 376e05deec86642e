// Package replay runs the watch over recorded logs: the same readers and detectors
// that serve a live one, from the first line to the last.
package replay

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// A Source is one recorded log.
type Source struct {
	Name   string
	Kind   string // of sightings.Kinds
	Log    io.Reader
	Reader sightings.Reader
}

// maxLine bounds a line of a log; what is longer counts as one that can't be read.
const maxLine = 8 << 20

// Run reads the sources and returns what is wrong.
func Run(index *ledger.Index, c detect.Config, sources []Source) (finding.Book, error) {
	judge := detect.NewJudge(index, c)
	if err := index.Each(func(e ledger.Entry) error { judge.Learn(e); return nil }); err != nil {
		return nil, err
	}
	book := finding.Book{}
	add := func(list []detect.Detection) {
		for _, d := range list {
			book.Add(d)
		}
	}
	for _, s := range sources {
		var failed error
		err := Lines(s.Log, s.Reader.Rest, func(number int64, line []byte) error {
			s.Reader.Line(number, line, func(seen sightings.Sighting) {
				found, err := judge.See(seen)
				add(found)
				failed = errors.Join(failed, err)
			})
			return failed
		})
		s.Reader.Flush(func(seen sightings.Sighting) {
			found, err := judge.See(seen)
			add(found)
			failed = errors.Join(failed, err)
		})
		if err = errors.Join(err, failed); err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
	}
	reads, err := judge.Reads()
	if err != nil {
		return nil, err
	}
	add(reads)
	databases, sshd := covered(sources)
	err = index.Programs(func(entries []ledger.Entry) error {
		found, err := judge.Program(entries)
		add(found)
		add(judge.Unused(entries, databases, sshd))
		return err
	})
	if err == nil {
		err = index.Shared(func(f ledger.Field, entries []ledger.Entry) error {
			if f == ledger.BySecret {
				add(detect.Equal(entries))
			}
			return nil
		})
	}
	add(silent(index, sources))
	return book, err
}

// covered is the time of which some log of databases tells, and of which one of sshd
// does.
func covered(sources []Source) (databases, sshd detect.Coverage) {
	for _, s := range sources {
		h := s.Reader.Health()
		var of *detect.Coverage
		switch {
		case h.First.IsZero():
			continue
		case sightings.Databases(s.Kind):
			of = &databases
		case s.Kind == "sshd":
			of = &sshd
		default:
			continue
		}
		if of.First.IsZero() || h.First.Before(of.First) {
			of.First = h.First
		}
		if h.Last.After(of.Last) {
			of.Last = h.Last
		}
	}
	return databases, sshd
}

// silent sees logs that say nothing, and logs that stopped long before the others.
func silent(index *ledger.Index, sources []Source) (out []detect.Detection) {
	var newest time.Time
	for _, s := range sources {
		if h := s.Reader.Health(); h.Last.After(newest) {
			newest = h.Last
		}
	}
	for _, s := range sources {
		h := s.Reader.Health()
		switch {
		case h.Last.IsZero() && index.Len() > 0:
			out = append(out, detect.Detection{Detector: detect.SilentSensor, Account: s.Name, Time: newest,
				Why: fmt.Sprintf("nothing in it could be read: %d lines, %d of them unreadable", h.Lines, h.Unreadable)})
		case h.Silent(newest.Sub(h.Last)):
			out = append(out, detect.Detection{Detector: detect.SilentSensor, Account: s.Name, Time: h.Last,
				Why: fmt.Sprintf("it ends at %s, %s before the newest log; it was never silent for more than %s before", h.Last.UTC().Format(time.RFC3339), newest.Sub(h.Last).Round(time.Second), h.Gap.Round(time.Second))})
		}
	}
	return out
}

// Lines calls f for every line of a log, without its end. Of a line that is longer
// than any reader takes it gives the beginning, and more of it to rest.
func Lines(log io.Reader, rest func([]byte), f func(number int64, line []byte) error) error {
	r := bufio.NewReaderSize(log, 256<<10)
	var long []byte
	for number := int64(1); ; number++ {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			long = append(long[:0], line...)
			for errors.Is(err, bufio.ErrBufferFull) && len(long) < maxLine {
				line, err = r.ReadSlice('\n')
				long = append(long, line...)
			}
			line = long
			if errors.Is(err, bufio.ErrBufferFull) {
				if err := f(number, long); err != nil {
					return err
				}
				for errors.Is(err, bufio.ErrBufferFull) {
					line, err = r.ReadSlice('\n')
					rest(line)
				}
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				if err != nil {
					return nil
				}
				continue
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		end := errors.Is(err, io.EOF)
		if end && len(line) == 0 {
			return nil
		}
		line = bytes.TrimSuffix(line, []byte{'\n'})
		if err := f(number, bytes.TrimSuffix(line, []byte{'\r'})); err != nil || end {
			return err
		}
	}
}
