package watch

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

// state is what the watch knows beyond its ledger, and goes on from. It lies in
// state.json, in parts: what a second changes is a few of them.
type state struct {
	Audit    int64  // the next of the broker's records
	Epoch    uint64 // of the log that they are in
	Sensors  map[string]*sensorState
	Judge    detect.State
	Findings []*record
	Brake    brake
}

type sensorState struct {
	places []tail.Place
	reader json.RawMessage
	large  map[string]map[string]json.RawMessage // fields of reader that are in parts of their own
}

// A record is a finding, and what became of it.
type record struct {
	Key     finding.Key      `json:"key"`
	Finding *finding.Finding `json:"finding"`
	Told    int              `json:"told"`              // the count that the broker was told
	Action  detect.Response  `json:"action,omitempty"`  // what was done
	Held    string           `json:"held,omitempty"`    // why not more
	Waits   bool             `json:"waits,omitempty"`   // it is tried again, or waits for the brake
	Notices []string         `json:"notices,omitempty"` // receivers that were told
	Over    string           `json:"over,omitempty"`    // how evidence shows that the cause is over
	OverAt  int              `json:"over_at,omitempty"` // of what was seen up to this count
	Closed  int              `json:"closed,omitempty"`  // the count up to which the broker was told so

	number int64 // by which its part is called, in the order of findings
}

// position is how far the broker's log was followed.
type position struct {
	Audit int64  `json:"audit"`
	Epoch uint64 `json:"epoch"`
}

func (w *Watch) stateFile() string { return filepath.Join(w.config.StateDir, "state.json") }

// parts puts all that is known.
func (w *Watch) parts(s *saving) {
	s.put("broker", position{w.kept.Audit, w.kept.Epoch})
	s.put("brake", w.kept.Brake)
	for _, r := range w.kept.Findings {
		s.put(key("finding", number(r.number)), r)
	}

	for _, sensor := range w.sensors {
		for _, p := range sensor.tail.Places() {
			s.put(key("place", sensor.Name, fmt.Sprint(p.Device, "-", p.Inode)), p)
		}
		text, err := sensor.reader.Save()
		if err != nil {
			s.fail(err)
			return
		}
		s.putObject(text, "reader", sensor.Name)
	}
	for name, q := range w.queues {
		for i, h := range q.list {
			s.putFixed(key("held", name, number(q.first+int64(i))), h)
		}
	}

	judge := w.judge.Save()
	for host, boots := range judge.Use {
		for boot, span := range boots {
			s.put(key("use", host, boot), span)
		}
	}
	for host, scopes := range judge.Used {
		s.put(key("used", host), scopes)
	}
	for of, who := range judge.Opened {
		s.put(key("opened", of), who)
	}
	s.put("issued", judge.Issued)
	if len(judge.Reads) > 0 {
		s.put("reads", judge.Reads)
	}
}

// number is a number as part of a key, in which order is kept.
func number(n int64) string { return fmt.Sprintf("%016d", n) }

// restore takes up the parts of a file.
func (w *Watch) restore(parts map[string]json.RawMessage) error {
	w.kept = state{Sensors: map[string]*sensorState{}, Judge: detect.State{Use: map[string]map[string]*detect.Span{}, Used: map[string][]string{}, Opened: map[string][]string{}}}
	names := make([]string, 0, len(parts))
	for name := range parts {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := w.restorePart(words(name), parts[name]); err != nil {
			return fmt.Errorf("%s: part %q: %w", w.stateFile(), name, err)
		}
	}
	return nil
}

func (w *Watch) restorePart(name []string, text json.RawMessage) error {
	take := func(words int, v any) error {
		if len(name) != words {
			return fmt.Errorf("a name of %d words, want %d", len(name), words)
		}
		return json.Unmarshal(text, v)
	}
	switch name[0] {
	case "broker":
		var at position
		err := take(1, &at)
		w.kept.Audit, w.kept.Epoch = at.Audit, at.Epoch
		return err
	case "brake":
		return take(1, &w.kept.Brake)
	case "issued":
		return take(1, &w.kept.Judge.Issued)
	case "reads":
		return take(1, &w.kept.Judge.Reads)
	case "finding":
		r := &record{}
		if err := take(2, r); err != nil {
			return err
		}
		n, err := strconv.ParseInt(name[1], 10, 64)
		if err != nil {
			return err
		}
		r.number, w.kept.Findings = n, append(w.kept.Findings, r)
	case "place":
		var p tail.Place
		if err := take(3, &p); err != nil {
			return err
		}
		s := w.kept.sensor(name[1])
		s.places = append(s.places, p)
	case "reader":
		return w.kept.restoreReader(name, text)
	case "held":
		var h held
		if err := take(3, &h); err != nil {
			return err
		}
		w.queue(name[1]).add(h)
	case "use":
		span := &detect.Span{}
		if err := take(3, span); err != nil {
			return err
		}
		if w.kept.Judge.Use[name[1]] == nil {
			w.kept.Judge.Use[name[1]] = map[string]*detect.Span{}
		}
		w.kept.Judge.Use[name[1]][name[2]] = span
	case "used":
		var scopes []string
		if err := take(2, &scopes); err != nil {
			return err
		}
		w.kept.Judge.Used[name[1]] = scopes
	case "opened":
		var who []string
		if err := take(2, &who); err != nil {
			return err
		}
		w.kept.Judge.Opened[name[1]] = who
	default:
		return fmt.Errorf("there is no such part")
	}
	return nil
}

func (s *state) restoreReader(name []string, text json.RawMessage) error {
	switch len(name) {
	case 2:
		s.sensor(name[1]).reader = text
	case 4:
		of := s.sensor(name[1])
		if of.large[name[2]] == nil {
			of.large[name[2]] = map[string]json.RawMessage{}
		}
		of.large[name[2]][name[3]] = text
	default:
		return fmt.Errorf("a name of %d words", len(name))
	}
	return nil
}

func (s *state) sensor(name string) *sensorState {
	if s.Sensors[name] == nil {
		s.Sensors[name] = &sensorState{large: map[string]map[string]json.RawMessage{}}
	}
	return s.Sensors[name]
}

// held is a sighting that the ledger may explain yet.
type held struct {
	Sighting sightings.Sighting `json:"sighting"`
	Since    time.Time          `json:"since"` // it had been written by then
}

// A queue is what of one log waits for the ledger.
type queue struct {
	list  []held
	first int64 // the number of the first
	bytes int   // of memory, about
}

func (q *queue) add(h held) {
	q.list = append(q.list, h)
	q.bytes += h.bytes()
}

// drop takes the first n off.
func (q *queue) drop(n int) {
	for _, h := range q.list[:n] {
		q.bytes -= h.bytes()
	}
	clear(q.list[:n])
	q.list, q.first = q.list[n:], q.first+int64(n)
}

// bytes is about what a sighting takes in memory.
func (h held) bytes() int {
	const bare = 512
	n := bare
	s := &h.Sighting
	for _, text := range []string{s.Account, s.Target, s.Program, s.SSHKeyID, s.SSHSerial, s.CertSerial, s.VaultLease, s.VaultPath, s.Lease, s.Actor} {
		n += len(text)
	}
	return n
}

// queue is that of a log.
func (w *Watch) queue(name string) *queue {
	q := w.queues[name]
	if q == nil {
		q = &queue{}
		w.queues[name] = q
	}
	return q
}
