package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A host that an operator took out stays out, in whatever order it is registered, asks,
// shows a token and is taken out, until an operator lets it back; and the reason is kept.
func TestAQuarantineOutlivesJoining(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	act := func(t *testing.T, args ...string) {
		t.Helper()
		check.Must(b.broker.CLI(ctx, append([]string{"host"}, args...)...))(t)
	}
	id := func(t *testing.T, name string) string {
		t.Helper()
		var h struct {
			ID string `json:"id"`
		}
		check.Nil(t, b.broker.JSON(ctx, &h, "host", "show", name))
		return h.ID
	}
	register := func(t *testing.T, h *lab.SoftHost) {
		name := "web-" + h.TPM.EK.Hash().String()[:8]
		act(t, "add", name, "role=billing", "--ek-hash", h.TPM.EK.Hash().String())
		h.ID = id(t, name)
	}
	wait := func(t *testing.T, h *lab.SoftHost) {
		if pending := check.Must(h.Join(ctx, ""))(t); !pending {
			t.Fatal("admitted by nobody")
		}
	}
	approve := func(t *testing.T, h *lab.SoftHost) { act(t, "approve", h.ID, "role=billing") }
	join := func(t *testing.T, h *lab.SoftHost) { check.Must(h.Join(ctx, ""))(t) }
	reenrol := func(t *testing.T, h *lab.SoftHost) { act(t, "reenrol", h.ID) }

	for name, before := range map[string][]func(*testing.T, *lab.SoftHost){
		"registered":                 {register},
		"pending":                    {wait},
		"approved":                   {wait, approve},
		"joined":                     {register, join},
		"joined, to be enrolled":     {register, join, reenrol},
		"registered, to be enrolled": {register, reenrol},
	} {
		for _, taken := range []struct{ action, state, check string }{{"quarantine", "quarantined", "host-quarantined"}, {"remove", "removed", "host-removed"}} {
			t.Run(name+", "+taken.action, func(t *testing.T) {
				h := joinerFrom(t, b)
				for _, step := range before {
					step(t, h)
				}
				act(t, taken.action, h.ID, "--reason", "the laptop is lost")

				out := func(how string, err error) {
					t.Helper()
					outcome(t, err, api.Rejected, taken.check)
					var shown struct {
						State  string `json:"state"`
						Reason string `json:"state_reason"`
					}
					check.Nil(t, b.broker.JSON(ctx, &shown, "host", "show", h.ID))
					if shown.State != taken.state || !strings.HasPrefix(shown.Reason, "the laptop is lost") {
						t.Errorf("%s: it is %s: %s", how, shown.State, shown.Reason)
					}
				}
				_, err := h.Join(ctx, "")
				out("by joining", err)
				_, err = h.Join(ctx, check.Must(b.broker.JoinToken(ctx, "role=billing"))(t))
				out("by a token", err)
				if taken.action == "quarantine" {
					if _, err := b.broker.CLI(ctx, "host", "approve", h.ID); err == nil || !strings.Contains(err.Error(), "quarantined") {
						t.Errorf("approved: %v", err)
					}
					act(t, "release", h.ID)
					if _, err := h.Join(ctx, ""); err != nil {
						t.Errorf("after its release: %v", err)
					}
				}
			})
		}
	}
}

var sources atomic.Int32 // how many addresses joinerFrom has used

// joinerFrom is a host that asks from an address that few others ask from.
func joinerFrom(t *testing.T, b *bench) *lab.SoftHost {
	t.Helper()
	moved := *b.broker
	moved.Addr = forward(t, fmt.Sprintf("127.0.9.%d", sources.Add(1)), b.broker.Addr)
	return check.Must(lab.NewSoftHost(&moved, services.TPMCA))(t)
}

