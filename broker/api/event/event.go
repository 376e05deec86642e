// Package event defines the records of the audit log: their kinds, the fields of each kind,
// and their JSON. The broker writes records with this package. The watch, `countersign
// fsck` and other programs read them with it.
//
// Compatibility: the names of kinds and fields don't change, and records that earlier
// brokers wrote can be read. A record contains no secret. It identifies a credential by
// its names in other systems, such as a user name or a serial number.
package event

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// A Record is one line of the log.
type Record struct {
	Index   int64           `json:"index"`
	Time    time.Time       `json:"time"`
	Kind    Kind            `json:"kind"`
	Actor   string          `json:"actor"`           // "host:<id>", "operator:<name>" or "broker"
	Host    string          `json:"host,omitempty"`  // id
	Scope   string          `json:"scope,omitempty"` // name
	Lease   string          `json:"lease,omitempty"` // id
	Request string          `json:"request,omitempty"`
	Detail  json.RawMessage `json:"detail,omitempty"` // JSON of the kind's Event
}

// An Event holds the fields of one kind of record. Each is a struct of this package; its
// JSON is the detail of the record.
type Event interface{ Kind() Kind }

// Parse decodes a record. Unknown fields are ignored.
func Parse(line []byte) (r Record, err error) {
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("audit record: %w", err)
	}
	return r, nil
}

// Header decodes a record without its detail, which may be long.
func Header(line []byte) (Record, error) {
	// Detail is the last field, and a quote within a text before it is escaped.
	if i := bytes.Index(line, []byte(`,"detail":`)); i >= 0 {
		line = append(line[:i:i], '}')
	}
	return Parse(line)
}

// Event decodes the detail of the record. It returns an [Unknown] for a kind that this
// version doesn't know.
func (r Record) Event() (Event, error) {
	e := r.Kind.empty()
	if e == nil {
		return Unknown{r.Kind, r.Detail}, nil
	}
	if len(r.Detail) == 0 {
		return e, nil
	}
	if err := json.Unmarshal(r.Detail, e); err != nil {
		return nil, fmt.Errorf("audit record %d, %s: %w", r.Index, r.Kind, err)
	}
	return e, nil
}

// Why returns the reason that an event gives, for people, or "" if it has none.
func Why(e Event) string {
	if w, ok := e.(interface{ why() string }); ok {
		return w.why()
	}
	return ""
}

// An Unknown is an event of a kind that this version doesn't know.
type Unknown struct {
	Of     Kind
	Detail json.RawMessage
}

// Kind returns the kind of the record.
func (u Unknown) Kind() Kind { return u.Of }
