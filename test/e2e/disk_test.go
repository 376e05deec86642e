package e2e_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// storeSize is what the store has on disk.
func storeSize(t *testing.T, b *lab.Broker) (n int64) {
	t.Helper()
	for _, name := range []string{"store.db", "store.db-wal"} {
		n += check.Must(os.Stat(filepath.Join(b.State(), name)))(t).Size()
	}
	return n
}

// recorded counts the log's records of a host by kind, and returns the longest.
func recorded(t *testing.T, b *lab.Broker, host string) (kinds map[event.Kind]int, repeated int64, longest int) {
	t.Helper()
	kinds = map[event.Kind]int{}
	lines := bufio.NewScanner(bytes.NewReader(check.Must(b.CLI(check.Within(t, time.Minute), "audit", "export"))(t)))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		r := check.Must(event.Parse(lines.Bytes()))(t)
		if r.Host != host {
			continue
		}
		kinds[r.Kind]++
		longest = max(longest, len(lines.Bytes()))
		if e, ok := check.Must(r.Event())(t).(*event.Repeated); ok {
			repeated += e.Count
		}
	}
	return kinds, repeated, longest
}

// large is a program with so many mappings that its evidence has about 400 KiB; each
// number gives another.
func large(n int) func(*process.Program) {
	return func(p *process.Program) {
		for i := range 2000 {
			p.Mappings = append(p.Mappings, process.Mapping{Path: fmt.Sprintf("/usr/lib/%s/%d/%d.so", strings.Repeat("x", 160), n, i)})
		}
		p.PID, p.Start = 1000+n, uint64(1000+n)
	}
}

// One host that was admitted, or that waits to be, fills no disk by being refused,
// whatever it varies; what it holds is proven on, and operators hear of it.
func TestOneHostAndTheDisk(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 5*time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	honest := check.Must(h.Program(softExe, "billing", 7))(t)
	lease := check.Must(h.Issue(ctx, s, h.IssueBody("soft", honest)))(t) // the honest twin
	check.Must(h.Issue(ctx, s, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 0, large(0)))(t))))(t)
	before := storeSize(t, b.broker)

	const times = 150
	last := map[string]int{}
	ask := func(scope, exe string, n int) {
		t.Helper()
		_, err := h.Issue(ctx, s, h.IssueBody(scope, check.Must(h.Program(exe, "billing", 0, large(n)))(t)))
		e := api.FromConnect(err)
		if e == nil {
			t.Fatalf("scope %s for %s was issued", scope, exe)
		}
		last[e.Check]++
	}
	for n := range times {
		ask(fmt.Sprint("unknown-", n), softExe, n)
	}
	if last["policy"] != times {
		t.Errorf("unknown scopes: %v", last)
	}
	kinds, _, longest := recorded(t, b.broker, h.ID)
	if kinds[event.CredentialFault] < 1 || kinds[event.CredentialFault] > 80 || longest > 8<<10 {
		t.Errorf("%d requests for unknown scopes left %v, the longest of %d bytes", times, kinds, longest)
	}
	if grown := storeSize(t, b.broker) - before; grown > 12<<20 { // mostly the write-ahead log, which is bounded
		t.Errorf("%d requests for unknown scopes with %d KiB of evidence each grew the store by %d KiB", times, 400, grown>>10)
	}

	for n := range times {
		ask("soft", fmt.Sprint("/opt/other/", n), n)
	}
	if last["process.exe"] == 0 || last["host-budget"] == 0 {
		t.Errorf("refused programs with long evidence: %v", last)
	}
	if kinds, _, longest = recorded(t, b.broker, h.ID); kinds[event.CredentialRefused] < 1 || kinds[event.CredentialRefused] > 80 || longest > 8<<10 {
		t.Errorf("%d refused requests left %v, the longest of %d bytes", times, kinds, longest)
	}
	out, err := b.broker.CLI(ctx, "why", h.ID, "soft")
	if why := string(out); err == nil || !strings.Contains(why, "process.exe") || !strings.Contains(why, "/opt/other/") || !strings.Contains(why, softExe) {
		t.Errorf("why: %v: %s", err, out)
	}

	// Beyond its budget it is told so, and its lease lives on.
	_, err = h.Issue(ctx, s, h.IssueBody("soft", honest))
	outcome(t, err, api.Fault, "host-budget")
	r := check.Must(h.Prove(ctx, s, nil, &v1.LeaseProof{LeaseId: lease.GetLeaseId(), Scope: "soft", Program: honest, Ticket: lease.GetTicket()}))(t)
	if len(r.GetLeases()) != 1 || r.GetLeases()[0].GetOutcome() != "live" {
		t.Errorf("its lease is %v", r.GetLeases())
	}
	other := joined(t, b, services.TPMCA)
	check.Must(other.Issue(ctx, dial(t, other), other.IssueBody("soft", check.Must(other.Program(softExe, "billing", 7))(t))))(t)
	if out := string(check.Must(b.broker.CLI(ctx, "status"))(t)); !strings.Contains(out, "host "+h.ID+" is over its budget") {
		t.Errorf("status: %s", out)
	}
	answer := check.Must(http.Get("http://" + b.broker.Metrics + "/metrics"))(t)
	defer func() { _ = answer.Body.Close() }()
	text := string(check.Must(io.ReadAll(answer.Body))(t))
	for _, want := range []string{"countersign_hosts_over_budget 1", `countersign_host_over_budget{host="` + h.ID + `"} 1`, `countersign_disk_level{level="enough"} `, "countersign_disk_free_bytes "} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	check.Must(b.broker.CLI(ctx, "fsck", "-c", b.broker.Config()))(t)
}

