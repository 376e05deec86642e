package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"time"
)

// maxCursor bounds the journal's name of a place in it.
const maxCursor = 512

// journal follows systemd's journal from behind cursor, until ctx ends. It is read by
// systemd's own program: its files' format is nobody else's. What the spool has of it
// needn't survive, since the journal keeps it and its reader remembers the cursor.
func (s Sensor) journal(ctx context.Context, cursor string, to *spool, log *slog.Logger) {
	said := ""
	for ctx.Err() == nil {
		err := s.journalOnce(ctx, &cursor, to)
		if ctx.Err() != nil {
			return
		}
		to.fails(err)
		if err.Error() != said {
			said = err.Error()
			log.Warn("the journal can't be read", "sensor", s.Name, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(later):
		}
	}
}

func (s Sensor) journalOnce(ctx context.Context, cursor *string, to *spool) error {
	args := []string{"--directory=" + s.Journal, "--output=json", "--output-fields=MESSAGE,SYSLOG_IDENTIFIER,_HOSTNAME,_UID,_COMM", "--quiet", "--follow", "--no-tail", "--merge"}
	if *cursor != "" {
		args = append(args, "--after-cursor="+*cursor)
	}
	for i, program := range []string{"sshd", "sshd-session", "sshd-auth"} {
		if i > 0 {
			args = append(args, "+")
		}
		args = append(args, "SYSLOG_IDENTIFIER="+program)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "journalctl", args...)
	var said firstWords
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	running := time.AfterFunc(later, to.works)
	err = receive(out, marking{to, cursor})
	running.Stop()
	cancel()
	_ = cmd.Wait()
	words, _, _ := strings.Cut(strings.TrimSpace(string(said)), "\n")
	return errors.Join(err, fmt.Errorf("journalctl ended: %s", words))
}

// firstWords keep the beginning of what is written.
type firstWords []byte

func (f *firstWords) Write(p []byte) (int, error) {
	const most = 200
	*f = append(*f, p[:min(len(p), most-len(*f))]...)
	return len(p), nil
}

// A marking is a spool that notes the cursor of the last line it has.
type marking struct {
	*spool
	cursor *string
}

func (m marking) write(lines []byte) error {
	if err := m.spool.write(lines); err != nil {
		return err
	}
	lines = bytes.TrimSuffix(lines, []byte{'\n'})
	var last struct {
		Cursor string `json:"__CURSOR"`
	}
	if json.Unmarshal(lines[bytes.LastIndexByte(lines, '\n')+1:], &last) == nil && last.Cursor != "" && len(last.Cursor) <= maxCursor {
		*m.cursor = last.Cursor
	}
	return nil
}
