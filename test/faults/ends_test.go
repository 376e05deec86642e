package faults_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const (
	day  = 24 * time.Hour
	year = 365 * day
)

// absences are how long hosts, the watch and operators are off.
var absences = []struct {
	name string
	time time.Duration
}{{"31 days", 31 * day}, {"400 days", 400 * day}, {"21 years", 21 * year}}

// A stepped clock is a file that programs of the faults build go by.
type stepped string

func newStepped(t *testing.T, file string) stepped {
	t.Helper()
	c := stepped(file)
	c.to(t, 0)
	return c
}

func (c stepped) to(t *testing.T, ahead time.Duration) {
	t.Helper()
	// Whole or not at all: a program may read it at any time.
	check.Nil(t, os.WriteFile(string(c)+".new", fmt.Append(nil, int64(ahead/time.Second)), 0o600))
	check.Nil(t, os.Rename(string(c)+".new", string(c)))
}

func (c stepped) env() string { return "COUNTERSIGN_CLOCK_FILE=" + string(c) }

func (c stepped) now() time.Time {
	text, _ := os.ReadFile(string(c))
	seconds, _ := strconv.ParseInt(string(text), 10, 64)
	return time.Now().Add(time.Duration(seconds) * time.Second)
}

// cli runs the broker's program by this clock, with whatever standing its
// arguments give it.
func (c stepped) cli(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(check.Within(t, time.Minute), check.Must(lab.Program("countersign", true))(t), args...)
	cmd.Env = append(os.Environ(), c.env())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// restart stops the broker and starts it by c.
func (s *site) restart(t *testing.T, c stepped) {
	t.Helper()
	check.Nil(t, s.broker.Stop())
	check.Nil(t, s.broker.Start(check.Within(t, time.Minute), c.env()))
}

type hostState struct {
	State  string `json:"state"`
	Reason string `json:"state_reason"`
}

func (s *site) hostState(t *testing.T, id string) hostState {
	t.Helper()
	var out hostState
	check.Nil(t, s.broker.JSON(check.Within(t, time.Minute), &out, "host", "show", id))
	return out
}

type agentStatus struct {
	HostID          string    `json:"host_id"`
	Problem         string    `json:"problem"`
	Attention       string    `json:"attention"`
	Proved          time.Time `json:"proved"`
	CertificateEnds time.Time `json:"certificate_ends"`
}

func statusOf(t *testing.T, a *lab.Agent) (st agentStatus) {
	t.Helper()
	check.Nil(t, json.Unmarshal(check.Must(a.CLI(check.Within(t, time.Minute), "status", "-o", "json"))(t), &st))
	return st
}

// A host that was off for longer than its certificate lives comes back without a
// token and without an operator, and earns its credential again.
func TestHostsThatWereOff(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 10*time.Minute)
	clock := newStepped(t, filepath.Join(s.dir, "clock"))
	file := filepath.Join(s.dir, "credential")
	agent := s.newAgent(t, file)
	s.restart(t, clock)
	s.sleep(t)
	check.Nil(t, agent.Start(ctx, clock.env()))
	inForce(t, s, file)
	id := statusOf(t, agent).HostID

	// While it is on, the certificate is renewed at two thirds, and not before.
	for _, at := range []time.Duration{19 * day, 20*day + time.Hour} {
		renewed := at > 20*day
		ends := statusOf(t, agent).CertificateEnds
		clock.to(t, at)
		s.restart(t, clock)
		since := statusOf(t, agent).Proved
		check.Eventually(t, 30*time.Second, "proven", func() (bool, string) {
			st := statusOf(t, agent)
			return st.Problem == "" && st.Proved.After(since), fmt.Sprintf("%+v", st)
		})
		if now := statusOf(t, agent).CertificateEnds; now.After(ends) != renewed {
			t.Errorf("after %s: until %s, was until %s", at, now, ends)
		}
	}
	if said := string(check.Must(os.ReadFile(agent.Log()))(t)); strings.Contains(said, "join again") {
		t.Errorf("it joined again:\n%s", said)
	}

	for _, off := range absences {
		t.Run(off.name, func(t *testing.T) {
			check.Nil(t, agent.Stop())
			clock.to(t, 21*day+off.time)
			s.restart(t, clock)
			// It boots: what it had in memory is gone.
			check.Nil(t, os.RemoveAll(filepath.Join(agent.Dir, "run")))

			doctor, _ := agentCLI(t, agent, clock, "doctor")
			if !strings.Contains(doctor, "joins again by itself") {
				t.Errorf("doctor says nothing of the certificate: %s", doctor)
			}
			check.Nil(t, agent.Start(ctx, clock.env()))
			check.Eventually(t, 30*time.Second, "proven", func() (bool, string) {
				st := statusOf(t, agent)
				return st.Problem == "" && !st.Proved.IsZero() && st.CertificateEnds.After(clock.now()), fmt.Sprintf("%+v", st)
			})
			inForce(t, s, file)
			if st := statusOf(t, agent); st.HostID != id {
				t.Errorf("it came back as another host: %s, was %s", st.HostID, id)
			}
			if st := s.hostState(t, id); st.State != "trusted" {
				t.Errorf("%+v", st)
			}
			if doctor, _ := agentCLI(t, agent, clock, "doctor"); strings.Contains(doctor, "joins again by itself") {
				t.Errorf("doctor is not content: %s", doctor)
			}
		})
	}

	// The CA that agents pin has ended: everybody who can do something hears of it.
	const rotate = "Rotate CAs"
	if st := statusOf(t, agent); !strings.Contains(st.Attention, rotate) {
		t.Errorf("the agent's status: %+v", st)
	}
	if said, _ := agentCLI(t, agent, clock, "doctor"); !strings.Contains(said, "broker-ca") || !strings.Contains(said, rotate) {
		t.Errorf("doctor: %s", said)
	}
	if said := string(check.Must(s.broker.CLI(ctx, "status"))(t)); !strings.Contains(said, "ALARM: host-ca ended at") || !strings.Contains(said, rotate) {
		t.Errorf("the broker's status: %s", said)
	}
	for _, log := range []string{agent.Log(), s.broker.Log()} {
		if said := string(check.Must(os.ReadFile(log))(t)); !strings.Contains(said, rotate) {
			t.Errorf("%s doesn't speak of it:\n%s", log, said)
		}
	}
	s.invariants(t)
}

