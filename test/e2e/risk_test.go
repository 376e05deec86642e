package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// operators is root's way to the broker.
func (b *bench) operators() countersignv1connect.OperatorServiceClient {
	return countersignv1connect.NewOperatorServiceClient(&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(b.broker.State(), "operator.sock"))
		}}}, "http://broker")
}

// seen is a finding of something that happens now.
func seen(edits ...func(*v1.Finding)) *v1.Finding {
	f := &v1.Finding{Detector: "foreign-source", Cause: "a test", Severity: "high", First: timestamppb.Now(), Last: timestamppb.Now(), Count: 1}
	for _, edit := range edits {
		edit(f)
	}
	return f
}

func (b *bench) report(t *testing.T, f *v1.Finding) *v1.ReportFindingResponse {
	t.Helper()
	return check.Must(b.operators().ReportFinding(check.Within(t, time.Minute), connect.NewRequest(&v1.ReportFindingRequest{Finding: f})))(t).Msg
}

const riskyScope = `
scope %q {
  host    { labels = { role = "billing" } }
  process {
    exe  = "/opt/billing/bin/billingd"
    user = "billing"
  }
  when = "!(has(subject.risk) && subject.risk >= 50)"
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

// An open finding raises the risk of what it is about, a lease's scope or the whole
// host, and of nothing else; a closed one does not.
func TestRisk(t *testing.T) {
	b := newBroker(t, fmt.Sprintf(riskyScope, "one")+fmt.Sprintf(riskyScope, "two"), false)
	ctx := check.Within(t, 2*time.Minute)
	h, other := joined(t, b, services.TPMCA), joined(t, b, services.TPMCA)
	s := dial(t, h)
	program := check.Must(h.Program(softExe, "billing", 7))(t)
	leases := map[string]string{}
	order := func(scope string) error {
		r, err := h.Issue(ctx, s, h.IssueBody(scope, program))
		if err == nil {
			leases[scope] = r.GetLeaseId()
		}
		return err
	}
	check.Nil(t, order("one"))
	check.Nil(t, order("two"))
	prove := func() map[string]string {
		t.Helper()
		out := map[string]string{}
		p := check.Must(h.Prove(ctx, s, nil, &v1.LeaseProof{LeaseId: leases["one"], Scope: "one", Program: program},
			&v1.LeaseProof{LeaseId: leases["two"], Scope: "two", Program: program}))(t)
		for i, scope := range []string{"one", "two"} {
			out[scope] = p.GetLeases()[i].GetOutcome()
		}
		return out
	}
	expect := func(what, one, two string) {
		t.Helper()
		if got := prove(); got["one"] != one || got["two"] != two {
			t.Errorf("%s: one is %s, two is %s; want %s and %s", what, got["one"], got["two"], one, two)
		}
	}
	expect("no finding", "live", "live")
	b.report(t, seen(func(f *v1.Finding) { f.Host = other.ID }))
	b.report(t, seen(func(f *v1.Finding) { f.Cause, f.Severity, f.Lease = "less", "medium", leases["one"] }))
	expect("another host's, and less", "live", "live")

	f := b.report(t, seen(func(f *v1.Finding) { f.Cause, f.Lease = "lease "+leases["one"], leases["one"] }))
	if !f.GetOpened() || f.GetFinding().GetHost() != h.ID {
		t.Errorf("reported: %v", f)
	}
	expect("a finding about the lease", "refused", "live")
	outcome(t, order("one"), api.Refused, "when")
	b.ended(t, leases["one"])
	out, err := b.broker.CLI(ctx, "why", h.ID, "one")
	if err == nil || !bytes.Contains(out, []byte("with a subject.risk of 60")) {
		t.Errorf("why: %v\n%s", err, out)
	}
	risk := func(args ...string) (risk *int) {
		t.Helper()
		var facts struct{ Subject struct{ Risk *int } }
		check.Nil(t, b.broker.JSON(ctx, &facts, append([]string{"scope", "facts", "--host", h.ID}, args...)...))
		return facts.Subject.Risk
	}
	if r := risk("--scope", "one"); r == nil || *r != 60 {
		t.Errorf("scope facts: %v, want 60", r)
	}
	if r := risk(); r != nil {
		t.Errorf("scope facts of the host: %v, want none", *r)
	}
	_, err = b.broker.CLI(ctx, "finding", "close", f.GetFinding().GetId(), "--reason", "a test")
	check.Nil(t, err)
	if out, err := b.broker.CLI(ctx, "why", h.ID, "one"); err != nil {
		t.Errorf("why, once it is closed: %v\n%s", err, out)
	}
	check.Nil(t, order("one"))
	expect("closed", "live", "live")

	b.report(t, seen(func(f *v1.Finding) { f.Cause, f.Host, f.Severity = "the host", h.ID, "critical" }))
	var plan struct {
		Leases []struct{ Change string }
	}
	check.Nil(t, b.broker.JSON(ctx, &plan, "scope", "plan", b.broker.Scopes()))
	if len(plan.Leases) != 2 || plan.Leases[0].Change != "loses" || plan.Leases[1].Change != "loses" {
		t.Errorf("plan: %+v", plan)
	}
	expect("a finding about the host", "refused", "refused")
	if r := risk(); r == nil || *r != 90 {
		t.Errorf("scope facts of the host: %v, want 90", r)
	}
	if out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config()).CombinedOutput(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

// Who only reads reports nothing, and who reports closes nothing.
func TestWhoReportsAndWhoCloses(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	as := func(role string) countersignv1connect.OperatorServiceClient {
		out := filepath.Join(b.dir, role)
		_, err := b.broker.CLI(ctx, "operator", "add", role, "--role", role, "--out", out)
		check.Nil(t, err)
		cert := check.Must(tls.LoadX509KeyPair(out+".crt", out+".key"))(t)
		s := check.Must(api.Dial(ctx, api.Peer{Addresses: []string{"https://" + b.broker.Addr}, CASHA256: b.broker.CASHA256, Certificate: &cert}))(t)
		t.Cleanup(func() { _ = s.Close() })
		return s.Operators
	}
	viewer, responder, operator := as("viewer"), as("responder"), as("operator")
	denied := func(what string, err error) {
		t.Helper()
		if connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s: %v", what, err)
		}
	}
	report := connect.NewRequest(&v1.ReportFindingRequest{Finding: seen()})
	_, err := viewer.ReportFinding(ctx, report)
	denied("a viewer reports", err)
	r := check.Must(responder.ReportFinding(ctx, report))(t)
	shut := connect.NewRequest(&v1.CloseFindingRequest{Finding: r.Msg.GetFinding().GetId(), Reason: "mine"})
	_, err = responder.CloseFinding(ctx, shut)
	denied("a responder closes", err)
	_, err = viewer.ListCanaries(ctx, connect.NewRequest(&v1.ListCanariesRequest{}))
	denied("a viewer lists canaries", err)
	check.Must(operator.CloseFinding(ctx, shut))(t)
	// By evidence it may, where nothing was done about it.
	acted, alert := seen(), seen()
	acted.Cause, acted.Detector, acted.Response = "acted on", "unmatched-login", "quarantine"
	alert.Cause, alert.Detector, alert.Response = "an alert", "unmatched-login", "alert"
	for _, c := range []struct {
		finding *v1.Finding
		want    string
	}{{acted, "open  "}, {alert, "closed it is over responder"}} {
		check.Must(responder.ReportFinding(ctx, connect.NewRequest(&v1.ReportFindingRequest{Finding: c.finding})))(t)
		over := check.Must(responder.ReportFinding(ctx, connect.NewRequest(&v1.ReportFindingRequest{Finding: c.finding, Over: "it is over"})))(t)
		f := over.Msg.GetFinding()
		if got := fmt.Sprint(f.GetStatus(), " ", f.GetReason(), " ", f.GetClosedBy()); got != c.want {
			t.Errorf("%s: %q, want %q", c.finding.GetCause(), got, c.want)
		}
	}
	_, err = responder.ReportFinding(ctx, connect.NewRequest(&v1.ReportFindingRequest{}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a report of nothing: %v", err)
	}
}

// A host whose list has changed where the broker had read it before is not noticed,
// until it has to show the whole.
func TestStepUp(t *testing.T) {
	h := newMeasuredHost(t, measuredScope)
	h.trusted(t)
	list := check.Must(os.OpenFile(h.imaList, os.O_RDWR, 0))(t)
	defer func() { _ = list.Close() }()
	var at [1]byte
	const place = 40 // within the first entry's data
	check.Must(list.ReadAt(at[:], place))(t)
	check.Must(list.WriteAt([]byte{at[0] ^ 1}, place))(t)
	proved := func() string {
		var out struct {
			LastProved string `json:"last_proved"`
		}
		check.Nil(t, h.broker.JSON(check.Within(t, time.Minute), &out, "host", "show", h.host))
		return out.LastProved
	}
	for range 2 {
		before := proved()
		check.Eventually(t, 30*time.Second, "another proof", func() (bool, string) { return proved() != before, before })
	}
	if state, reason := h.state(t); state != "trusted" {
		t.Fatalf("before the step-up it is %s: %s", state, reason)
	}
	h.cli(t, "host", "step-up", h.host, "--reason", "a finding")
	check.Eventually(t, 30*time.Second, "the host fails", func() (bool, string) {
		state, reason := h.state(t)
		return state == "failed", state + ": " + reason
	})
	if log := h.cli(t, "audit", "export"); !strings.Contains(log, `"kind":"host.step-up","actor":"operator:root","host":"`+h.host) {
		t.Error("the audit log has no record of the step-up")
	}
}

