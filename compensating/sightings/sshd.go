package sightings

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Sshd reads what OpenSSH says of logins: auth.log in both of syslog's forms, and
// the journal as `journalctl -o json` or `-o short-iso` gives it. It takes a
// message only from a program named sshd (or sshd-session, -auth of OpenSSH 9.8
// and later), and only from the message's first word on: sshd escapes what a
// client sends, and a user name can't begin a message.
type Sshd struct {
	single
	now    func() time.Time // for times without a year
	cursor string           // of the journal's last record
}

// NewSshd makes a reader. The old form of syslog's times has no year: such a line
// is of the year that makes it the newest before now, a day later at the most.
func NewSshd(source string, now func() time.Time) *Sshd {
	return &Sshd{single: single{source: source}, now: now}
}

// Cursor is the journal's name of the last record that was read; empty of other logs.
func (s *Sshd) Cursor() string { return s.cursor }

type sshdState struct {
	Health
	Cursor string `json:"cursor,omitempty"`
}

// Save is what Restore takes.
func (s *Sshd) Save() ([]byte, error) { return json.Marshal(sshdState{s.health, s.cursor}) }

// Restore goes on from where Save was called.
func (s *Sshd) Restore(b []byte) error {
	var kept sshdState
	err := json.Unmarshal(b, &kept)
	s.health, s.cursor = kept.Health, kept.Cursor
	return err
}

// Line takes one line.
func (s *Sshd) Line(number int64, line []byte, emit func(Sighting)) {
	s.health.Lines++
	if len(line) == 0 {
		return
	}
	if len(line) > maxRecord {
		s.health.unreadable(fmt.Sprintf("line %d of %d bytes is longer than %d", number, len(line), maxRecord))
		return
	}
	var t time.Time
	var target, program, message []byte
	var ok bool
	if line[0] == '{' {
		t, target, program, message, ok = s.journal(line)
	} else {
		t, target, program, message, ok = s.syslog(line)
	}
	if !ok {
		s.health.unreadable(fmt.Sprintf("line %d of %d bytes is neither syslog's nor the journal's", number, len(line)))
		return
	}
	if t, ok = plausible(t); !ok {
		s.health.unreadable(fmt.Sprintf("line %d has no time that can be", number))
		return
	}
	s.health.saw(t)
	switch string(program) {
	case "sshd", "sshd-session", "sshd-auth":
	default:
		return
	}
	seen := Sighting{Time: t, Source: s.source, Line: number, SSH: true, Target: text(target)}
	if accepted(message, &seen) {
		emit(seen)
	}
}

func (s *Sshd) journal(line []byte) (t time.Time, host, program, message []byte, ok bool) {
	var r struct {
		Cursor  string         `json:"__CURSOR"`
		Time    string         `json:"__REALTIME_TIMESTAMP"`
		Source  string         `json:"_SOURCE_REALTIME_TIMESTAMP"`
		Host    string         `json:"_HOSTNAME"`
		Program string         `json:"SYSLOG_IDENTIFIER"`
		UID     string         `json:"_UID"` // the kernel's word, where it is there
		Command string         `json:"_COMM"`
		Message jsontext.Value `json:"MESSAGE"`
	}
	if parse(line, &r) != nil {
		return t, nil, nil, nil, false
	}
	s.cursor = text([]byte(r.Cursor))
	micros, err := strconv.ParseInt(r.Time, 10, 64)
	if err != nil {
		return t, nil, nil, nil, false
	}
	var words string
	if len(r.Message) > 0 && r.Message[0] == '"' {
		if parse(r.Message, &words) != nil {
			return t, nil, nil, nil, false
		}
	} // else bytes that are no text: nothing that sshd says of a login
	if r.UID != "" && r.UID != "0" || r.Command != "" && !strings.HasPrefix(r.Command, "sshd") {
		r.Program = r.Command // anybody may call himself sshd
		if strings.HasPrefix(r.Program, "sshd") {
			r.Program = ""
		}
	}
	return time.UnixMicro(micros).UTC(), []byte(r.Host), []byte(r.Program), []byte(words), true
}