func agentCLI(t *testing.T, a *lab.Agent, c stepped, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(check.Within(t, time.Minute), check.Must(lab.Program("countersign-agent", true))(t), append(args, "-c", a.Config())...)
	cmd.Env = append(os.Environ(), c.env())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// A certificate that has ended opens what joining needs, and joining again lets
// in nobody who was out, and no other key.
func TestEndedCertificatesLetNobodyIn(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 5*time.Minute)
	clock := newStepped(t, filepath.Join(s.dir, "clock"))
	s.restart(t, clock)
	joined := func() *lab.SoftHost {
		h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
		h.Now = clock.now
		check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
		return h
	}
	dial := func(h *lab.SoftHost) *api.Session {
		session := check.Must(h.Dial(ctx))(t)
		t.Cleanup(func() { _ = session.Close() })
		return session
	}
	refused := func(what string, err error, outcome api.Outcome, word string) {
		t.Helper()
		if err == nil {
			t.Errorf("%s: it was let in", what)
			return
		}
		if e := api.FromConnect(err); e.Outcome != outcome || e.Check != word {
			t.Errorf("%s: %v, want %s (%s)", what, e, outcome, word)
		}
	}

	honest, quarantined, removed, failed, otherTLS, otherAK := joined(), joined(), joined(), joined(), joined(), joined()
	check.Must(s.broker.CLI(ctx, "host", "quarantine", quarantined.ID, "--reason", "seen elsewhere"))(t)
	check.Must(s.broker.CLI(ctx, "host", "remove", removed.ID))(t)
	fail(t, ctx, failed, dial(failed))
	if st := s.hostState(t, failed.ID); st.State != "failed" {
		t.Fatalf("%+v", st)
	}
	before := map[string]hostState{}
	for _, h := range []*lab.SoftHost{quarantined, removed, failed} {
		before[h.ID] = s.hostState(t, h.ID)
	}

	clock.to(t, 31*day)
	s.restart(t, clock)
	session := dial(honest)
	body := honest.IssueBody("soft", check.Must(honest.Program(softExe, "billing", 7))(t))
	_, err := honest.Issue(ctx, session, body)
	refused("a credential by an ended certificate", err, api.Fault, api.CheckCertificate)
	_, err = honest.Prove(ctx, session, nil)
	refused("a proof by an ended certificate", err, api.Fault, api.CheckCertificate)
	_, err = session.Hosts.Release(ctx, connect.NewRequest(&v1.ReleaseRequest{}))
	refused("a release by an ended certificate", err, api.Fault, api.CheckCertificate)
	if _, err := session.Operators.GetStatus(ctx, connect.NewRequest(&v1.GetStatusRequest{})); err == nil {
		t.Error("a host's ended certificate opened the operators' service")
	}
	if pending := check.Must(honest.Join(ctx, ""))(t); pending {
		t.Fatal("an honest host waits")
	}
	check.Must(honest.Issue(ctx, dial(honest), body))(t)

	_, err = quarantined.Join(ctx, "")
	refused("a quarantined host", err, api.Rejected, "host-quarantined")
	_, err = removed.Join(ctx, "")
	refused("a removed host", err, api.Rejected, "host-removed")
	check.Must(failed.Join(ctx, ""))(t)
	for _, h := range []*lab.SoftHost{quarantined, removed, failed} {
		if now := s.hostState(t, h.ID); now != before[h.ID] {
			t.Errorf("was %+v, is %+v", before[h.ID], now)
		}
	}

	check.Nil(t, otherTLS.TPM.NewTLSKey())
	if pending := check.Must(otherTLS.Join(ctx, ""))(t); !pending {
		t.Error("another TLS key was let in")
	}
	thief := check.Must(lab.NewSoftHost(s.broker, nil))(t)
	thief.Now = clock.now
	thief.TPM.TakeEK(otherAK.TPM)
	if pending := check.Must(thief.Join(ctx, ""))(t); !pending {
		t.Error("another AK was let in")
	}
	stranger := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
	stranger.Now = clock.now
	if pending := check.Must(stranger.Join(ctx, ""))(t); !pending {
		t.Error("a stranger was let in")
	}
	s.invariants(t)
}

