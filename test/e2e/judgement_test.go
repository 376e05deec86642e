package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// Keys without a certificate can't take the places of those that wait.
func TestSoftwareKeysDontFillThePendingList(t *testing.T) {
	b := newBrokerWith(t, softScope, lab.BrokerOptions{Extra: "pending_hosts = 1"})
	ctx := check.Within(t, time.Minute)
	_, err := check.Must(lab.NewSoftHost(b.broker, nil))(t).Join(ctx, "")
	outcome(t, err, api.Refused, "ek-uncertified")
	h := check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t)
	if pending := check.Must(h.Join(ctx, ""))(t); !pending {
		t.Error("a certified TPM alone was admitted")
	}
	_, err = check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t).Join(ctx, "")
	outcome(t, err, api.Fault, "pending-full")
	// Who waits can't take the name of an admitted host either: both call
	// themselves soft.
	admitted := joined(t, b, services.TPMCA)
	out, err := b.broker.CLI(ctx, "host", "quarantine", "soft")
	if err != nil || !bytes.Contains(out, []byte(admitted.ID)) {
		t.Errorf("quarantine by name: %v: %s", err, out)
	}
}

// What failed a host is not mended by joining again.
func TestAFailedHostJoinsAgain(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	check.Must(h.Prove(ctx, dial(t, h), nil))(t)
	_, err := b.broker.CLI(ctx, "reference", "learn", "prod", "--host", h.ID)
	check.Nil(t, err)
	_, err = b.broker.CLI(ctx, "reference", "approve", "prod")
	check.Nil(t, err)
	check.Must(h.Prove(ctx, dial(t, h), nil))(t)
	h.TPM.PCRs[4] = evidence.Sum([]byte("another boot loader"))
	_, err = h.Prove(ctx, dial(t, h), nil)
	outcome(t, err, api.Rejected, "reference")
	check.Must(h.Join(ctx, ""))(t)
	if state := b.hostState(t, h.ID); state != "failed" {
		t.Errorf("a failed host that joined again is %s", state)
	}
	delete(h.TPM.PCRs, 4)
	check.Must(h.Prove(ctx, dial(t, h), nil))(t)
	if state := b.hostState(t, h.ID); state != "trusted" {
		t.Errorf("after a good proof it is %s", state)
	}
}

// A lease that comes back by its ticket stands in the journal, whatever is
// then decided on it.
func TestAdoptedLeasesAreNeverLost(t *testing.T) {
	for _, name := range []string{"scope unknown in the backup", "refused"} {
		t.Run(name, func(t *testing.T) {
			b := newBroker(t, softScope, false)
			ctx := check.Within(t, 2*time.Minute)
			h := joined(t, b, services.TPMCA)
			store := filepath.Join(b.broker.State(), "store.db")
			if name != "refused" {
				check.Nil(t, b.broker.ApplyScopes(ctx, strings.ReplaceAll(softScope, `"soft"`, `"other"`)))
			}
			check.Nil(t, b.broker.Stop())
			backup := check.Must(os.ReadFile(store))(t)
			check.Nil(t, b.broker.Start(ctx))
			check.Nil(t, b.broker.ApplyScopes(ctx, softScope))
			program := check.Must(h.Program(softExe, "billing", 7))(t)
			r := check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", program)))(t)
			check.Nil(t, b.broker.Stop())
			for _, ending := range []string{"-wal", "-shm"} {
				_ = os.Remove(store + ending)
			}
			check.Nil(t, os.WriteFile(store, backup, 0o600))
			check.Nil(t, b.broker.Start(ctx))
			if name == "refused" {
				_, err := b.broker.CLI(ctx, "host", "label", h.ID, "role=web")
				check.Nil(t, err)
			}
			proof := &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: program, Ticket: r.GetTicket()}
			for range 2 {
				check.Must(h.Prove(ctx, dial(t, h), nil, proof))(t)
			}
			_, err := b.broker.CLI(ctx, "host", "quarantine", h.ID)
			check.Nil(t, err)
			b.ended(t, r.GetLeaseId())
		})
	}
}

// Evidence of a program that the broker can't understand, in a version to come or
// of an agent that couldn't see it, decides nothing.
func TestEvidenceThatIsNotUnderstood(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	good := check.Must(h.Program(softExe, "billing", 7))(t)
	r := check.Must(h.Issue(ctx, s, h.IssueBody("soft", good)))(t)
	newer := bytes.Replace(good, []byte(`"version":2`), []byte(`"version":3`), 1)
	for what, program := range map[string][]byte{"none": nil, "a newer agent's": newer} {
		p := check.Must(h.Prove(ctx, s, nil, &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: program}))(t)
		if got := p.GetLeases()[0].GetOutcome(); got != "fault" {
			t.Errorf("%s: %s", what, got)
		}
	}
	_, err := h.Issue(ctx, s, h.IssueBody("soft", newer))
	outcome(t, err, api.Fault, "program-evidence")
	if live := b.leases(t, "--state", "live"); len(live) != 1 || b.hostState(t, h.ID) != "trusted" {
		t.Errorf("leases %+v of a host that is %s", live, b.hostState(t, h.ID))
	}
}

