package attest

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/checkpoint"
	"github.com/countersign/countersign/test/check"
)

// An auditLog is a broker's, under a key of its own.
type auditLog struct {
	key  string
	sign func(checkpoint.Checkpoint) *v1.Checkpoint
}

func newLog(t *testing.T, broker string) auditLog {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, checkpoint.KeyName(broker))
	check.Nil(t, err)
	signer := check.Must(note.NewSigner(private))(t)
	return auditLog{public, func(c checkpoint.Checkpoint) *v1.Checkpoint {
		return &v1.Checkpoint{Note: check.Must(c.Sign(signer))(t)}
	}}
}

func (l auditLog) admits(broker string, epoch, size int64) *v1.ActivateResponse {
	return &v1.ActivateResponse{HostId: "h", AuditKey: l.key,
		Checkpoint: l.sign(checkpoint.Checkpoint{Broker: broker, Epoch: epoch, Size: size})}
}

// admit is what an answer to a join does.
func (h *host) admit(m *v1.ActivateResponse, accept bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.admitted(m, accept)
}

func (h *host) file(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(h.options.StateDir, name))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

// kept wants checkpoints to be kept as abandoned.
func (h *host) kept(t *testing.T, notes ...[]byte) {
	t.Helper()
	var list []abandoned
	if len(notes) > 0 {
		check.Nil(t, readJSON(h.options.StateDir, abandonedFile, &list))
	}
	if len(list) != len(notes) {
		t.Fatalf("%d are kept, want %d: %+v", len(list), len(notes), list)
	}
	for i, n := range notes {
		if list[i].Checkpoint != string(n) || list[i].AuditKey == "" || list[i].Why == "" || list[i].At.IsZero() {
			t.Errorf("%+v, want %s", list[i], n)
		}
	}
}

// Under one pinned CA a host follows one log. A broker that begins another, by a new key or under
// another name, gets a fault until a person on the host accepts it.
func TestAnotherLog(t *testing.T) {
	known := func(h *host) auditLog { return auditLog{h.public, h.sign} }
	for name, other := range map[string]func(t *testing.T, h *host) *v1.ActivateResponse{
		"another key":                    func(t *testing.T, _ *host) *v1.ActivateResponse { return newLog(t, "b").admits("b", 1, 1) },
		"another key, and a later epoch": func(t *testing.T, _ *host) *v1.ActivateResponse { return newLog(t, "b").admits("b", 9, 99) },
		"another key, another name":      func(t *testing.T, _ *host) *v1.ActivateResponse { return newLog(t, "c").admits("c", 1, 1) },
		"another name":                   func(_ *testing.T, h *host) *v1.ActivateResponse { return known(h).admits("c", 1, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{}
			h := newHost(t, s)
			first := h.head(1).GetNote()
			answer := func(c *v1.Checkpoint) {
				s.prove = func(int, *v1.ProveBody) (*v1.ProveResponse, error) {
					return &v1.ProveResponse{Checkpoint: c, Now: timestamppb.Now()}, nil
				}
			}
			check.Nil(t, h.admit(known(h).admits("b", 1, 7), false)) // joining again, as after 30 days
			h.kept(t)
			if m := check.Must(loadMembership(h.options.StateDir))(t); string(m.Checkpoint) != string(first) || m.CA != h.options.Peer.CASHA256 {
				t.Fatalf("joining again: %+v", m)
			}

			m := other(t, h)
			answer(m.GetCheckpoint())
			before := h.file(t, membershipFile)
			for range 2 {
				err := h.admit(m, false)
				if err == nil { // a known key: the next proof has to continue
					_, err = h.Prove(t.Context(), nil)
				}
				var e *api.Error
				if !errors.As(err, &e) || e.Outcome != api.Fault || e.Check != checkAuditLog {
					t.Errorf("without a person's word: %v", err)
				}
				if name != "another name" && h.file(t, membershipFile) != before {
					t.Errorf("the host's state changed: %s", h.file(t, membershipFile))
				}
				h.restart(t)
			}
			h.kept(t)

			// `join --accept-new-log` is another process than the agent.
			command := &host{Client: check.Must(Open(h.options))(t), options: h.options}
			check.Nil(t, command.admit(m, true))
			command.Close()
			h.kept(t, first)
			_, err := h.Prove(t.Context(), nil)
			check.Nil(t, err)
			h.restart(t)
			_, err = h.Prove(t.Context(), nil)
			check.Nil(t, err)
			if text := h.Ends().Attention(time.Now()); text != "" {
				t.Errorf("it was accepted: %s", text)
			}
		})
	}
}