// fail has the broker hold false evidence against a host.
func fail(t *testing.T, ctx context.Context, h *lab.SoftHost, session *api.Session) {
	t.Helper()
	a := check.Must(h.Attest(ctx, session, evidence.CallProve, &v1.ProveBody{Host: h.Facts()}, func(q *tpm2.TPMSAttest) { q.Magic++ }))(t)
	if _, err := session.Hosts.Prove(ctx, connect.NewRequest(&v1.ProveRequest{Attested: a})); api.FromConnect(err).Outcome != api.Rejected {
		t.Fatalf("false evidence: %v", err)
	}
}

const tlsScope = `
scope "tls" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = "/opt/billing/bin/billingd" }
  certificate {
    dns = ["billing.lab.example"]
    ttl = "1h"
  }
}
`

// A broker whose clock is a month ahead for an hour: when the clock is back,
// hosts, operators and verifiers are at once as they were, and nothing that was
// revoked is good again.
func TestClockAMonthAhead(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted=%v", restarted), func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{CA: `crl_every = "1h"`})
			ctx := check.Within(t, 5*time.Minute)
			check.Nil(t, s.broker.ApplyScopes(ctx, fmt.Sprintf(scopes, s.sleeper)+tlsScope))
			clock := newStepped(t, filepath.Join(s.dir, "clock"))
			s.restart(t, clock)
			file := filepath.Join(s.dir, "credential")
			agent := s.newAgent(t, file)
			s.sleep(t)
			check.Nil(t, agent.Start(ctx))
			inForce(t, s, file)
			id := statusOf(t, agent).HostID

			before := s.softHost(t, clock)
			session := check.Must(before.Dial(ctx))(t)
			leaf := s.workload(t, before, session)
			check.Must(s.broker.CLI(ctx, "lease", "revoke", leaf.lease))(t)
			check.Eventually(t, 20*time.Second, "the revocation is on the CRL", func() (bool, string) { return s.revoked(t, leaf.serial) })

			// The hour.
			clock.to(t, 30*day)
			if restarted {
				s.restart(t, clock)
			}
			during := s.softHost(t, clock)
			alice := s.operator(t, clock, "alice", "viewer")
			duringLeaf := s.workload(t, during, check.Must(during.Dial(ctx))(t))
			check.Must(before.Join(ctx, ""))(t)
			check.Must(s.broker.CLI(ctx, "lease", "revoke", duringLeaf.lease))(t)
			aheadLeaf := s.workload(t, during, check.Must(during.Dial(ctx))(t))
			check.Eventually(t, 20*time.Second, "a CRL of the hour lists both", func() (bool, string) {
				ok, said := s.revoked(t, leaf.serial)
				ok2, said2 := s.revoked(t, duringLeaf.serial)
				return ok && ok2, said + said2
			})

			// It is over.
			clock.to(t, 0)
			for name, h := range map[string]*lab.SoftHost{"before": before, "during": during} {
				session := check.Must(h.Dial(ctx))(t)
				var proof []*v1.LeaseProof
				if h == during {
					proof = append(proof, &v1.LeaseProof{LeaseId: aheadLeaf.lease, Scope: "tls", Program: aheadLeaf.program})
				}
				r, err := h.Prove(ctx, session, nil, proof...)
				if err != nil {
					t.Errorf("the host that joined %s: %v", name, err)
					continue
				}
				if len(r.GetCertificate()) == 0 {
					t.Errorf("the host that joined %s keeps a certificate that has not begun", name)
				} else if c := check.Must(x509.ParseCertificate(r.GetCertificate()[0]))(t); c.NotAfter.After(time.Now().Add(30*day + time.Hour)) {
					t.Errorf("its new certificate ends at %s", c.NotAfter)
				}
				if restarted && h == during {
					if v := r.GetLeases(); len(v) != 1 || v[0].GetOutcome() != api.CheckGone {
						t.Errorf("a certificate that is not valid for a month stays: %v", v)
					}
				}
				_ = session.Close()
			}
			if fresh := s.workload(t, during, check.Must(during.Dial(ctx))(t)); fresh.NotBefore.After(time.Now()) {
				t.Errorf("a workload's certificate begins at %s", fresh.NotBefore)
			}
			if out, err := clock.cli(t, alice("status")...); err != nil {
				t.Errorf("an operator of that hour: %v: %s", err, out)
			}
			check.Eventually(t, 20*time.Second, "the CRL is of now, and lists both", func() (bool, string) {
				list := s.crl(t)
				ok, said := s.revoked(t, leaf.serial)
				ok2, said2 := s.revoked(t, duringLeaf.serial)
				return ok && ok2 && !list.ThisUpdate.After(time.Now()), fmt.Sprint(list.ThisUpdate, said, said2)
			})
			proved := statusOf(t, agent).Proved
			check.Eventually(t, 70*time.Second, "the agent is proven", func() (bool, string) {
				st := statusOf(t, agent)
				return st.Problem == "" && st.Proved.After(proved), fmt.Sprintf("%+v", st)
			})
			inForce(t, s, file)
			if st := s.hostState(t, id); st.State != "trusted" {
				t.Errorf("%+v", st)
			}

			// And over a restart at the right time.
			s.restart(t, clock)
			if _, err := during.Prove(ctx, check.Must(during.Dial(ctx))(t), nil); err != nil {
				t.Errorf("after a restart: %v", err)
			}
			inForce(t, s, file)
			s.invariants(t)
		})
	}
}

