package attest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/internal/checkpoint"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// device is the TPM of all hosts: each makes keys of its own in it.
var device *collect.Device

func TestMain(m *testing.M) { os.Exit(withTPM(m)) }

func withTPM(m *testing.M) int {
	dir, err := os.MkdirTemp("", "a") // short, for the TPM's socket
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ca, err := lab.NewTPMCA(dir)
	if err != nil {
		panic(err)
	}
	chip, err := lab.StartTPM(context.Background(), filepath.Join(dir, "tpm"), ca, lab.TPMOptions{})
	if err != nil {
		panic(err)
	}
	defer chip.Stop()
	if device, err = collect.Open("unix:" + chip.Socket); err != nil {
		panic(err)
	}
	return m.Run()
}

// A script is a broker whose answers a test writes. Evidence is read by the real
// one's tests, not here.
type script struct {
	countersignv1connect.UnimplementedHostServiceHandler

	reads uint32 // the version of programs' evidence
	prove func(n int, body *v1.ProveBody) (*v1.ProveResponse, error)
	issue func(body *v1.IssueBody) (*v1.IssueResponse, error)

	mu     sync.Mutex
	nonces [][]byte // guarded by mu; given
	shown  [][]byte // guarded by mu; nonces of proofs
	joins  int      // guarded by mu
}

