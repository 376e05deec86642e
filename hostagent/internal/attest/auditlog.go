package attest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/checkpoint"
)

// How a host follows the broker's audit log. Under one pinned CA there is one log, which
// each checkpoint continues:
//
//   - What another key signed, or another broker, is a fault, in a proof as in a join, until a
//     person on this host accepts it.
//   - A new epoch of the known key is accepted, since a store that is restored has to serve, and is
//     reported until an operator of the broker stands for it, which the key signs, or a person on
//     this host accepts it.
//
// Who pins another CA accepts its log by that. In each of these cases the checkpoint that isn't
// continued is kept: it shows what the broker's log once held.

// checkAuditLog names the fault.
const checkAuditLog = "audit-log"

const abandonedFile = "abandoned-checkpoints.json"

// maxAbandoned bounds how many are kept: the oldest, as one that is owned could have the rest be
// pushed out, and the newest.
const maxAbandoned = 64

// An abandoned checkpoint is one that the broker's log no longer continues.
type abandoned struct {
	At         time.Time `json:"at"`
	Why        string    `json:"why"`
	AuditKey   string    `json:"audit_key"`
	Checkpoint string    `json:"checkpoint"` // signed note
}

// follow holds a checkpoint against the last one and keeps it. c.mu is held.
func (c *Client) follow(head *v1.Checkpoint) error {
	signed := head.GetNote()
	v, err := note.NewVerifier(c.member.AuditKey)
	if err != nil {
		return fmt.Errorf("the broker's audit key: %w", err)
	}
	next, err := checkpoint.Open(signed, v)
	if err != nil {
		return err
	}
	if len(c.member.Checkpoint) > 0 {
		last, err := checkpoint.Open(c.member.Checkpoint, v)
		if err != nil {
			return err
		}
		newEpoch, err := next.Follows(last, head.GetConsistency())
		if err != nil {
			return err
		}
		if newEpoch {
			c.log.Warn("the broker opened a new epoch of its audit log: its store was restored from a backup", "epoch", next.Epoch, "was", last.Epoch)
			why := fmt.Sprintf("epoch %d began after epoch %d, which held %d records", next.Epoch, last.Epoch, last.Size)
			if err := c.abandon(c.member, why); err != nil {
				return err
			}
			c.member.NewEpoch = why
		}
	}
	if c.member.NewEpoch != "" && len(head.GetAcknowledged()) > 0 {
		a, err := checkpoint.OpenAcknowledgement(head.GetAcknowledged(), v)
		switch {
		case err != nil:
			c.log.Warn("what the broker says of an operator who stands for its log's epoch is not signed by its key", "err", err)
		case a.Broker == next.Broker && a.Epoch == next.Epoch:
			c.log.Info("an operator stands for the new epoch of the broker's audit log", "epoch", a.Epoch, "operator", a.Operator)
			c.member.NewEpoch = ""
		}
	}
	c.member.Checkpoint = signed
	return nil
}

// abandon keeps the checkpoint that is left behind.
func (c *Client) abandon(m *membership, why string) error {
	var list []abandoned
	if err := readJSON(c.dir, abandonedFile, &list); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	list = append(list, abandoned{c.wall().UTC().Truncate(time.Second), why, m.AuditKey, string(m.Checkpoint)})
	if len(list) > maxAbandoned {
		list = append(list[:maxAbandoned/2], list[len(list)-maxAbandoned/2:]...)
	}
	return writeJSON(c.dir, abandonedFile, list)
}

// reread takes over what `countersign-agent join` accepted beside a running agent. c.mu is held.
func (c *Client) reread() error {
	m, err := loadMembership(c.dir)
	if err == nil && m != nil {
		c.member = m
	}
	return err
}

// admitted keeps what the broker gave. The audit log that the host has followed so far goes on, or
// a person accepts another. c.mu is held.
func (c *Client) admitted(m *v1.ActivateResponse, accept bool) error {
	before, err := loadMembership(c.dir) // another process may have joined, or proven more
	if err != nil {
		return err
	}
	next := &membership{HostID: m.GetHostId(), AuditKey: m.GetAuditKey(), Certificate: m.GetCertificate(), CA: c.peer.CASHA256}
	same := before != nil && before.AuditKey == next.AuditKey && !(accept && renamed(before, m.GetCheckpoint().GetNote()))
	otherCA := before != nil && before.CA != "" && before.CA != next.CA
	switch {
	case same && !accept:
		// Kept as it is: the next proof shows it and demands consistency.
		next.Checkpoint, next.NewEpoch = before.Checkpoint, before.NewEpoch
	case same:
		// What was accepted is the epoch, and no head that doesn't continue it.
		next.Checkpoint = before.Checkpoint
	case before != nil && !otherCA && !accept:
		return api.NewError(api.Fault, checkAuditLog, fmt.Sprintf("the broker's audit log: it is signed by another key (%s) than this host has followed (%s): "+
			"somebody may have discarded the log; ask the broker's administrators, and if they made a new one, run `countersign-agent join --accept-new-log`; %s keeps what the old one showed",
			keyName(next.AuditKey), keyName(before.AuditKey), filepath.Join(c.dir, membershipFile)))
	case before != nil && len(before.Checkpoint) > 0:
		why := "another log, accepted on this host"
		if otherCA {
			why = "another CA was pinned on this host"
		}
		if err := c.abandon(before, why); err != nil {
			return err
		}
	}
	c.member = next
	if !same {
		if err := c.follow(&v1.Checkpoint{Note: m.GetCheckpoint().GetNote()}); err != nil {
			c.member = before
			return err
		}
	}
	return writeJSON(c.dir, membershipFile, c.member)
}

// renamed reports whether a checkpoint of a known key is of a broker of another name.
func renamed(before *membership, signed []byte) bool {
	v, err := note.NewVerifier(before.AuditKey)
	if err != nil {
		return false
	}
	last, err := checkpoint.Open(before.Checkpoint, v)
	if err != nil {
		return false
	}
	next, err := checkpoint.Open(signed, v)
	return err == nil && next.Broker != last.Broker
}

// keyName is a verifier key less the key itself: name and hash.
func keyName(key string) string {
	v, err := note.NewVerifier(key)
	if err != nil {
		return "none that can be read"
	}
	return fmt.Sprintf("%s+%08x", v.Name(), v.KeyHash())
}