// Evidence in the first version, of agents from before the second, and with facts
// that this broker doesn't know, of agents to come, earns what it did, is kept as
// it came, and stays the same program's.
func TestEvidenceOfOtherVersions(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	second := check.Must(h.Program(softExe, "billing", 7))(t)
	var p process.Program
	check.Nil(t, json.Unmarshal(second, &p))
	first := check.Must(p.EncodeAs(1))(t)
	newer := bytes.Replace(second, []byte(`"linux":{`), []byte(`"linux":{"apparmor":"\u003cunconfined\u003e",`), 1)
	sent := map[string][]byte{"first": first, "second": second, "newer": newer}
	for name, program := range sent {
		r := check.Must(h.Issue(ctx, s, h.IssueBody("soft", program)))(t)
		if kept := check.Must(b.broker.CLI(ctx, "lease", "show", r.GetLeaseId()))(t); !bytes.Contains(kept, program) {
			t.Errorf("%s: kept as %s", name, kept)
		}
		for now, program := range sent {
			p := check.Must(h.Prove(ctx, s, nil, &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: program}))(t)
			if got := p.GetLeases()[0]; got.GetOutcome() != "live" {
				t.Errorf("issued to %s, proven by %s: %v", name, now, got)
			}
		}
	}
	without := bytes.Replace(newer, []byte(`"user":"billing"`), []byte(`"user":"root"`), 1)
	_, err := h.Issue(ctx, s, h.IssueBody("soft", without))
	outcome(t, err, api.Refused, "process.user")
}

// What the next proof shows of the last answer is another value each time, and
// bounded.
func TestContinuation(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	prove := func(shown []byte) (*v1.ProveResponse, error) {
		a := check.Must(h.Attest(ctx, s, evidence.CallProve, &v1.ProveBody{Host: h.Facts(), Continuation: shown}))(t)
		r, err := s.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: a}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	}
	first := check.Must(prove(nil))(t).GetContinuation()
	second := check.Must(prove(first))(t).GetContinuation()
	if len(first) < 16 || len(first) > api.MaxContinuation || bytes.Equal(first, second) {
		t.Errorf("%x, then %x", first, second)
	}
	check.Must(prove(make([]byte, api.MaxContinuation)))(t) // nobody's, and so none
	_, err := prove(make([]byte, api.MaxContinuation+1))
	outcome(t, err, api.Fault, "request")
}

// An order in a loose scope doesn't stretch a tight one's grace.
func TestGraceIsEachScopesOwn(t *testing.T) {
	b := newBroker(t, scopeWith("tight", "5s", "3s")+scopeWith("loose", "30m", "12h"), false)
	ctx := check.Within(t, 2*time.Minute)
	proving(t, joined(t, b, services.TPMCA), nothing)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	tight := check.Must(h.Issue(ctx, s, h.IssueBody("tight", check.Must(h.Program(softExe, "billing", 7))(t))))(t).GetLeaseId()
	loose := check.Must(h.Issue(ctx, s, h.IssueBody("loose", check.Must(h.Program(softExe, "billing", 8))(t))))(t).GetLeaseId()
	b.endedWithin(t, 40*time.Second, tight)
	if live := b.leases(t, "--host", h.ID, "--state", "live"); len(live) != 1 || live[0].ID != loose {
		t.Errorf("leases %+v, want %s alone", live, loose)
	}
}

// Many orders race with a quarantine: nothing stands afterwards.
func TestQuarantineWinsEveryRace(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	h := joined(t, b, services.TPMCA)
	done := make(chan error)
	const workers = 8
	for w := range workers {
		go func() {
			s, err := h.Dial(ctx)
			for i := 0; err == nil; i++ {
				var p []byte
				if p, err = h.Program(softExe, "billing", 100+w*1000+i); err == nil {
					_, err = h.Issue(ctx, s, h.IssueBody("soft", p))
				}
			}
			done <- err
		}()
	}
	check.Eventually(t, 30*time.Second, "all are at it", func() (bool, string) {
		n := len(b.leases(t, "--host", h.ID))
		return n >= 2*workers, fmt.Sprint(n)
	})
	_, err := b.broker.CLI(ctx, "host", "quarantine", h.ID)
	check.Nil(t, err)
	for range workers {
		<-done
	}
	if out, err := b.broker.CLI(ctx, "why", h.ID, "soft"); err == nil || !bytes.Contains(out, []byte("the host is quarantined")) {
		t.Errorf("why: %v: %s", err, out)
	}
	check.Eventually(t, 30*time.Second, "nothing stands", func() (bool, string) {
		left := b.leases(t, "--host", h.ID)
		return len(left) == 0, fmt.Sprint(left)
	})
}

