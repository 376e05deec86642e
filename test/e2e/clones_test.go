package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A prover is a machine that proves itself as an agent does, and keeps what the answers give.
type prover struct {
	*lab.SoftHost
	session *api.Session
	last    []byte
}

// running is a machine with a host's keys.
func running(t *testing.T, h *lab.SoftHost) *prover {
	t.Helper()
	return &prover{SoftHost: h, session: dial(t, h)}
}

// copied is another machine that runs with the same TPM's state from now on.
func (m *prover) copied(t *testing.T) *prover {
	t.Helper()
	h := *m.SoftHost
	h.TPM = m.TPM.Clone()
	return &prover{SoftHost: &h, session: dial(t, &h), last: m.last}
}

// ask makes the evidence of a proof; send sends it, and keeps the answer unless it is lost.
func (m *prover) ask(ctx context.Context, t *testing.T) *v1.Attested {
	t.Helper()
	return check.Must(m.Attest(ctx, m.session, evidence.CallProve, &v1.ProveBody{Host: m.Facts(), Continuation: m.last}))(t)
}

func (m *prover) send(ctx context.Context, a *v1.Attested, lost bool) error {
	r, err := m.session.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: a}))
	if err == nil && !lost {
		m.last = r.Msg.GetContinuation()
	}
	return err
}

func (m *prover) prove(ctx context.Context, t *testing.T, lost bool) error {
	t.Helper()
	return m.send(ctx, m.ask(ctx, t), lost)
}

// Two machines that run at once with one TPM's state are found within four proofs, whichever
// goes first, and whether or not one of them passes for an older agent.
func TestLiveClonesAreFound(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	for name, c := range map[string]struct {
		forgets bool // the copy always shows nothing
		order   string
	}{
		"by turns":              {order: "abab"},
		"the copy first":        {order: "baba"},
		"one after the other":   {order: "aabb"},
		"an old agent's copy":   {forgets: true, order: "aba"},
		"an old agent's, first": {forgets: true, order: "baa"},
	} {
		t.Run(name, func(t *testing.T) {
			h := joined(t, b, services.TPMCA)
			one := running(t, h)
			for range 3 {
				check.Nil(t, one.prove(ctx, t, false))
			}
			two := one.copied(t)
			var err error
			for _, who := range c.order {
				m := one
				if who == 'b' {
					if m = two; c.forgets {
						m.last = nil
					}
				}
				if err = m.prove(ctx, t, false); err != nil {
					break
				}
			}
			outcome(t, err, api.Rejected, "continuation")
			if state := b.hostState(t, h.ID); state != "quarantined" {
				t.Errorf("the host is %s", state)
			}
			if log := string(check.Must(b.broker.CLI(ctx, "audit", "tail", "-n", "30", "-o", "json"))(t)); !strings.Contains(log, "finding.duplicate-instance") {
				t.Errorf("the log doesn't have it: %s", log)
			}

			// An operator has ended the copy, and lets the host go on.
			check.Must(b.broker.CLI(ctx, "host", "release", h.ID))(t)
			for range 3 {
				check.Nil(t, one.prove(ctx, t, false))
			}
			if err := two.prove(ctx, t, false); err == nil && !c.forgets {
				t.Error("the copy goes on, too")
			}
		})
	}
}

// A copy that takes its nonce before its original's proof, and proves itself after it, is
// found as well: nobody continues from the answer to a proof that was overtaken.
func TestOverlappingClonesAreFound(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	one := running(t, joined(t, b, services.TPMCA))
	check.Nil(t, one.prove(ctx, t, false))
	two := one.copied(t)
	var err error
	for range 6 {
		early := two.ask(ctx, t)
		if err = one.prove(ctx, t, false); err != nil {
			break
		}
		if err = two.send(ctx, early, false); err != nil {
			break
		}
	}
	outcome(t, err, api.Rejected, "continuation")
	if state := b.hostState(t, one.ID); state != "quarantined" {
		t.Errorf("the host is %s", state)
	}
}

// What an honest host meets is no copy: lost answers, a lost run folder, an agent that shows
// nothing, proofs that arrive late, joining again, and a broker that was restored.
func TestOneMachineIsNoClone(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	m := running(t, joined(t, b, services.TPMCA))
	prove := func(what string, lost bool) {
		t.Helper()
		if err := m.prove(ctx, t, lost); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for range 3 {
		prove("as it should be", false)
	}
	for range 3 {
		prove("its answer is lost", true)
	}
	prove("after lost answers", false)
	m.last = nil
	prove("after a boot", true)
	m.last = nil
	prove("after another", false)
	old := *m
	old.last = nil
	check.Nil(t, old.prove(ctx, t, false), old.prove(ctx, t, false)) // an older agent was put back
	m.last = nil
	prove("the newer agent again", false)

	// One that was sent, and given up by the agent, arrives after two later ones.
	late := m.ask(ctx, t)
	prove("while one is on its way", false)
	prove("while one is on its way, again", false)
	check.Nil(t, m.send(ctx, late, true))
	prove("after the late one", false)

	check.Must(m.Join(ctx, ""))(t)
	m.session = dial(t, m.SoftHost)
	prove("after joining again", false)

	backup := filepath.Join(b.dir, "backup.db")
	check.Must(b.broker.CLI(ctx, "broker", "backup", backup, "-c", b.broker.Config()))(t)
	for i := range 4 {
		prove(fmt.Sprint("after the backup, ", i), false)
	}
	check.Nil(t, b.broker.Stop())
	for _, ending := range []string{"", "-wal", "-shm"} {
		_ = os.Remove(filepath.Join(b.broker.State(), "store.db"+ending))
	}
	check.Must(b.broker.CLI(ctx, "broker", "restore", backup, "-c", b.broker.Config()))(t)
	check.Nil(t, b.broker.Start(ctx))
	m.session = dial(t, m.SoftHost)
	for i := range 4 {
		prove(fmt.Sprint("after the restore, ", i), i == 1)
	}
	if state := b.hostState(t, m.ID); state != "trusted" {
		t.Errorf("it is %s", state)
	}
}