// syslog takes "Nov 22 03:04:05 host sshd[17]: text", or a time of RFC 3339 in the
// place of the first three words.
func (s *Sshd) syslog(line []byte) (t time.Time, host, program, message []byte, ok bool) {
	var rest []byte
	if line[0] >= '0' && line[0] <= '9' {
		word, after, found := bytes.Cut(line, []byte{' '})
		if !found || len(word) > 40 {
			return t, nil, nil, nil, false
		}
		var err error
		for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05Z0700"} {
			if t, err = time.Parse(layout, string(word)); err == nil {
				break
			}
		}
		if err != nil {
			return t, nil, nil, nil, false
		}
		rest = after
	} else {
		const stamp = len("Nov 22 03:04:05 ")
		if len(line) < stamp {
			return t, nil, nil, nil, false
		}
		now := s.now()
		// A leap year, or the 29th of February has no meaning.
		at, err := time.ParseInLocation("2006 Jan _2 15:04:05", "2000 "+string(line[:stamp-1]), now.Location())
		if err != nil || line[stamp-1] != ' ' {
			return t, nil, nil, nil, false
		}
		t = time.Date(now.Year()+1, at.Month(), at.Day(), at.Hour(), at.Minute(), at.Second(), 0, at.Location())
		for t.After(now.Add(24*time.Hour)) || t.Day() != at.Day() {
			year := t.Year() - 1
			if t.Day() != at.Day() {
				year = t.AddDate(0, 0, -t.Day()).Year() - 1
			}
			t = time.Date(year, at.Month(), at.Day(), at.Hour(), at.Minute(), at.Second(), 0, at.Location())
		}
		rest = line[stamp:]
	}
	host, rest, ok = bytes.Cut(rest, []byte{' '})
	if !ok {
		return t, nil, nil, nil, false
	}
	tag, message, ok := bytes.Cut(rest, []byte(": "))
	if !ok {
		return t, host, nil, nil, true // a program that says nothing that concerns us
	}
	program, _, _ = bytes.Cut(tag, []byte{'['})
	return t, host, program, message, true
}

// accepted reads what sshd says of a login:
//
//	Accepted publickey for app from 10.0.0.7 port 40112 ssh2: ED25519-CERT SHA256:… ID app@billing (serial 17) CA ED25519 SHA256:…
//	Accepted password for app from 10.0.0.7 port 40112 ssh2
//	Failed password for invalid user app from 10.0.0.7 port 40112 ssh2
func accepted(message []byte, seen *Sighting) bool {
	word, rest, _ := bytes.Cut(message, []byte{' '})
	switch string(word) {
	case "Accepted":
		seen.Kind = Login
	case "Failed":
		seen.Kind = Attempt
	case "Invalid": // Invalid user app from 10.0.0.7 port 40112
		seen.Kind = Attempt
		name, found := bytes.CutPrefix(rest, []byte("user "))
		end := bytes.LastIndex(name, []byte(" from "))
		if !found || end < 0 {
			return false
		}
		seen.Account = text(name[:end])
		return true
	default:
		return false
	}
	_, rest, ok := bytes.Cut(rest, []byte(" for "))
	if !ok {
		return false
	}
	if seen.Kind == Attempt {
		rest = bytes.TrimPrefix(rest, []byte("invalid user "))
	}
	// A user name that was refused may hold anything: what follows it is read from behind.
	tail := bytes.LastIndex(rest, []byte(" from "))
	if seen.Kind == Login {
		tail = bytes.Index(rest, []byte(" from "))
	}
	if tail < 0 {
		return false
	}
	seen.Account = text(rest[:tail])
	rest = rest[tail+len(" from "):]
	address, rest, ok := bytes.Cut(rest, []byte(" port "))
	if !ok {
		return false
	}
	a, err := netip.ParseAddr(text(address))
	if err == nil {
		seen.From = a.Unmap().WithZone("")
	}
	_, key, ok := bytes.Cut(rest, []byte(": "))
	if !ok {
		return true
	}
	_, id, ok := bytes.Cut(key, []byte(" ID "))
	if !ok {
		return true
	}
	// The key id is the signer's word, and may hold spaces, or what looks like a serial.
	end := bytes.LastIndex(id, []byte(" (serial "))
	if end < 0 {
		return true
	}
	serial, _, ok := bytes.Cut(id[end+len(" (serial "):], []byte{')'})
	if _, figures := digits(serial); ok && figures && len(serial) > 0 && len(serial) <= 20 {
		seen.SSHKeyID, seen.SSHSerial = text(id[:end]), string(serial)
	}
	return true
}
