package sightings

import (
	"bytes"
	"fmt"
	"strconv"
	"time"
)

// OCSF reads events of the Open Cybersecurity Schema Framework's class
// Authentication (3002), an event a line or an array of them: what a SIEM can send.
// Of a logon (activity 1) it takes the user's name, the source's address, the
// destination, and whether it was interactive.
type OCSF struct{ single }

// NewOCSF makes a reader.
func NewOCSF(source string) *OCSF { return &OCSF{single{source: source}} }

// Line takes one event, or an array of them.
func (o *OCSF) Line(number int64, line []byte, emit func(Sighting)) {
	o.health.Lines++
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return
	}
	objects(line, func(object map[string]any) {
		if !o.event(number, fields{object}, emit) {
			o.health.unreadable(fmt.Sprintf("line %d of %d bytes is no OCSF event with a class and a time", number, len(line)))
		}
	}, func() {
		o.health.unreadable(fmt.Sprintf("line %d of %d bytes is no JSON", number, len(line)))
	})
}

func (o *OCSF) event(number int64, f fields, emit func(Sighting)) bool {
	t, ok := eventTime(f.text("time_dt"))
	if !ok {
		ms, err := strconv.ParseInt(f.text("time"), 10, 64)
		if err != nil {
			return false
		}
		if t, ok = plausible(time.UnixMilli(ms)); !ok {
			return false
		}
	}
	o.health.saw(t)
	class := f.text("class_uid")
	if class == "" {
		return false
	}
	if activity := f.text("activity_id"); class != "3002" || activity != "1" && activity != "" {
		return true
	}
	seen := Sighting{Time: t, Kind: Attempt, Source: o.source, Line: number, Account: account(f.text("user/name", "user/uid", "actor/user/name")),
		Target:     f.text("dst_endpoint/svc_name", "dst_endpoint/hostname", "dst_endpoint/ip", "service/name"),
		Program:    f.text("actor/app_name", "actor/process/name", "http_request/user_agent", "src_endpoint/svc_name"),
		CertSerial: f.text("certificate/serial_number")}
	seen.From, seen.Local = eventAddress(f.text("src_endpoint/ip"))
	if f.text("status_id") == "1" {
		seen.Kind = Login
	}
	switch f.text("logon_type_id") {
	case "2", "7", "10", "11", "12", "13":
		seen.Interactive = true
	}
	if seen.Account != "" || seen.CertSerial != "" {
		emit(seen)
	}
	return true
}