func (s *site) softHost(t *testing.T, clock stepped) *lab.SoftHost {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
	h.Now = clock.now
	out, err := clock.cli(t, "--socket", filepath.Join(s.broker.State(), "operator.sock"), "join-token", "create", "role=billing")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check.Must(h.Join(ctx, strings.TrimSpace(out)))(t)
	return h
}

// operator makes an operator, and returns what its command lines are.
func (s *site) operator(t *testing.T, clock stepped, name, role string) func(args ...string) []string {
	t.Helper()
	out := filepath.Join(s.dir, name+"-"+rand.Text()[:6])
	if said, err := clock.cli(t, "--socket", filepath.Join(s.broker.State(), "operator.sock"), "operator", "add", name, "--role", role, "--out", out); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return func(args ...string) []string {
		return append([]string{"--address", "https://" + s.broker.Addr, "--ca-sha256", s.broker.CASHA256, "--cert", out + ".crt", "--key", out + ".key"}, args...)
	}
}

type workload struct {
	lease, serial string
	program       []byte
	NotBefore     time.Time
}

// workload earns a certificate.
func (s *site) workload(t *testing.T, h *lab.SoftHost, session *api.Session) workload {
	t.Helper()
	key := check.Must(lab.NewECDSA())(t)
	body := h.IssueBody("tls", check.Must(h.Program(softExe, "billing", 100))(t))
	body.Csr = check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
	r := check.Must(h.Issue(check.Within(t, time.Minute), session, body))(t)
	i := slices.IndexFunc(r.GetFields(), func(f *v1.SecretField) bool { return f.GetName() == "certificate" })
	leaf := check.Must(parseCertificate(r.GetFields()[i].GetValue()))(t)
	return workload{r.GetLeaseId(), leaf.SerialNumber.String(), body.GetProgram(), leaf.NotBefore}
}

