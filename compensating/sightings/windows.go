package sightings

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Windows reads security events that were exported as JSON, an event a line or an
// array of them: the event's XML as JSON ("Event" with "System" and "EventData"),
// Winlogbeat's ("winlog"), or flat fields as NXLog and Splunk write them.
//
//	4624  a logon that succeeded
//	4625  one that failed
//	4648  a logon with explicit credentials: an attempt, by the client's machine
//	4769  a Kerberos service ticket: whoever asks has logged in
//	4776  a password that a domain controller checked: no address
type Windows struct{ single }

// NewWindows makes a reader.
func NewWindows(source string) *Windows { return &Windows{single{source: source}} }

// Line takes one event, or an array of them.
func (w *Windows) Line(number int64, line []byte, emit func(Sighting)) {
	w.health.Lines++
	line = bytes.TrimSpace(bytes.TrimPrefix(line, []byte("\xef\xbb\xbf")))
	if len(line) == 0 {
		return
	}
	objects(line, func(object map[string]any) {
		f := fields{object}
		if w.event(number, f, emit) {
			return
		}
		w.health.unreadable(fmt.Sprintf("line %d of %d bytes is no event with an id and a time", number, len(line)))
	}, func() {
		w.health.unreadable(fmt.Sprintf("line %d of %d bytes is no JSON", number, len(line)))
	})
}

// objects calls f for the object that a line is, or for each of its array.
func objects(line []byte, f func(map[string]any), bad func()) {
	if len(line) > maxAudit {
		bad()
		return
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	var list []map[string]any
	if line[0] == '[' {
		if d.Decode(&list) != nil {
			bad()
			return
		}
	} else {
		var one map[string]any
		if d.Decode(&one) != nil {
			bad()
			return
		}
		list = append(list, one)
	}
	for _, o := range list {
		f(o)
	}
}

// fields finds values by their path in an object.
type fields struct{ object map[string]any }

// text is the first of the paths that is there, as text. A path's parts are
// divided by slashes, since names have dots.
func (f fields) text(paths ...string) string {
	for _, path := range paths {
		var at any = f.object
		for part := range strings.SplitSeq(path, "/") {
			m, ok := at.(map[string]any)
			if !ok {
				at = nil
				break
			}
			at = m[part]
		}
		switch v := at.(type) {
		case string:
			return cut(v)
		case json.Number:
			return v.String()
		case map[string]any: // an XML element with attributes
			if t, ok := v["#text"]; ok {
				return cut(fmt.Sprint(t))
			}
		}
	}
	return ""
}

func (f fields) data(name string) string {
	return f.text("Event/EventData/"+name, "winlog/event_data/"+name, "EventData/"+name, "event_data/"+name, name)
}

func (w *Windows) event(number int64, f fields, emit func(Sighting)) bool {
	id := f.text("Event/System/EventID", "winlog/event_id", "EventID", "EventId", "event_id", "Id", "EventCode")
	if id == "" {
		return false
	}
	t, ok := eventTime(f.text("Event/System/TimeCreated/#attributes/SystemTime", "Event/System/TimeCreated/@SystemTime", "Event/System/TimeCreated/SystemTime",
		"TimeCreated/SystemTime", "TimeCreated", "@timestamp", "EventTime", "TimeGenerated", "SystemTime", "timestamp", "time"))
	if !ok {
		return false
	}
	w.health.saw(t)
	seen := Sighting{Time: t, Source: w.source, Line: number, Windows: true, Account: account(f.data("TargetUserName")),
		Target: f.text("Event/System/Computer", "winlog/computer_name", "Computer", "Hostname", "host/name", "MachineName")}
	seen.From, seen.Local = eventAddress(f.data("IpAddress"))
	done := f.data("Status") == "0x0" || f.data("Status") == "0"
	switch id {
	case "4624":
		seen.Kind, seen.Program = Login, f.data("ProcessName")
		switch f.data("LogonType") {
		case "2", "7", "10", "11", "12", "13":
			seen.Interactive = true
		}
	case "4648":
		seen.Kind, seen.Program, seen.Target = Attempt, f.data("ProcessName"), f.data("TargetServerName")
	case "4769":
		seen.Kind, seen.Target = Attempt, f.data("ServiceName")
		if done {
			seen.Kind = Login
		}
	case "4625":
		seen.Kind = Attempt
	case "4776":
		seen.Kind = Attempt
		if done {
			seen.Kind = Login
		}
	default:
		return true
	}
	if seen.Account != "" && seen.Account != "-" {
		emit(seen)
	}
	return true
}

// account is a user name without its domain.
func account(name string) string {
	if _, user, ok := strings.Cut(name, `\`); ok {
		name = user
	}
	user, _, _ := strings.Cut(name, "@")
	return user
}

// eventAddress reads an address; "-" and the machine's own are none.
func eventAddress(s string) (a netip.Addr, local bool) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, false
	}
	if a = a.Unmap().WithZone(""); a.IsLoopback() {
		return netip.Addr{}, true
	}
	return a, false
}

func eventTime(s string) (time.Time, bool) {
	if ms, ok := strings.CutPrefix(s, "/Date("); ok { // of Windows PowerShell
		ms, _, _ = strings.Cut(ms, ")")
		n, err := strconv.ParseInt(ms, 10, 64)
		t, ok := plausible(time.UnixMilli(n))
		return t, ok && err == nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02 15:04:05.999999999Z07:00", "2006-01-02T15:04:05.999999999", "2006-01-02 15:04:05.999999999"} {
		if t, err := time.Parse(layout, s); err == nil {
			return plausible(t)
		}
	}
	return time.Time{}, false
}
