// Package checkpoint is the signed head of a broker's audit log as agents and
// auditors keep it: the broker's name, the epoch, the size of the Merkle tree
// (RFC 6962) and its root, as a signed note.
//
// Whoever holds a checkpoint can demand that every later one is consistent
// with it: a broker that forgets or rewrites a record is then caught. What a
// checkpoint doesn't show is a broker that never showed a record to anybody.
package checkpoint

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// maxNote bounds what Open reads of somebody's note.
const maxNote = 4096

// A Checkpoint is the head of one broker's log.
type Checkpoint struct {
	Broker string
	Epoch  int64 // counts the times the log was rolled back by a restored backup
	Size   int64
	Root   tlog.Hash
}

// KeyName is the name of the note key that signs a broker's log.
func KeyName(broker string) string { return "countersign-" + broker }

// Sign writes the checkpoint as a signed note.
func (c Checkpoint) Sign(signer note.Signer) ([]byte, error) {
	text := fmt.Sprintf("countersign/%s/%d\n%d\n%s\n", c.Broker, c.Epoch, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
	return note.Sign(&note.Note{Text: text}, signer)
}

// Open verifies a signed note and reads the checkpoint in it.
func Open(signed []byte, verifier note.Verifier) (Checkpoint, error) {
	if len(signed) > maxNote {
		return Checkpoint{}, fmt.Errorf("checkpoint of %d bytes; at most %d are read", len(signed), maxNote)
	}
	n, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	lines := strings.Split(n.Text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return Checkpoint{}, errors.New("checkpoint: not three lines")
	}
	origin := strings.Split(lines[0], "/")
	if len(origin) != 3 || origin[0] != "countersign" {
		return Checkpoint{}, fmt.Errorf("checkpoint: %q is not the head of an audit log", lines[0])
	}
	c := Checkpoint{Broker: origin[1]}
	if c.Epoch, err = number(origin[2]); err != nil {
		return Checkpoint{}, err
	}
	if c.Size, err = number(lines[1]); err != nil {
		return Checkpoint{}, err
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, errors.New("checkpoint: the root is not a hash")
	}
	c.Root = tlog.Hash(root)
	return c, nil
}

// An Acknowledgement says that an operator stands for an epoch of a broker's log: that it
// began because the store was restored, and not to hide records.
type Acknowledgement struct {
	Broker   string
	Epoch    int64
	Operator string
}

// acknowledged is the first line of an acknowledgement's note.
const acknowledged = "countersign epoch acknowledged"

// Sign writes the acknowledgement as a signed note.
func (a Acknowledgement) Sign(signer note.Signer) ([]byte, error) {
	return note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%s/%d\n%s\n", acknowledged, a.Broker, a.Epoch, a.Operator)}, signer)
}

// OpenAcknowledgement verifies a signed note and reads the acknowledgement in it.
func OpenAcknowledgement(signed []byte, verifier note.Verifier) (a Acknowledgement, err error) {
	if len(signed) > maxNote {
		return a, fmt.Errorf("acknowledgement of %d bytes; at most %d are read", len(signed), maxNote)
	}
	n, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return a, fmt.Errorf("acknowledgement: %w", err)
	}
	lines := strings.Split(n.Text, "\n")
	if len(lines) != 4 || lines[3] != "" || lines[0] != acknowledged {
		return a, errors.New("acknowledgement: not one of an epoch")
	}
	broker, epoch, _ := strings.Cut(lines[1], "/")
	a.Broker, a.Operator = broker, lines[2]
	a.Epoch, err = number(epoch)
	return a, err
}

func number(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, fmt.Errorf("checkpoint: %q is not a count", s)
	}
	return n, nil
}

// ErrRolledBack says that a log shows less than it once showed.
var ErrRolledBack = errors.New("the broker's audit log lost records that it had shown before")

// Follows says whether c may come after old: the same broker, a tree that
// contains the old one, or a new epoch, which the broker opens when its store
// was restored and which is for the caller to report.
func (c Checkpoint) Follows(old Checkpoint, proof [][]byte) (newEpoch bool, err error) {
	switch {
	case c.Broker != old.Broker:
		return false, fmt.Errorf("checkpoint of broker %s, but the one before was of %s", c.Broker, old.Broker)
	case c.Epoch > old.Epoch:
		return true, nil
	case c.Epoch < old.Epoch, c.Size < old.Size:
		return false, ErrRolledBack
	case c.Size == old.Size:
		if c.Root != old.Root {
			return false, ErrRolledBack
		}
		return false, nil
	case old.Size == 0:
		return false, nil
	}
	hashes, err := ParseProof(proof)
	if err != nil {
		return false, err
	}
	if err := tlog.CheckTree(tlog.TreeProof(hashes), c.Size, c.Root, old.Size, old.Root); err != nil {
		return false, fmt.Errorf("%w: %w", ErrRolledBack, err)
	}
	return false, nil
}

// ParseProof reads the hashes of a Merkle proof.
func ParseProof(raw [][]byte) ([]tlog.Hash, error) {
	if len(raw) > 128 {
		return nil, fmt.Errorf("a proof of %d hashes; none has more than 128", len(raw))
	}
	hashes := make([]tlog.Hash, len(raw))
	for i, h := range raw {
		if len(h) != tlog.HashSize {
			return nil, fmt.Errorf("proof hash %d has %d bytes, not %d", i, len(h), tlog.HashSize)
		}
		hashes[i] = tlog.Hash(h)
	}
	return hashes, nil
}

// FormatProof is the reverse of ParseProof.
func FormatProof(hashes []tlog.Hash) [][]byte {
	raw := make([][]byte, len(hashes))
	for i := range hashes {
		raw[i] = hashes[i][:]
	}
	return raw
}
