package sightings

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

// An ActivityLine is a session as pg_stat_activity has it: what the watch's poller
// writes for each one that is new to it.
type ActivityLine struct {
	PID      int        `json:"pid"`
	Start    time.Time  `json:"start"` // of the session
	User     string     `json:"user"`
	Database string     `json:"database"`
	From     netip.Addr `json:"from,omitzero"` // invalid: a socket of the server's machine
	Program  string     `json:"program"`
}

// Activity reads sessions of PostgreSQL, for servers whose log nobody gets. It sees
// what lives long enough to be asked for, and no failed login.
type Activity struct {
	single
	seen  map[string]bool
	order []string // of seen, oldest first
}

// NewActivity makes a reader.
func NewActivity(source string) *Activity {
	return &Activity{single: single{source: source}, seen: map[string]bool{}}
}

type activityState struct {
	Health Health   `json:"health"`
	Seen   []string `json:"seen,omitempty"`
}

// Save is what Restore takes.
func (a *Activity) Save() ([]byte, error) { return json.Marshal(activityState{a.health, a.order}) }

// Restore goes on from where Save was called.
func (a *Activity) Restore(b []byte) error {
	var s activityState
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	a.health, a.order = s.Health, s.Seen
	for _, key := range s.Seen {
		a.seen[key] = true
	}
	return nil
}

// Line takes one session; one that was taken before, by a poller that began anew,
// counts once.
func (a *Activity) Line(number int64, line []byte, emit func(Sighting)) {
	a.health.Lines++
	if len(line) == 0 {
		return
	}
	var l ActivityLine
	start, ok := time.Time{}, false
	if parse(line, &l) == nil {
		start, ok = plausible(l.Start)
	}
	if !ok || l.User == "" {
		a.health.unreadable(fmt.Sprintf("line %d of %d bytes is no session", number, len(line)))
		return
	}
	a.health.saw(start)
	key := fmt.Sprintf("%d %d", l.PID, start.UnixMicro())
	if a.seen[key] {
		return
	}
	a.seen[key], a.order = true, append(a.order, key)
	if len(a.order) > maxSessions {
		delete(a.seen, a.order[0])
		a.order = a.order[1:]
	}
	emit(Sighting{Time: start, Kind: Login, Source: a.source, Line: number, Account: bounded(l.User), Target: bounded(l.Database), From: l.From.Unmap().WithZone(""),
		Local: !l.From.IsValid(), Program: bounded(l.Program)})
}