// Who pins another CA has accepted its broker's log.
func TestAnotherCA(t *testing.T) {
	h := newHost(t, &script{})
	check.Nil(t, h.admit(auditLog{h.public, h.sign}.admits("b", 1, 1), false))
	h.options.Peer.CASHA256 = strings.Repeat("0", 64)
	h.restart(t)
	check.Nil(t, h.admit(newLog(t, "b").admits("b", 1, 1), false))
	h.kept(t, h.head(1).GetNote())
}

// A new epoch serves, and is reported until an operator of the broker stands for it, or a person
// on the host accepts it.
func TestNewEpoch(t *testing.T) {
	s := &script{}
	h := newHost(t, s)
	at := checkpoint.Checkpoint{Broker: "b", Epoch: 1, Size: 1}
	var word []byte
	s.prove = func(int, *v1.ProveBody) (*v1.ProveResponse, error) {
		head := h.sign(at)
		head.Acknowledged = word
		return &v1.ProveResponse{Checkpoint: head, Now: timestamppb.Now()}, nil
	}
	prove := func() {
		t.Helper()
		_, err := h.Prove(t.Context(), nil)
		check.Nil(t, err)
	}
	attention := func(want string) {
		t.Helper()
		for _, e := range []Ends{h.Ends(), check.Must(ReadEnds(h.options.StateDir))(t)} {
			if text := e.Attention(time.Now()); (text == "") != (want == "") || !strings.Contains(text, want) {
				t.Errorf("attention: %q, want %q", text, want)
			}
		}
	}
	prove()
	attention("")
	at.Epoch = 2
	for range 2 {
		prove()
		attention("epoch 2 began after epoch 1, which held 1 records")
		h.restart(t)
	}
	check.Nil(t, h.admit(auditLog{h.public, h.sign}.admits("b", 2, 1), false)) // joining again accepts nothing
	attention("epoch 2")
	h.kept(t, h.head(1).GetNote())

	// An operator stands for it, by the key that this host has followed.
	stands := func(broker string, epoch int64, by note.Signer) []byte {
		return check.Must(checkpoint.Acknowledgement{Broker: broker, Epoch: epoch, Operator: "alice"}.Sign(by))(t)
	}
	private, _, err := note.GenerateKey(rand.Reader, checkpoint.KeyName("b"))
	check.Nil(t, err)
	for _, word = range [][]byte{stands("b", 1, h.signer), stands("b", 3, h.signer), stands("c", 2, h.signer), []byte("garbage"), h.sign(at).GetNote(),
		stands("b", 2, check.Must(note.NewSigner(private))(t))} {
		prove()
		attention("epoch 2")
	}
	word = stands("b", 2, h.signer)
	prove()
	attention("")
	word, at.Epoch = nil, 3
	prove()
	attention("epoch 3")
	h.kept(t, h.head(1).GetNote(), h.sign(checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 1}).GetNote())

	command := &host{Client: check.Must(Open(h.options))(t), options: h.options}
	check.Nil(t, command.admit(auditLog{h.public, h.sign}.admits("b", 3, 1), true))
	command.Close()
	prove()
	attention("")
	h.kept(t, h.head(1).GetNote(), h.sign(checkpoint.Checkpoint{Broker: "b", Epoch: 2, Size: 1}).GetNote())
}
