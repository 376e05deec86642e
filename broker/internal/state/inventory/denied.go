package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A tombstone is what the denial log keeps of a host that is out.
type tombstone struct {
	Name     string            `json:"name"`
	State    State             `json:"state"`
	Reason   string            `json:"reason"`
	Admitted bool              `json:"admitted"`
	EKs      []evidence.Digest `json:"eks"`
	AKPublic []byte            `json:"ak"`
	TLSKey   evidence.Digest   `json:"tls_key"`
	Created  time.Time         `json:"created"`
}

// deny keeps the denial log as the host's state says.
func deny(tx *store.Tx, h Host) error {
	if h.State != Quarantined && h.State != Removed {
		return denials.Lift(tx, denials.Host, h.ID)
	}
	detail, err := json.Marshal(tombstone{h.Name, h.State, h.Reason, h.Admitted, h.EKs, h.AKPublic, h.TLSKey, h.Created})
	if err != nil {
		return err
	}
	return denials.Set(tx, denials.Denial{Kind: denials.Host, Name: h.ID, Detail: detail})
}

// Deny takes a host out as the denial says, in a store that was restored from before it. The
// host need not be there. It returns the host, and whether that changed it.
func Deny(tx *store.Tx, d denials.Denial) (h Host, changed bool, err error) {
	var t tombstone
	if err := json.Unmarshal(d.Detail, &t); err != nil {
		return h, false, fmt.Errorf("denial of host %s: %w", d.Name, err)
	}
	on := OnQuarantine
	if t.State == Removed {
		on = OnRemove
	}
	h, err = Get(tx, d.Name)
	if errors.Is(err, ErrUnknown) {
		h, err = Host{ID: d.Name, Name: t.Name, State: Registered, Admitted: t.Admitted, Created: t.Created}, nil
	}
	if err != nil {
		return h, false, err
	}
	if h.State == t.State {
		h.Reason = joinedReasons(h.Reason, t.Reason, on)
	} else if h, err = h.After(on, t.Reason); err != nil {
		return h, false, nil // it is removed, and that is more
	}

	h.AKPublic, h.TLSKey = t.AKPublic, t.TLSKey
	for _, ek := range t.EKs {
		if _, err := ByEK(tx, ek); errors.Is(err, ErrUnknown) {
			h.EKs = append(h.EKs, ek)
		} else if err != nil {
			return h, false, err
		}
	}
	if other, err := ByTLSKey(tx, h.TLSKey); err == nil && other.ID != h.ID {
		h.TLSKey = evidence.Digest{} // the other has it, and AK and EKs say enough
	}
	return h, true, Save(tx, h)
}

// DenyToken spends a join token that was spent, in a store that was restored from before it.
func DenyToken(tx *store.Tx, d denials.Denial) error {
	_, err := tx.Exec(`UPDATE join_tokens SET used = 1 WHERE hash = ? AND used = 0`, d.Name)
	return err
}

// SeedDenials records the hosts that are out, and the join tokens that were spent and haven't
// ended, of a store that an earlier version wrote.
func SeedDenials(tx *store.Tx, now time.Time) error {
	after := Cursor{}
	const page = 500
	for more := true; more; {
		list, err := ByName(tx, after, page)
		if err != nil {
			return err
		}
		more = len(list) == page
		for _, h := range list {
			after = h.Cursor()
			if h.Unreadable == nil && (h.State == Quarantined || h.State == Removed) {
				if err := deny(tx, h); err != nil {
					return err
				}
			}
		}
	}

	spent, err := store.Collect(tx, func(row store.Row) (d denials.Denial, err error) {
		var expires int64
		err = row.Scan(&d.Name, &expires)
		d.Kind, d.Until = denials.Token, store.Time(expires)
		return d, err
	}, `SELECT hash, expires FROM join_tokens WHERE used > 0 AND expires > ?`, store.Millis(now))
	for _, d := range spent {
		err = errors.Join(err, denials.Set(tx, d))
	}
	return err
}
