package sightings

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
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

	forgotten int // sessions before order
}

// NewActivity makes a reader.
func NewActivity(source string) *Activity {
	return &Activity{single: single{source: source}, seen: map[string]bool{}}
}

type activityState struct {
	Health Health         `json:"health"`
	Seen   map[string]int `json:"sessions,omitempty"` // with the number that each has in their order
}

// Save is what Restore takes.
func (a *Activity) Save() ([]byte, error) {
	s := activityState{a.health, make(map[string]int, len(a.order))}
	for i, key := range a.order {
		s.Seen[key] = a.forgotten + i
	}
	return json.Marshal(s)
}

// Restore goes on from where Save was called.
func (a *Activity) Restore(b []byte) error {
	var s activityState
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	a.health = s.Health
	a.order = slices.SortedFunc(maps.Keys(s.Seen), func(x, y string) int { return cmp.Compare(s.Seen[x], s.Seen[y]) })
	for _, key := range a.order {
		a.seen[key] = true
	}
	if len(a.order) > 0 {
		a.forgotten = s.Seen[a.order[0]]
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
		a.order, a.forgotten = a.order[1:], a.forgotten+1
	}
	emit(Sighting{Time: start, Kind: Login, Source: a.source, Line: number, Account: cut(l.User), Target: cut(l.Database), From: l.From.Unmap().WithZone(""),
		Local: !l.From.IsValid(), Program: cut(l.Program)})
}