func (s *script) Challenge(context.Context, *connect.Request[v1.ChallengeRequest]) (*connect.Response[v1.ChallengeResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // never fails
	s.nonces = append(s.nonces, nonce)
	return connect.NewResponse(&v1.ChallengeResponse{Nonces: [][]byte{nonce}, ProgramVersion: s.reads}), nil
}

func (s *script) Prove(_ context.Context, r *connect.Request[v1.ProveRequest]) (*connect.Response[v1.ProveResponse], error) {
	s.mu.Lock()
	s.shown = append(s.shown, r.Msg.GetAttested().GetNonce())
	n := len(s.shown)
	s.mu.Unlock()
	var body v1.ProveBody
	if err := proto.Unmarshal(r.Msg.GetAttested().GetBody(), &body); err != nil {
		return nil, err
	}
	answer, err := s.prove(n, &body)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(answer), nil
}

func (s *script) Issue(_ context.Context, r *connect.Request[v1.IssueRequest]) (*connect.Response[v1.IssueResponse], error) {
	var body v1.IssueBody
	if err := proto.Unmarshal(r.Msg.GetAttested().GetBody(), &body); err != nil {
		return nil, err
	}
	answer, err := s.issue(&body)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(answer), nil
}

func (s *script) Join(context.Context, *connect.Request[v1.JoinRequest]) (*connect.Response[v1.JoinResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.joins++
	return nil, refuse(api.Fault, "join-rate", "not now")
}

// refuse is an error as a broker sends it.
func refuse(outcome api.Outcome, what, message string) error {
	return api.NewError(outcome, what, message).Connect()
}

// A host has keys and a membership, and a scripted broker.
type host struct {
	*Client
	options Options
	server  *httptest.Server
	head    func(size int64) *v1.Checkpoint // of the broker's log
	public  string                          // its key
	sign    func(checkpoint.Checkpoint) *v1.Checkpoint
	signer  note.Signer
}

func newHost(t *testing.T, s *script) *host {
	t.Helper()
	dir, ctx := t.TempDir(), check.Within(t, time.Minute)

	private, public, err := note.GenerateKey(rand.Reader, checkpoint.KeyName("b"))
	check.Nil(t, err)
	signer := check.Must(note.NewSigner(private))(t)
	sign := func(c checkpoint.Checkpoint) *v1.Checkpoint {
		return &v1.Checkpoint{Note: check.Must(c.Sign(signer))(t)}
	}
	head := func(size int64) *v1.Checkpoint { return sign(checkpoint.Checkpoint{Broker: "b", Epoch: 1, Size: size}) }
	state := filepath.Join(dir, "state")
	check.Nil(t, os.Mkdir(state, 0o700))
	ak, key := check.Must(device.CreateAK(ctx, tpm.P256))(t), check.Must(device.CreateTLSKey(ctx))(t)
	check.Nil(t, writeJSON(state, keysFile, &keys{AK: ak.Export(), TLS: key.Export()}))
	check.Nil(t, writeJSON(state, membershipFile, &membership{HostID: "h", AuditKey: public, Checkpoint: head(1).GetNote()}))

	server, digest := serve(t, s)
	o := Options{Device: device, StateDir: state, RunDir: filepath.Join(dir, "run"), AK: tpm.P256, Log: slog.New(slog.DiscardHandler), Now: time.Now, Wall: time.Now,
		Logs: LogPaths{Event: filepath.Join(dir, "none"), Userspace: filepath.Join(dir, "none"), IMA: filepath.Join(dir, "none")},
		Peer: api.Peer{Addresses: []string{server.URL}, CASHA256: digest}, Facts: func() *v1.HostFacts { return &v1.HostFacts{BootId: "boot"} }}
	h := &host{options: o, server: server, head: head, public: public, sign: sign, signer: signer}
	h.restart(t)
	return h
}

// restart is the agent's.
func (h *host) restart(t *testing.T) {
	t.Helper()
	if h.Client != nil {
		h.Close()
	}
	h.Client = check.Must(Open(h.options))(t)
	t.Cleanup(h.Close)
}

// serve has a script answer under a certificate of a CA of its own.
func serve(t *testing.T, s *script) (server *httptest.Server, digest string) {
	t.Helper()
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "broker"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der := check.Must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(t)
	_, handler := countersignv1connect.NewHostServiceHandler(s)
	server = httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	sum := sha256.Sum256(der)
	return server, hex.EncodeToString(sum[:])
}

var program = process.Program{Boot: "boot", PID: 7, Start: 9, User: "billing", Executables: process.OneFile("/opt/billingd", [32]byte{1}), Linux: &process.Linux{UID: 990}}

// A broker is sent what it reads: one that doesn't say, the first version.
func TestTheBrokersVersion(t *testing.T) {
	for reads, want := range map[uint32]int{0: 1, 1: 1, process.Version: process.Version, process.Version + 1: process.Version} {
		var sent [][]byte
		s := &script{reads: reads}
		h := newHost(t, s)
		s.prove = func(_ int, body *v1.ProveBody) (*v1.ProveResponse, error) {
			for _, l := range body.GetLeases() {
				sent = append(sent, l.GetProgram())
			}
			return &v1.ProveResponse{Checkpoint: h.head(1), Now: timestamppb.Now()}, nil
		}
		s.issue = func(body *v1.IssueBody) (*v1.IssueResponse, error) {
			sent = append(sent, body.GetProgram())
			return &v1.IssueResponse{LeaseId: "l"}, nil
		}
		_, err := h.Issue(t.Context(), Order{Scope: "s", Program: program})
		check.Nil(t, err)
		unseen, odd := LeaseProof{Lease: "unseen"}, LeaseProof{Lease: "odd", Program: &process.Program{}}
		_, err = h.Prove(t.Context(), []LeaseProof{unseen, odd, {Lease: "l", Program: &program}})
		check.Nil(t, err)
		encoded := check.Must(program.EncodeAs(want))(t)
		if len(sent) != 4 || string(sent[0]) != string(encoded) || string(sent[1]) != string(encoded) || len(sent[2]) != 0 || len(sent[3]) != 0 {
			t.Errorf("a broker that reads %d is sent %q", reads, sent)
		}
	}
}

// A proof shows what the last answer gave, also after a restart of the agent, and
// an answer out of bounds changes nothing.
func TestContinuation(t *testing.T) {
	s := &script{}
	h := newHost(t, s)
	var shown []string
	answer := "first"
	s.prove = func(_ int, body *v1.ProveBody) (*v1.ProveResponse, error) {
		shown = append(shown, string(body.GetContinuation()))
		return &v1.ProveResponse{Checkpoint: h.head(1), Now: timestamppb.Now(), Continuation: []byte(answer)}, nil
	}
	prove := func() error { _, err := h.Prove(t.Context(), nil); return err }
	check.Nil(t, prove())
	answer = "second"
	check.Nil(t, prove())
	h.restart(t)
	answer = strings.Repeat("x", api.MaxContinuation+1)
	var e *api.Error
	if err := prove(); !errors.As(err, &e) || e.Outcome != api.Fault {
		t.Errorf("%d bytes: %v", len(answer), err)
	}
	h.restart(t)
	answer = "third"
	check.Nil(t, prove())
	check.Nil(t, os.RemoveAll(h.options.RunDir))
	h.restart(t) // in another boot
	check.Nil(t, prove())
	if want := []string{"", "first", "second", "second", ""}; !slices.Equal(shown, want) {
		t.Errorf("shown %q, want %q", shown, want)
	}
}

// An answer over a log that was rewritten counts for nothing, and leaves all as
// it was.
func TestARewrittenLog(t *testing.T) {
	s := &script{}
	h := newHost(t, s)
	good := h.head
	for name, head := range map[string]func() *v1.Checkpoint{
		"smaller":          func() *v1.Checkpoint { return good(0) },
		"without a proof":  func() *v1.Checkpoint { return good(9) },
		"another's":        func() *v1.Checkpoint { return &v1.Checkpoint{Note: []byte("countersign/b/1\n1\n\n")} },
		"none":             func() *v1.Checkpoint { return nil },
		"the one that was": func() *v1.Checkpoint { return good(1) },
	} {
		s.prove = func(int, *v1.ProveBody) (*v1.ProveResponse, error) {
			return &v1.ProveResponse{Checkpoint: head(), Now: timestamppb.Now(), Certificate: [][]byte{[]byte("new")}, Continuation: []byte("new")}, nil
		}
		before := check.Must(os.ReadFile(filepath.Join(h.options.StateDir, membershipFile)))(t)
		_, err := h.Prove(t.Context(), nil)
		after := check.Must(os.ReadFile(filepath.Join(h.options.StateDir, membershipFile)))(t)
		honest := name == "the one that was"
		var e *api.Error
		if (err == nil) != honest || (string(before) == string(after)) == honest || err != nil && (!errors.As(err, &e) || e.Outcome != api.Fault || e.Check != "audit-log") {
			t.Errorf("%s: %v; kept %s", name, err, after)
		}
		check.Nil(t, os.WriteFile(filepath.Join(h.options.StateDir, membershipFile), before, 0o600))
		h.restart(t)
	}
}

// A request is made anew, with a nonce of its own, where the broker asks for that
// or the connection is lost; and not for ever.
func TestMadeAnew(t *testing.T) {
	for name, tt := range map[string]struct {
		fails func(h *host) error
		times int // that it fails
		tries int
		ok    bool
	}{
		"nothing fails":         {nil, 0, 1, true},
		"retry":                 {func(*host) error { return refuse(api.Retry, "binding", "another connection") }, 1, 2, true},
		"retry, for ever":       {func(*host) error { return refuse(api.Retry, "binding", "another connection") }, 99, tries, false},
		"the logs from scratch": {func(*host) error { return refuse(api.Fault, api.CheckResync, "whole") }, 1, 2, true},
		"the connection":        {func(h *host) error { h.server.CloseClientConnections(); return errors.New("lost") }, 1, 2, true},
		"a fault":               {func(*host) error { return refuse(api.Fault, "store", "full") }, 1, 1, false},
		"refused":               {func(*host) error { return refuse(api.Refused, "policy", "no") }, 1, 1, false},
		"rejected":              {func(*host) error { return refuse(api.Rejected, "quote", "false") }, 1, 1, false},
		"join again":            {func(*host) error { return refuse(api.Fault, api.CheckUnknownHost, "who?") }, 1, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{}
			h := newHost(t, s)
			s.prove = func(n int, _ *v1.ProveBody) (*v1.ProveResponse, error) {
				if n <= tt.times {
					return nil, tt.fails(h)
				}
				return &v1.ProveResponse{Checkpoint: h.head(1), Now: timestamppb.Now()}, nil
			}
			_, err := h.Prove(t.Context(), nil)
			if (err == nil) != tt.ok || len(s.shown) != tt.tries {
				t.Errorf("%d tries, %v", len(s.shown), err)
			}
			for i, nonce := range s.shown {
				if string(nonce) != string(s.nonces[i]) {
					t.Errorf("try %d shows another nonce than it was given", i+1)
				}
			}
			want := 0
			if name == "join again" {
				if want = 1; err == nil || !strings.Contains(err.Error(), "joining again failed") {
					t.Errorf("the join failed, and the error is %v", err)
				}
			}
			if s.joins != want {
				t.Errorf("%d joins", s.joins)
			}
		})
	}
}

// Times count from the broker's now, whatever either clock says.
func TestTimesOfAnotherClock(t *testing.T) {
	s := &script{}
	h := newHost(t, s)
	theirs := time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(theirs.Add(d)) }
	s.issue = func(*v1.IssueBody) (*v1.IssueResponse, error) {
		return &v1.IssueResponse{LeaseId: "l", Now: at(0), Expires: at(time.Minute), ReplaceAt: at(time.Hour)}, nil
	}
	issued, err := h.Issue(t.Context(), Order{Scope: "s", Program: program})
	check.Nil(t, err)
	near := func(got time.Time, want time.Duration) bool { return (time.Until(got) - want).Abs() < 30*time.Second }
	if !near(issued.Expires, time.Minute) || !near(issued.ReplaceAt, time.Hour) || !issued.AcknowledgeBy.IsZero() {
		t.Errorf("expires in %v, replaced in %v, acknowledged by %v", time.Until(issued.Expires), time.Until(issued.ReplaceAt), issued.AcknowledgeBy)
	}
}