func (s *site) crl(t *testing.T) *x509.RevocationList {
	t.Helper()
	r := check.Must(http.Get("http://" + s.broker.Metrics + "/crl"))(t)
	defer func() { _ = r.Body.Close() }()
	return check.Must(x509.ParseRevocationList(check.Must(io.ReadAll(r.Body))(t)))(t)
}

func (s *site) revoked(t *testing.T, serial string) (bool, string) {
	t.Helper()
	list := s.crl(t)
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.String() == serial {
			return true, ""
		}
	}
	return false, fmt.Sprintf("CRL %s of %s lists %d", list.Number, list.ThisUpdate, len(list.RevokedCertificateEntries))
}

// The watch and operators after 31 days, 400 days and 21 years: each works, or
// is told what to do, and works once that is done.
func TestWatchAndOperatorsThatWereOff(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	clock := newStepped(t, filepath.Join(s.dir, "clock"))
	s.restart(t, clock)
	alice := s.operator(t, clock, "alice", "operator")
	w := s.newWatch(t, clock, s.operator(t, clock, "watch", "responder"))

	// It is on when two thirds are over, and off when the certificate that it
	// began with ends.
	clock.to(t, 61*day)
	w.start(t)
	w.says(t, "certificate is renewed")
	w.stop(t)
	for _, off := range []time.Duration{61*day + 31*day, 61*day + 62*day} {
		clock.to(t, off)
		s.restart(t, clock)
		w.start(t)
		w.follows(t)
		w.stop(t)
		if out := string(check.Must(s.broker.CLI(t.Context(), "status"))(t)); off < 120*day && !strings.Contains(out, "ALARM: operator alice ended at ") || strings.Contains(out, "operator watch") {
			t.Errorf("status: %s", out)
		}
	}
	if out, err := clock.cli(t, alice("status")...); err == nil || !strings.Contains(out, "operator alice's certificate ended at ") || !strings.Contains(out, "countersign operator add alice") {
		t.Errorf("after its end: %v: %s", err, out)
	}

	for _, off := range absences[1:] {
		t.Run(off.name, func(t *testing.T) {
			clock.to(t, 123*day+off.time)
			s.restart(t, clock)
			w.start(t)
			w.says(t, "operator watch's certificate ended at ")
			w.says(t, "countersign operator add watch")
			w.stop(t)
			w = s.newWatch(t, clock, s.operator(t, clock, "watch", "responder"))
			w.start(t)
			w.follows(t)
			w.stop(t)

			// The CLI: the old certificate is told what to do, and that is done.
			if out, err := clock.cli(t, alice("status")...); err == nil || !strings.Contains(out, "countersign operator add alice") {
				t.Errorf("%v: %s", err, out)
			}
			alice = s.operator(t, clock, "alice", "operator")
			if out, err := clock.cli(t, alice("status")...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// A watcher is a watch that reaches its broker as an operator.
type watcher struct {
	config, log, metrics string
	clock                stepped
	cmd                  *exec.Cmd
	from                 int // of the log: what it said since it was started
}

func (s *site) newWatch(t *testing.T, clock stepped, standing func(...string) []string) *watcher {
	t.Helper()
	flags := standing()
	value := func(name string) string { return flags[slices.Index(flags, name)+1] }
	w := &watcher{config: filepath.Join(s.dir, "watch.hcl"), log: filepath.Join(s.dir, "watch.log"), clock: clock}
	w.metrics = freeAddress(t)
	check.Nil(t, os.WriteFile(filepath.Join(s.dir, "postgresql.csv"), nil, 0o600))
	check.Nil(t, os.WriteFile(w.config, fmt.Appendf(nil, "state_dir = %q\nmetrics_listen = %q\nbroker {\n  address = %q\n  ca_sha256 = %q\n  cert = %q\n  key = %q\n}\nsensor \"postgres-csv\" \"db\" { path = %q }\n",
		filepath.Join(s.dir, "watch"), w.metrics, value("--address"), value("--ca-sha256"), value("--cert"), value("--key"), filepath.Join(s.dir, "postgresql.csv")), 0o600))
	t.Cleanup(func() {
		w.stop(t)
		if t.Failed() {
			text, _ := os.ReadFile(w.log)
			t.Logf("watch.log:\n%s", text)
		}
	})
	return w
}

func (w *watcher) start(t *testing.T) {
	t.Helper()
	out := check.Must(os.OpenFile(w.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))(t)
	defer func() { _ = out.Close() }()
	w.from = int(check.Must(out.Stat())(t).Size())
	w.cmd = exec.Command(check.Must(lab.Program("countersign", true))(t), "watch", "serve", "--config", w.config)
	w.cmd.Env = append(os.Environ(), w.clock.env())
	w.cmd.Stdout, w.cmd.Stderr = out, out
	check.Nil(t, w.cmd.Start())
}

func (w *watcher) stop(t *testing.T) {
	t.Helper()
	if w.cmd != nil {
		_ = w.cmd.Process.Signal(os.Interrupt)
		_ = w.cmd.Wait()
		w.cmd = nil
	}
}

func (w *watcher) says(t *testing.T, words string) {
	t.Helper()
	check.Eventually(t, 30*time.Second, words, func() (bool, string) {
		text := string(check.Must(os.ReadFile(w.log))(t)[w.from:])
		return strings.Contains(text, words), text
	})
}

// follows waits until the watch has heard from the broker.
func (w *watcher) follows(t *testing.T) {
	t.Helper()
	check.Eventually(t, 30*time.Second, "the watch follows the broker", func() (bool, string) {
		r, err := http.Get("http://" + w.metrics + "/metrics")
		if err != nil {
			return false, err.Error()
		}
		defer func() { _ = r.Body.Close() }()
		text := check.Must(io.ReadAll(r.Body))(t)
		for line := range bytes.Lines(text) {
			if value, ok := bytes.CutPrefix(line, []byte("countersign_watch_ledger_synced_seconds ")); ok {
				return string(bytes.TrimSpace(value)) != "0", string(line)
			}
		}
		return false, "no such series"
	})
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l := check.Must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func parseCertificate(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("no PEM in %q", text)
	}
	return x509.ParseCertificate(block.Bytes)
}
