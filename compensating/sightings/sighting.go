// Package sightings reads where credentials were used from the logs of those who
// saw it: a reader for each kind of log turns its bytes into sightings.
//
// Every line is hostile: who is not let in writes to these logs too, in user
// names, in names of databases and of programs. A reader takes a name only from
// where the log's own format puts it, and where a line can be read in two ways it
// takes neither and counts it. It keeps no more of a line than a sighting has,
// bounds what it keeps, and promises that no secret of a line leaves it: what
// can't be read is counted and shown by its length and place, never by its text.
//
// A sighting says what the log says. Whose credential it was is told by its names,
// against the ledger, elsewhere.
package sightings

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

// A Kind says what was seen.
type Kind byte

// Kinds of sightings.
const (
	Login   Kind = iota + 1 // a completed login
	Attempt                 // a login that did not succeed, or is not known to have
	Session                 // an account is at work in a session that began earlier
	Read                    // a secret was read from Vault
	Issue                   // a credential was issued: what the ledger alone shows
	Open                    // a credential's file was opened on its host
)

var kinds = map[Kind]string{Login: "login", Attempt: "attempt", Session: "session", Read: "read", Issue: "issue", Open: "open"}

func (k Kind) String() string { return kinds[k] }

// MarshalText writes the kind as a word.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads the word.
func (k *Kind) UnmarshalText(b []byte) error {
	for kind, word := range kinds {
		if word == string(b) {
			*k = kind
			return nil
		}
	}
	return fmt.Errorf("no kind of sighting is called %q", b)
}

// A Sighting is one use of an account or a credential. Text is bounded and as the
// log has it, control characters too: who prints it quotes it.
type Sighting struct {
	Time time.Time `json:"time"`
	Kind Kind      `json:"kind"`
	// Source is the log's name; Line counts its lines from 1, or is the first of
	// several that make one record.
	Source string `json:"source"`
	Line   int64  `json:"line,omitempty"`

	SSH     bool       `json:"ssh,omitempty"`     // the account is one of a machine's, not of a database
	Windows bool       `json:"windows,omitempty"` // it is Windows', where upper and lower case are one, and good at any machine
	Account string     `json:"account,omitempty"` // user name at the target
	From    netip.Addr `json:"from,omitzero"`     // where the client is; invalid: the target itself, or not known
	Local   bool       `json:"local,omitempty"`   // over a socket of the target's own machine
	Target  string     `json:"target,omitempty"`  // database, machine or file
	Program string     `json:"program,omitempty"` // what the client says that it is; of a file, who opened it
	// Interactive is a logon by keyboard or remote desktop, by the target's word.
	Interactive bool `json:"interactive,omitempty"`

	SSHKeyID   string `json:"ssh_key_id,omitempty"`
	SSHSerial  string `json:"ssh_serial,omitempty"`         // decimal
	CertSerial string `json:"certificate_serial,omitempty"` // of an X.509 certificate

	VaultLease string `json:"vault_lease,omitempty"`
	VaultPath  string `json:"vault_path,omitempty"` // as it was asked for
	Lease      string `json:"grant,omitempty"`      // the broker's own name for its request, from the token's metadata
	Actor      string `json:"actor,omitempty"`      // who read, in Vault's words or the agent's
}

// maxText bounds a text of a sighting.
const maxText = 512

func text(b []byte) string {
	if len(b) > maxText {
		b = b[:maxText]
	}
	return string(b)
}

// A Reader turns a log's records into sightings. One reader reads one log, from
// its start or from where Save was called. It is not safe for concurrent use.
type Reader interface {
	// Line takes the next line, without its end. What it sees it gives to emit,
	// now or with a later line; a sighting is never given twice.
	Line(number int64, line []byte, emit func(Sighting))
	// Rest takes more of a line that was too long to be given whole, as it is; its
	// beginning was given to Line.
	Rest(part []byte)
	// Flush gives what waits for lines that may not come: at the end of a log, or
	// when nothing came for a while.
	Flush(emit func(Sighting))
	// Health is what was read so far.
	Health() Health
	// Save is what the reader knows of lines behind it; Restore, of a new reader,
	// goes on from there.
	Save() ([]byte, error)
	Restore([]byte) error
}

// Health is how a log could be read.
type Health struct {
	Lines      int64     `json:"lines"`
	Unreadable int64     `json:"unreadable"`
	Last       time.Time `json:"last,omitzero"`  // time of the newest record
	First      time.Time `json:"first,omitzero"` // time of the oldest
	Sample     string    `json:"sample,omitempty"`
	// Gap is the longest time between one record and the next.
	Gap time.Duration `json:"gap,omitempty"`
}

// silence is how long any log may say nothing.
const silence = 30 * time.Minute

// Silent says whether a log says nothing for much longer than it ever did.
func (h Health) Silent(quiet time.Duration) bool {
	return h.Lines >= 20 && quiet > max(silence, 10*h.Gap)
}

// A single is a reader whose lines each stand alone.
type single struct {
	source string
	health Health
}

// Health is how the log could be read.
func (s *single) Health() Health { return s.health }

// Rest is of no use.
func (s *single) Rest([]byte) {}

// Flush has nothing to give.
func (s *single) Flush(func(Sighting)) {}

// Save is what Restore takes.
func (s *single) Save() ([]byte, error) { return json.Marshal(s.health) }

// Restore goes on from where Save was called.
func (s *single) Restore(b []byte) error { return json.Unmarshal(b, &s.health) }

// plausible is a time as all of a reader's are: in UTC, and of the years in which a
// log can have been written. What a log claims beyond is no time.
func plausible(t time.Time) (time.Time, bool) {
	t = t.UTC()
	return t, t.Year() >= 1990 && t.Year() < 2200
}

// saw notes the time of a record.
func (h *Health) saw(t time.Time) {
	if h.First.IsZero() || t.Before(h.First) {
		h.First = t
	}
	if t.After(h.Last) {
		if !h.Last.IsZero() {
			h.Gap = max(h.Gap, t.Sub(h.Last))
		}
		h.Last = t
	}
}

// unreadable counts a line, and keeps what is wrong with it and where: not what it says.
func (h *Health) unreadable(sample string) {
	h.Unreadable++
	h.Sample = sample
}
