// Package event is the audit log's language: what kinds of records there are, what each
// says, and how it stands in JSON. The broker writes records by it, and everybody reads
// them by it: the watch, `countersign fsck`, and programs of others.
//
// It promises that a kind's name and its fields' names stay, and that records of
// earlier brokers are read. A record is small, and holds no secret: it names a
// credential by what the outside world calls it.
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
	Kind    Kind            `json:"kind"`            // what happened
	Actor   string          `json:"actor"`           // "host:<id>", "operator:<name>" or "broker"
	Host    string          `json:"host,omitempty"`  // whom it concerns, by id
	Scope   string          `json:"scope,omitempty"` // by name
	Lease   string          `json:"lease,omitempty"` // by id
	Request string          `json:"request,omitempty"`
	Detail  json.RawMessage `json:"detail,omitempty"` // an Event, by its kind
}

// An Event is what a record says beside whom it concerns: a struct of this package,
// whose JSON is the record's detail.
type Event interface{ Kind() Kind }

// Parse reads a record. What follows a field that it doesn't know is read all the same.
func Parse(line []byte) (r Record, err error) {
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("audit record: %w", err)
	}
	return r, nil
}

// Header is Parse without the detail, which may be long.
func Header(line []byte) (Record, error) {
	// Detail is the last field, and a quote within a text before it is escaped.
	if i := bytes.Index(line, []byte(`,"detail":`)); i >= 0 {
		line = append(line[:i:i], '}')
	}
	return Parse(line)
}

// Event is what the record says; Unknown where its kind is of a later broker.
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

// Why is the reason that an event gives, in one line for people; empty where it gives
// none.
func Why(e Event) string {
	if w, ok := e.(interface{ why() string }); ok {
		return w.why()
	}
	return ""
}

// An Unknown is an event of a kind that this program doesn't know.
type Unknown struct {
	Of     Kind
	Detail json.RawMessage
}

// Kind is the event's.
func (u Unknown) Kind() Kind { return u.Of }