// Junk is answered with errors, and nothing else comes of it.
func TestJunk(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	h := joined(t, b, services.TPMCA)
	client, url := rawClient(t, b, h)
	seed := time.Now().UnixNano()
	t.Log("seed", seed)
	random := rand.New(rand.NewSource(seed))
	for _, call := range []string{"Join", "Activate", "Challenge", "Prove", "Issue", "Acknowledge", "Release"} {
		for i := range 60 {
			body := make([]byte, random.Intn(4000))
			random.Read(body)
			kind := "application/proto"
			switch i % 4 {
			case 1:
				kind, body = "application/json", []byte(strings.Repeat(`{"a":`, random.Intn(20000)))
			case 2:
				kind = "application/grpc"
			case 3:
				a := &v1.Attested{Body: body, Nonce: body[:min(len(body), 32)], Quote: &v1.Quote{Attest: body, Signature: body}}
				m := map[string]proto.Message{
					"Join": &v1.JoinRequest{Body: body}, "Prove": &v1.ProveRequest{Attested: a, Checkpoint: body}, "Issue": &v1.IssueRequest{Attested: a},
					"Release": &v1.ReleaseRequest{LeaseIds: make([]string, 1000), Reason: strings.Repeat("é", 200)},
				}[call]
				if m == nil {
					m = &v1.AcknowledgeRequest{LeaseId: strings.Repeat("a", 100000)}
				}
				body = check.Must(proto.Marshal(m))(t)
			}
			res, err := client.Post(url+"/countersign.v1.HostService/"+call, kind, bytes.NewReader(body))
			if err == nil {
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
		}
	}
	if log := check.Must(os.ReadFile(b.broker.Log()))(t); bytes.Contains(log, []byte("panic")) {
		t.Error("a request panicked")
	}
	if state := b.hostState(t, h.ID); state != "trusted" {
		t.Errorf("the host is %s", state)
	}
	check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 7))(t))))(t)
}

// What a host says of itself is kept with each decision for good: it is short,
// printable, and not said too often.
func TestAHostsWordIsBounded(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	program := check.Must(h.Program(softExe, "billing", 7))(t)
	lease := check.Must(h.Issue(ctx, s, h.IssueBody("soft", program)))(t).GetLeaseId() // the honest twin
	for name, os := range map[string]string{"long": strings.Repeat("x", 300), "escapes": "linux\x1b[2J"} {
		body := h.IssueBody("soft", program)
		body.Host.Os = os
		_, err := h.Issue(ctx, s, body)
		if e := api.FromConnect(err); e == nil || e.Outcome != api.Fault || e.Check != "request" {
			t.Errorf("%s: %v, want a fault of the request", name, err)
		}
	}
	_, err := s.Hosts.Release(ctx, connect.NewRequest(&v1.ReleaseRequest{LeaseIds: []string{lease}, Reason: "x\x1b[2K\nFAKE  row"}))
	check.Nil(t, err)
	if out := string(check.Must(b.broker.CLI(ctx, "lease", "list", "--all", "-o", "json"))(t)); strings.Contains(out, `\u001b`) || !strings.Contains(out, "FAKE") {
		t.Errorf("the reason as it is kept: %s", out)
	}
	for range 10_000 { // the burst, and what comes back in the meantime
		if _, err = s.Hosts.Issue(ctx, connect.NewRequest(&v1.IssueRequest{})); api.FromConnect(err).Check == "ask-rate" {
			return
		}
	}
	t.Errorf("a host may ask on and on: %v", err)
}

// Evidence of a program whose package was upgraded under it is still its own:
// see collect. A mapping that is said to be the exe's, deleted, is refused.
func TestADeletedMappingOfTheExe(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	program := check.Must(h.Program(softExe, "billing", 7, func(p *process.Program) {
		p.Mappings = []process.Mapping{{Path: softExe, Deleted: true}}
	}))(t)
	_, err := h.Issue(ctx, dial(t, h), h.IssueBody("soft", program))
	outcome(t, err, api.Refused, "process.mappings")
}