// A host that may have a credential, and asks for it on and on without taking it, is
// over its budget after some: each lease keeps the evidence.
func TestAHostThatAsksOnAndOn(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	before := storeSize(t, b.broker)
	got := map[string]int{}
	for n := range 100 {
		// The same program but for its pid, which makes no more than eight of one.
		program := check.Must(h.Program(softExe, "billing", 0, large(0), func(p *process.Program) { p.PID, p.Start = 5000+n/4, uint64(n/4+1) }))(t)
		a := check.Must(h.Attest(ctx, s, evidence.CallIssue, h.IssueBody("soft", program)))(t)
		_, err := s.Hosts.Issue(ctx, connect.NewRequest(&v1.IssueRequest{Attested: a}))
		if err == nil {
			got["issued"]++
		} else {
			got[api.FromConnect(err).Check]++
		}
	}
	if got["issued"] == 0 || got["issued"] > 40 || got["host-budget"] < 60 {
		t.Errorf("100 requests: %v", got)
	}
	if grown := storeSize(t, b.broker) - before; grown > 80<<20 {
		t.Errorf("the store grew by %d KiB", grown>>10)
	}
}

// A host whose evidence is rejected over and over, and one that waits and joins over
// and over, each leave a few records.
func TestRepeatsAreCounted(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 3*time.Minute)
	h := joined(t, b, services.TPMCA)
	s := dial(t, h)
	check.Must(h.Prove(ctx, s, nil))(t) // the honest twin
	for range 200 {
		a := check.Must(h.Attest(ctx, s, evidence.CallProve, &v1.ProveBody{Host: h.Facts()}))(t)
		a.Quote.Pcrs = append(a.Quote.Pcrs, a.Quote.Pcrs[4])
		_, err := s.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: a}))
		outcome(t, err, api.Rejected, "pcr-duplicate")
	}
	if kinds, _, _ := recorded(t, b.broker, h.ID); kinds[event.HostFailed] > 2 { // it failed, and it failed again
		t.Errorf("200 rejected proofs left %v", kinds)
	}

	waiting := check.Must(lab.NewSoftHost(b.broker, services.TPMCA))(t)
	for range 8 {
		if pending := check.Must(waiting.Join(ctx, ""))(t); !pending {
			t.Fatal("nobody admitted it")
		}
	}
	if kinds, _, _ := recorded(t, b.broker, waiting.ID); kinds[event.HostPending] != 1 || kinds[event.HostJoined] > 1 {
		t.Errorf("8 joins of a host that waits left %v", kinds)
	}
	check.Must(b.broker.CLI(ctx, "host", "approve", waiting.ID))(t)
	if pending := check.Must(waiting.Join(ctx, ""))(t); pending {
		t.Error("it waits on")
	}
}
