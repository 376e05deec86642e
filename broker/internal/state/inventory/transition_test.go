package inventory

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
)

// statuses lists every combination, also those that no broker writes.
func statuses() (all []Status) {
	for _, state := range States {
		for bits := range 8 {
			all = append(all, Status{State: state, Admitted: bits&1 != 0, Joined: bits&2 != 0, Reenrolling: bits&4 != 0})
		}
	}
	return all
}

func word(e Event) bool {
	return e == OnApprove || e == OnQuarantine || e == OnRelease || e == OnReenrol || e == OnRemove
}

// What holds of every status and every event.
func TestEveryTransition(t *testing.T) {
	for _, s := range statuses() {
		for _, e := range Events {
			next, err := s.After(e)
			if err != nil {
				if next != s {
					t.Errorf("%+v, %s: refused, and yet %+v", s, e, next)
				}
				continue
			}
			bad := func(why string) { t.Errorf("%+v, %s: %+v: %s", s, e, next, why) }

			if s.State == Removed && next.State != Removed && e != OnReenrol {
				bad("nobody brought it back")
			}
			if s.State == Quarantined && next.State != Quarantined && e != OnRelease && e != OnReenrol && e != OnRemove {
				bad("nobody released it")
			}
			if next.State == Trusted && s.State != Trusted && (!s.Admitted || e != OnJoin && e != OnProve) {
				bad("trusted without an operator's admission and evidence")
			}
			if next.Admitted && !s.Admitted && e != OnApprove && e != OnRedeem && e != OnReenrol {
				bad("admitted by nobody")
			}
			if next.Reenrolling && !s.Reenrolling && e != OnReenrol {
				bad("no operator allowed other keys")
			}
			if next.State == Removed && (next.Admitted || next.Reenrolling) && s.State != Removed {
				bad("a tombstone that is let in")
			}
			if !word(e) && next.Admitted != s.Admitted && e != OnRedeem {
				bad("a host or the broker changed who is admitted")
			}
			if again, err := next.After(e); (e == OnFail || e == OnFork || e == OnSilence || e == OnProve || e == OnAsk || e == OnRejoin) && (err != nil || again != next) {
				bad("not the same once more")
			}
		}
	}
	if _, err := (Status{State: Trusted, Admitted: true, Joined: true}).After("dance"); err == nil {
		t.Error("an event that there isn't is taken")
	}
}