// An entry of the ledger, as far as tests read it.
type exported struct {
	ID, Scope, Host, Kind string
	Subject               struct{ Boot string }
	Names                 map[string]string
	Sources               []string
}

func (b *bench) exported(t *testing.T) map[string]exported {
	t.Helper()
	out := map[string]exported{}
	d := json.NewDecoder(bytes.NewReader(check.Must(b.broker.CLI(check.Within(t, time.Minute), "lease", "export"))(t)))
	for d.More() {
		var e exported
		check.Nil(t, d.Decode(&e))
		out[e.ID] = e
	}
	return out
}

const staticScope = `
scope "static" {
  host    { labels = { role = "billing" } }
  process {
    exe  = "/opt/billing/bin/billingd"
    user = "billing"
  }
  audience = ["postgres://db1.example.com/billing"]
  vault {
    path = "kv-risk/billing"
    ttl  = "30m"
  }
}
`

// The ledger tells equal secrets, also over a restart, and where a secret without a
// lease was read; a canary stands among the real ones.
func TestLedger(t *testing.T) {
	ctx := check.Within(t, 2*time.Minute)
	vault := check.Must(services.Vault.Client())(t).Logical()
	_, err := vault.WriteWithContext(ctx, "sys/mounts/kv-risk", map[string]any{"type": "kv"})
	check.Nil(t, err)
	write := func(password string) {
		_, err := vault.WriteWithContext(ctx, "kv-risk/billing", map[string]any{"username": "billing", "password": password})
		check.Nil(t, err)
	}
	write("one")
	b := newBroker(t, softScope+staticScope, false)
	h := joined(t, b, services.TPMCA)
	program := check.Must(h.Program(softExe, "billing", 7))(t)
	issued := func(scope string) string {
		t.Helper()
		return check.Must(h.Issue(ctx, dial(t, h), h.IssueBody(scope, program)))(t).GetLeaseId()
	}
	first, second, dynamic, another := issued("static"), issued("static"), issued("soft"), issued("soft")
	check.Nil(t, b.broker.Stop())
	check.Nil(t, b.broker.Start(ctx))
	third := issued("static")
	write("two")
	rotated := issued("static")
	canary := check.Must(b.broker.CLI(ctx, "canary", "issue", "--scope", "soft"))(t)

	all := b.exported(t)
	sum := func(id string) string {
		t.Helper()
		s := all[id].Names["secret_hmac"]
		if len(s) != 64 {
			t.Errorf("lease %s has the fingerprint %q", id, s)
		}
		return s
	}
	if sum(first) != sum(second) || sum(first) != sum(third) {
		t.Error("one password has several fingerprints")
	}
	if sum(first) == sum(rotated) || sum(dynamic) == sum(another) || sum(dynamic) == sum(first) {
		t.Error("two passwords have one fingerprint")
	}
	if names := all[first].Names; names["vault_path"] != "kv-risk/billing" || names["db_username"] != "billing" {
		t.Errorf("the static secret's names are %v", names)
	}
	if got, ok := all[dynamic].Names["vault_path"]; ok {
		t.Errorf("a lease's path is named beside it: %q", got)
	}
	var canaries []exported
	for _, e := range all {
		if e.Kind == "canary" {
			canaries = append(canaries, e)
		}
	}
	genuine := all[another].Names["db_username"]
	if len(canaries) != 1 || !strings.Contains(string(canary), "username="+canaries[0].Names["db_username"]+"\n") {
		t.Fatalf("canaries %+v, printed %s", canaries, canary)
	}
	name := canaries[0].Names["db_username"]
	if head, _, _ := strings.Cut(genuine, "billing"); len(name) != len(genuine) || !strings.HasPrefix(name, head+"billing") || name == genuine || roleExists(t, name) {
		t.Errorf("the canary's %s does not look like %s, or is real", name, genuine)
	}
	if _, err := b.broker.CLI(ctx, "canary", "issue", "--scope", "soft", "--username", genuine); err == nil {
		t.Error("a canary has the name of a credential that was issued")
	}
	if out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config()).CombinedOutput(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

// A host that moves is known at both addresses.
func TestSources(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	h := joined(t, b, services.TPMCA)
	program := check.Must(h.Program(softExe, "billing", 7))(t)
	s := dial(t, h)
	id := check.Must(h.Issue(ctx, s, h.IssueBody("soft", program)))(t).GetLeaseId()
	at := b.exported(t)[id].Sources
	if len(at) != 1 {
		t.Fatalf("issued to %v", at)
	}
	check.Nil(t, s.Close())
	moved := check.Must(api.Dial(ctx, api.Peer{Addresses: []string{"https://" + movedTo(t, "127.0.0.77", b.broker.Addr)}, CASHA256: b.broker.CASHA256, Certificate: h.Certificate()}))(t)
	defer func() { _ = moved.Close() }()
	p := check.Must(h.Prove(ctx, moved, nil, &v1.LeaseProof{LeaseId: id, Scope: "soft", Program: program}))(t)
	if got := p.GetLeases()[0].GetOutcome(); got != "live" {
		t.Fatalf("after the move it is %s", got)
	}
	if got := b.exported(t)[id].Sources; !slices.Equal(got, append(at, "127.0.0.77")) {
		t.Errorf("sources %v, want %v and 127.0.0.77", got, at)
	}
}

// movedTo forwards connections to the broker, which sees them come from address.
func movedTo(t *testing.T, address, broker string) string {
	t.Helper()
	host, _, err := net.SplitHostPort(broker)
	check.Nil(t, err)
	l := check.Must(net.Listen("tcp", net.JoinHostPort(host, "0")))(t)
	t.Cleanup(func() { _ = l.Close() })
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := d.Dial("tcp", broker)
			if err != nil {
				t.Error(err)
				_ = in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
	}()
	return l.Addr().String()
}