// A removed host's TPM comes in by none of its keys, and any EK that it ever showed is one
// of them.
func TestATombstoneHasEveryKey(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	token := func() string { return check.Must(b.broker.JoinToken(ctx, "role=billing"))(t) }
	soft := func() *lab.SoftHost { return joinerFrom(t, b) }

	h := soft()
	second, unseen := soft().TPM, soft().TPM
	h.More = []*lab.SoftTPM{second}
	check.Must(h.Join(ctx, token()))(t)
	var shown struct {
		EKs []string `json:"ek_hashes"`
	}
	check.Nil(t, b.broker.JSON(ctx, &shown, "host", "show", h.ID))
	if len(shown.EKs) != 2 {
		t.Errorf("recorded are %v", shown.EKs)
	}

	// by is the same chip, which shows other keys; what it doesn't keep is made anew.
	by := func(ek *lab.SoftTPM, keeps bool) *lab.SoftHost {
		other := soft()
		if keeps {
			other.TPM = h.TPM.Clone()
		}
		other.TPM.TakeEK(ek)
		return other
	}
	// The accepted twin: another EK of an admitted host is that host's.
	same := by(unseen, true)
	check.Must(same.Join(ctx, ""))(t)
	if same.ID != h.ID {
		t.Errorf("host %s became %s", h.ID, same.ID)
	}

	check.Must(b.broker.CLI(ctx, "host", "remove", h.ID))(t)
	for name, other := range map[string]*lab.SoftHost{
		"its keys, by its EK":               by(h.TPM, true),
		"its keys, by its second EK":        by(second, true),
		"its keys, by an EK it showed late": by(unseen, true),
		"its keys, by an EK never shown":    by(soft().TPM, true),
		"new keys, by its EK":               by(h.TPM, false),
		"new keys, by its second EK":        by(second, false),
		"new keys, by an EK it showed late": by(unseen, false),
	} {
		for _, t2 := range []string{"", token()} {
			_, err := other.Join(ctx, t2)
			if e := api.FromConnect(err); err == nil || e.Check != "host-removed" || !strings.Contains(e.Message, "reenrol") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	// Beside a stranger's EK, which the answer doesn't reach, too.
	both := soft()
	both.More = []*lab.SoftTPM{second}
	_, err := both.Join(ctx, token())
	outcome(t, err, api.Rejected, "host-removed")

	// An operator's word brings it back.
	check.Must(b.broker.CLI(ctx, "host", "reenrol", h.ID))(t)
	check.Must(by(unseen, false).Join(ctx, ""))(t)

	// Who answers for one key only has shown only that one, and a wrong answer fails.
	modest := soft()
	modest.More = []*lab.SoftTPM{soft().TPM}
	answered := func(edit func(*v1.ActivateRequest)) (*connect.Response[v1.ActivateResponse], error) {
		s := dial(t, modest)
		body := check.Must(proto.Marshal(modest.Application(token())))(t)
		c := check.Must(s.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body})))(t)
		a := check.Must(modest.Answer(s, body, c.Msg))(t)
		edit(a)
		return s.Hosts.Activate(ctx, connect.NewRequest(a))
	}
	_, err = answered(func(a *v1.ActivateRequest) { a.OtherSecrets[0][0] ^= 1 })
	outcome(t, err, api.Rejected, "activation")
	r := check.Must(answered(func(a *v1.ActivateRequest) { a.OtherSecrets = nil }))(t)
	check.Nil(t, b.broker.JSON(ctx, &shown, "host", "show", r.Msg.GetHostId()))
	if len(shown.EKs) != 1 {
		t.Errorf("recorded are %v", shown.EKs)
	}
}

// A proof that is judged before a join that was quoted earlier is no clone.
func TestAProofOvertakesAJoin(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)

	rejoin := func(between func()) {
		t.Helper()
		j := check.Must(h.DialWith(ctx, check.Must(lab.SelfSigned(h.TPM.TLSKey))(t)))(t)
		defer func() { _ = j.Close() }()
		body := check.Must(proto.Marshal(h.Application("")))(t)
		c := check.Must(j.Hosts.Join(ctx, connect.NewRequest(&v1.JoinRequest{Body: body})))(t)
		answer := check.Must(h.Answer(j, body, c.Msg))(t)
		between()
		if r, err := j.Hosts.Activate(ctx, connect.NewRequest(answer)); err != nil || r.Msg.GetPending() {
			t.Errorf("joining: %v, %v", r, err)
		}
	}
	prove := func() { check.Must(h.Prove(context.WithoutCancel(ctx), s, nil))(t) }
	rejoin(func() {})
	rejoin(prove)
	rejoin(func() { prove(); prove() })
	prove()
	if state := b.hostState(t, h.ID); state != "trusted" {
		t.Errorf("it is %s", state)
	}

	// A copy from before, which is asked after the proof, is one.
	old := *h
	old.TPM = h.TPM.Clone()
	for range 5 {
		prove()
	}
	old.TPM.ResetCount--
	if pending, err := old.Join(ctx, ""); err == nil && !pending {
		t.Error("a copy joined")
	}
	if state := b.hostState(t, h.ID); state != "quarantined" {
		t.Errorf("it is %s", state)
	}
	var reason json.RawMessage
	check.Nil(t, b.broker.JSON(ctx, &reason, "host", "show", h.ID))
	if !strings.Contains(string(reason), "went back") {
		t.Errorf("%s", reason)
	}
}

// A TPM whose keys belong to two hosts, as when each was registered by another EK, is the one
// that an operator says, from then on.
func TestOneTPMOfTwoHosts(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	act := func(args ...string) { t.Helper(); check.Must(b.broker.CLI(ctx, args...))(t) }
	one, two := joinerFrom(t, b), joinerFrom(t, b)
	join := func(h *lab.SoftHost) {
		t.Helper()
		check.Must(h.Join(ctx, check.Must(b.broker.JoinToken(ctx, "role=billing"))(t)))(t)
	}
	join(one)
	join(two)
	// An agent that shows both keys: the second host's AK and TLS key are of this TPM, too.
	both := *two
	both.More = []*lab.SoftTPM{one.TPM}
	again := func() (string, error) {
		h := both
		_, err := h.Join(ctx, "")
		return h.ID, err
	}
	_, err := again()
	outcome(t, err, api.Refused, "two-hosts")
	act("host", "remove", one.ID, "--reason", "the same machine")
	_, err = again()
	outcome(t, err, api.Rejected, "host-removed")
	act("host", "reenrol", two.ID)
	for range 3 {
		if id, err := again(); err != nil || id != two.ID {
			t.Errorf("enrolled anew: host %s, %v", id, err)
		}
	}
	if found := b.fsck(t); len(found) > 0 {
		t.Errorf("fsck: %q", found)
	}
	// What the tombstone has still is refused.
	_, err = one.Join(ctx, "")
	outcome(t, err, api.Rejected, "host-removed")
}
