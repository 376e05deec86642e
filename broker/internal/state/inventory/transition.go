package inventory

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Status is the part of a host that events change.
type Status struct {
	State       State
	Admitted    bool // an operator admitted it: by registration, join token or approval
	Joined      bool // the row has the host's keys
	Reenrolling bool // an operator allows the next join to bring other keys
}

// An Event happens to a host and may change its status.
type Event string

// What an operator says.
const (
	OnApprove    Event = "approve"
	OnQuarantine Event = "quarantine"
	OnRelease    Event = "release"
	OnReenrol    Event = "reenrol"
	OnRemove     Event = "remove"
)

// What the host does, or the broker finds.
const (
	OnAsk       Event = "ask"        // a TPM that nobody admitted asks to join
	OnRedeem    Event = "redeem"     // it shows a join token
	OnJoin      Event = "join"       // an admitted host joins with its first keys, or with others that an operator allowed
	OnJoinBound Event = "join-bound" // OnJoin, and a reference set says how the host has to boot
	OnRejoin    Event = "rejoin"     // an admitted host joins again with the keys that it has
	OnProve     Event = "prove"      // its evidence is good
	OnFail      Event = "fail"       // its evidence is false
	OnFork      Event = "fork"       // two of it run, or it went back to an earlier state
	OnSilence   Event = "silence"    // it proved nothing for longer than allowed
)

// Events lists all of them.
var Events = []Event{OnApprove, OnQuarantine, OnRelease, OnReenrol, OnRemove, OnAsk, OnRedeem, OnJoin, OnJoinBound, OnRejoin, OnProve, OnFail, OnFork, OnSilence}

// Why an event can't happen to a host.
var (
	ErrRemoved     = errors.New("it was removed; only reenrol brings it back")
	ErrQuarantined = errors.New("it is quarantined; only release or reenrol lets it back")
	ErrPending     = errors.New("it waits for an operator's approval")
	ErrReenrolling = errors.New("an operator asks it to join again")
	ErrNotJoined   = errors.New("it has not joined")
	ErrKeys        = errors.New("it has other keys already; only reenrol allows new ones")
	ErrAdmitted    = errors.New("it is admitted already")
)

// After returns the status of a host after an event, or why the event can't happen to it.
// Only what an operator says ends a quarantine or a removal.
func (s Status) After(e Event) (Status, error) {
	switch e {
	case OnApprove, OnQuarantine, OnRelease, OnReenrol, OnRemove:
		return s.afterWord(e)
	case OnFail, OnFork, OnSilence:
		return s.afterFinding(e), nil
	default:
		return s.afterRequest(e)
	}
}

// afterWord is After for what an operator says.
func (s Status) afterWord(e Event) (Status, error) {
	switch {
	case s.State == Removed && e != OnReenrol:
		return s, ErrRemoved
	case e == OnQuarantine:
		s.State = Quarantined
	case e == OnRemove:
		s.State, s.Admitted, s.Reenrolling = Removed, false, false

	case e == OnApprove && s.State == Quarantined:
		return s, ErrQuarantined
	case e == OnApprove && s.Admitted:
		return s, ErrAdmitted
	case e == OnApprove:
		s.State, s.Admitted = Registered, true

	case e == OnRelease && s.State != Quarantined:
		return s, fmt.Errorf("it is %s, not quarantined", s.State)
	case e == OnRelease && !s.Admitted:
		s.State = Pending
	case e == OnRelease && (s.Reenrolling || !s.Joined):
		s.State = Registered
	case e == OnRelease:
		s.State = Stale // its next proof says what it is

	case e == OnReenrol && !s.Admitted && s.State != Removed:
		return s, errors.New("it was never admitted; approve admits it")
	case e == OnReenrol:
		if s.State == Removed || s.State == Quarantined {
			s.State = Registered
		}
		s.Admitted, s.Reenrolling = true, true
	}
	return s, nil
}

// afterFinding is After for what the broker finds: it makes no host better.
func (s Status) afterFinding(e Event) Status {
	switch {
	case s.State == Removed || s.State == Quarantined:
	case e == OnFork:
		s.State = Quarantined
	case e == OnFail && (s.State == Trusted || s.State == Stale):
		s.State = Failed
	case e == OnSilence && s.State == Trusted:
		s.State = Stale
	}
	return s
}

// afterRequest is After for what a host asks.
func (s Status) afterRequest(e Event) (Status, error) {
	switch {
	case s.State == Removed:
		return s, ErrRemoved
	case s.State == Quarantined:
		return s, ErrQuarantined
	}

	switch e {
	case OnAsk:
		if s.Admitted {
			return s, ErrAdmitted
		}
		s.State, s.Joined = Pending, true
		return s, nil
	case OnRedeem:
		if s.Admitted {
			return s, ErrAdmitted
		}
		s.State, s.Admitted = Registered, true
		return s, nil
	}

	// The others are of admitted hosts.
	fresh := s.State == Registered || s.Reenrolling
	switch {
	case !s.Admitted:
		return s, ErrPending
	case e == OnRejoin && !s.Joined:
		return s, ErrNotJoined
	case e == OnRejoin:
		if s.State == Registered {
			s.State = Stale
		}
	case (e == OnJoin || e == OnJoinBound) && !fresh:
		return s, ErrKeys
	case e == OnJoin:
		s.State = Trusted
	case e == OnJoinBound:
		s.State = Stale

	case s.Reenrolling: // and it proves itself with the old keys
		return s, ErrReenrolling
	case fresh:
		return s, ErrNotJoined
	case e == OnProve:
		s.State = Trusted
		return s, nil
	default:
		return s, fmt.Errorf("no such event of a host: %q", e)
	}
	s.Joined, s.Reenrolling = true, false
	return s, nil
}

// Status returns the host's status.
func (h Host) Status() Status {
	return Status{State: h.State, Admitted: h.Admitted, Joined: len(h.AKPublic) > 0, Reenrolling: h.Reenrolling}
}

// After returns the host after an event, with reason as the reason of its state, or why the
// event can't happen to it. Its keys are the caller's to write.
//
// While a host is quarantined or removed, a reason is only added to those that it has.
func (h Host) After(e Event, reason string) (Host, error) {
	next, err := h.Status().After(e)
	if err != nil {
		return h, err
	}
	out := next.State == Quarantined || next.State == Removed
	switch {
	case out && (h.State == Quarantined || h.State == Removed):
		reason = joinedReasons(h.Reason, reason, e)
	case next.State == h.State && !renews(e, next.State):
		reason = h.Reason
	}

	if e == OnRelease || e == OnJoin || e == OnJoinBound {
		h.Continuity = h.Continuity.Anew()
	}
	h.State, h.Admitted, h.Reenrolling, h.Reason = next.State, next.Admitted, next.Reenrolling, reason
	if out || e == OnFail {
		h.SilentAt = time.Time{} // nobody waits for it
	}
	return h, nil
}

// renews reports whether an event that leaves a host in this state says anew why it is in it.
func renews(e Event, s State) bool {
	return e == OnReenrol || e == OnProve || e == OnFail && s == Failed || e == OnRejoin && s == Stale
}

// maxReasons bounds the reasons of one state, in bytes.
const maxReasons = 4096

// joinedReasons adds a reason to those that a host is out for. Findings of the broker add
// none: the audit log has them.
func joinedReasons(had, reason string, e Event) string {
	switch {
	case e == OnFail || e == OnFork || e == OnSilence || reason == "" || strings.Contains(had, reason):
		return had
	case had == "":
		return reason
	case len(had)+len(reason) > maxReasons:
		return had
	}
	return had + "; " + reason
}