// What becomes of the statuses that brokers write.
func TestTransitions(t *testing.T) {
	var (
		registered = Status{State: Registered, Admitted: true}
		approved   = Status{State: Registered, Admitted: true, Joined: true}
		pending    = Status{State: Pending, Joined: true}
		trusted    = Status{State: Trusted, Admitted: true, Joined: true}
		stale      = Status{State: Stale, Admitted: true, Joined: true}
		failed     = Status{State: Failed, Admitted: true, Joined: true}
		removed    = Status{State: Removed, Joined: true}
		anew       = Status{State: Registered, Admitted: true, Joined: true, Reenrolling: true}
	)
	quarantined := func(s Status) Status { s.State = Quarantined; return s }
	reenrolling := func(s Status) Status { s.Reenrolling = true; return s }
	for name, c := range map[string]struct {
		from Status
		e    Event
		to   any // a Status, or an error or a part of its words
	}{
		"new asks":                            {Status{State: Pending}, OnAsk, pending},
		"new redeems":                         {Status{State: Pending}, OnRedeem, registered},
		"pending asks again":                  {pending, OnAsk, pending},
		"pending proves":                      {pending, OnProve, ErrPending},
		"pending is approved":                 {pending, OnApprove, approved},
		"approved joins":                      {approved, OnRejoin, stale},
		"approved proves before it joined":    {approved, OnProve, ErrNotJoined},
		"pending is reenrolled":               {pending, OnReenrol, "approve admits it"},
		"pending is forked":                   {pending, OnFork, quarantined(pending)},
		"pending is quarantined":              {pending, OnQuarantine, quarantined(pending)},
		"quarantined while pending asks":      {quarantined(pending), OnAsk, ErrQuarantined},
		"quarantined while pending redeems":   {quarantined(pending), OnRedeem, ErrQuarantined},
		"quarantined while pending, approved": {quarantined(pending), OnApprove, ErrQuarantined},
		"quarantined while pending, released": {quarantined(pending), OnRelease, pending},
		"registered joins":                    {registered, OnJoin, trusted},
		"registered joins, bound":             {registered, OnJoinBound, stale},
		"registered, then quarantined, joins": {quarantined(registered), OnJoin, ErrQuarantined},
		"the same, bound":                     {quarantined(registered), OnJoinBound, ErrQuarantined},
		"the same, released":                  {quarantined(registered), OnRelease, registered},
		"trusted proves":                      {trusted, OnProve, trusted},
		"trusted joins with other keys":       {trusted, OnJoin, ErrKeys},
		"trusted rejoins":                     {trusted, OnRejoin, trusted},
		"trusted fails":                       {trusted, OnFail, failed},
		"trusted is silent":                   {trusted, OnSilence, stale},
		"trusted is approved":                 {trusted, OnApprove, ErrAdmitted},
		"trusted is released":                 {trusted, OnRelease, "it is trusted, not quarantined"},
		"stale rejoins":                       {stale, OnRejoin, stale},
		"stale proves":                        {stale, OnProve, trusted},
		"failed rejoins":                      {failed, OnRejoin, failed},
		"failed proves":                       {failed, OnProve, trusted},
		"failed is silent":                    {failed, OnSilence, failed},
		"quarantined rejoins":                 {quarantined(trusted), OnRejoin, ErrQuarantined},
		"quarantined proves":                  {quarantined(trusted), OnProve, ErrQuarantined},
		"quarantined fails":                   {quarantined(trusted), OnFail, quarantined(trusted)},
		"quarantined is released":             {quarantined(trusted), OnRelease, stale},
		"quarantined is reenrolled":           {quarantined(trusted), OnReenrol, anew},
		"quarantined again":                   {quarantined(trusted), OnQuarantine, quarantined(trusted)},
		"quarantined is removed":              {quarantined(trusted), OnRemove, removed},
		"reenrolling proves":                  {reenrolling(trusted), OnProve, ErrReenrolling},
		"reenrolling joins":                   {reenrolling(failed), OnJoin, trusted},
		"reenrolling joins, bound":            {reenrolling(trusted), OnJoinBound, stale},
		"reenrolling, quarantined, joins":     {quarantined(reenrolling(trusted)), OnJoin, ErrQuarantined},
		"reenrolling, quarantined, released":  {quarantined(reenrolling(trusted)), OnRelease, anew},
		"removed asks":                        {removed, OnAsk, ErrRemoved},
		"removed redeems":                     {removed, OnRedeem, ErrRemoved},
		"removed joins":                       {removed, OnJoin, ErrRemoved},
		"removed proves":                      {removed, OnProve, ErrRemoved},
		"removed is approved":                 {removed, OnApprove, ErrRemoved},
		"removed is released":                 {removed, OnRelease, ErrRemoved},
		"removed is quarantined":              {removed, OnQuarantine, ErrRemoved},
		"removed is removed":                  {removed, OnRemove, ErrRemoved},
		"removed is forked":                   {removed, OnFork, removed},
		"removed is reenrolled":               {removed, OnReenrol, anew},
	} {
		got, err := c.from.After(c.e)
		switch want := c.to.(type) {
		case Status:
			if err != nil || got != want {
				t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
			}
		case error:
			if !errors.Is(err, want) {
				t.Errorf("%s: %+v, %v; want %v", name, got, err, want)
			}
		case string:
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %+v, %v; want %s", name, got, err, want)
			}
		}
	}
}

// Whatever happens to a host that an operator took out, the operator's reason stays.
func TestTheReasonOfAQuarantineStays(t *testing.T) {
	start := Host{ID: "host", State: Trusted, Admitted: true, AKPublic: []byte("ak"), EKs: []evidence.Digest{digest("ek")}}
	out, err := start.After(OnQuarantine, "the laptop is lost")
	if err != nil {
		t.Fatal(err)
	}
	for _, first := range Events {
		for _, second := range Events {
			h := out
			for i, e := range []Event{first, second} {
				next, err := h.After(e, fmt.Sprint("reason ", i))
				if err == nil {
					h = next
				}
			}
			if (h.State == Quarantined || h.State == Removed) && first != OnRelease && first != OnReenrol && !strings.HasPrefix(h.Reason, "the laptop is lost") {
				t.Errorf("after %s and %s: %q", first, second, h.Reason)
			}
		}
	}

	// Each operator's words are kept once, and not without end.
	h := out
	for i := range 10_000 {
		if h, err = h.After(OnQuarantine, fmt.Sprint("again ", i%2000)); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(h.Reason, "the laptop is lost; again 0; again 1; ") || len(h.Reason) > maxReasons || strings.Count(h.Reason, "again 0;") != 1 {
		t.Errorf("%d bytes: %.60q", len(h.Reason), h.Reason)
	}
}
