// Package api is the contract between brokers, hosts and operators: the
// protobuf schema under countersign/v1, what is generated from it, and what
// both ends need to speak it. It is the only room of the broker that others
// import.
package api

import (
	"errors"
	"fmt"

	"connectrpc.com/connect"

	countersignv1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// An Outcome is what an answer other than yes means to a host.
type Outcome string

const (
	// Retry: the binding doesn't fit the connection, or the nonce is spent. Ask
	// for another nonce; it is no finding.
	Retry Outcome = "retry"
	// Rejected: the evidence is false. The host's leases are revoked; its
	// files go.
	Rejected Outcome = "rejected"
	// Refused: policy looked at everything and said no. This credential's file
	// goes.
	Refused Outcome = "refused"
	// Fault: nothing was decided. Files stay until they expire.
	Fault Outcome = "fault"
)

// An Error is an answer other than yes.
type Error struct {
	Outcome Outcome
	Check   string // which check or selector, as a word for scripts
	Message string // in words, without what would help an attacker
	Request string // correlation id
}

// NewError returns an answer other than yes. The broker fills in Request when it
// sends the error.
func NewError(outcome Outcome, check, message string) *Error {
	return &Error{Outcome: outcome, Check: check, Message: message}
}

// Checks that the agent acts on by name.
const (
	CheckUnknownHost = "unknown-host" // join again
	CheckReenrol     = "reenrol"      // join again: an operator allowed it
	CheckResync      = "resync"       // send event log and IMA list whole
	CheckGone        = "gone"         // the lease is over: ask for a new credential
	CheckHeld        = "held"         // nothing new is issued until an operator mends the broker
	CheckCertificate = "certificate"  // join again: the host's certificate doesn't count now
)

func (e *Error) Error() string { return fmt.Sprintf("%s (%s): %s", e.Outcome, e.Check, e.Message) }

// MendOperator says how an operator whose certificate has ended comes back.
func MendOperator(name string) string {
	return fmt.Sprintf("an admin runs `countersign operator add %s --role ROLE`, or root on the broker's machine does", name)
}

// codes that the outcomes travel under, for peers that look no further.
var codes = map[Outcome]connect.Code{
	Retry: connect.CodeAborted, Rejected: connect.CodeUnauthenticated, Refused: connect.CodePermissionDenied, Fault: connect.CodeUnavailable,
}

// Connect is the error as it goes out.
func (e *Error) Connect() *connect.Error {
	c := connect.NewError(codes[e.Outcome], errors.New(e.Message))
	detail := &countersignv1.ErrorDetail{Outcome: string(e.Outcome), Check: e.Check, RequestId: e.Request}
	CompleteCodes(detail)
	if d, err := connect.NewErrorDetail(detail); err == nil {
		c.AddDetail(d)
	}
	return c
}

// FromConnect reads an error that came in. Whatever says nothing of an outcome
// is a Fault: only a broker's own word takes a credential away.
func FromConnect(err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	var c *connect.Error
	if !errors.As(err, &c) {
		return &Error{Outcome: Fault, Check: "connection", Message: err.Error()}
	}
	for _, d := range c.Details() {
		value, err := d.Value()
		if err != nil {
			continue
		}
		if e, ok := value.(*countersignv1.ErrorDetail); ok {
			CompleteCodes(e)
			switch o := Outcome(e.GetOutcome()); o {
			case Retry, Rejected, Refused, Fault:
				return &Error{Outcome: o, Check: e.GetCheck(), Message: c.Message(), Request: e.GetRequestId()}
			}
		}
	}
	return &Error{Outcome: Fault, Check: c.Code().String(), Message: c.Message()}
}
