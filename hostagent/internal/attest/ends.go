package attest

import (
	"crypto/x509"
	"fmt"
	"time"

	"github.com/countersign/countersign/internal/lifetime"
)

// Ends is when what this host shows and trusts comes to its end. Zero values
// are of a host that hasn't joined.
type Ends struct {
	Begins      time.Time // of the host's certificate
	Certificate time.Time // renewed in a proof at two thirds of its life, or by joining again
	CA          time.Time // the broker's pinned CA, which no program renews
	NewEpoch    string    // which epoch of the broker's audit log began, until it is accepted; or ""
}

// Ends reads them from the host's own state.
func (c *Client) Ends() Ends {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member == nil {
		return Ends{}
	}
	return c.member.ends()
}

func (m *membership) ends() (e Ends) {
	e.NewEpoch = m.NewEpoch
	for i, der := range m.Certificate {
		cert, err := x509.ParseCertificate(der)
		switch {
		case err != nil:
			return e // joining again replaces it
		case i == 0:
			e.Begins, e.Certificate = cert.NotBefore, cert.NotAfter
		default:
			e.CA = cert.NotAfter
		}
	}
	return e
}

// ReadEnds reads them from a state folder, of an agent that may be running.
func ReadEnds(stateDir string) (Ends, error) {
	m, err := loadMembership(stateDir)
	if err != nil || m == nil {
		return Ends{}, err
	}
	return m.ends(), nil
}

// Attention returns what a person has to do about ends, or about the audit log, or "".
func (e Ends) Attention(now time.Time) string {
	if e.NewEpoch != "" {
		return fmt.Sprintf("the broker's audit log: %s: its store was restored from a backup, or somebody discarded records; ask the broker's administrators, "+
			"who stand for a restore by `countersign broker acknowledge`; here you accept it by `countersign-agent join --accept-new-log`; %s in state_dir keeps what the log had shown", e.NewEpoch, abandonedFile)
	}
	if e.CA.IsZero() || now.Before(e.CA.Add(-lifetime.Warning)) {
		return ""
	}
	return attentionCA(e.CA, now)
}

func attentionCA(ends, now time.Time) string {
	verb := "ends"
	if !now.Before(ends) {
		verb = "ended"
	}
	return fmt.Sprintf("the broker's CA %s at %s; this host goes on trusting it by its pin; move to a new CA as docs/OPERATIONS.md says under \"Rotate CAs\"", verb, ends.UTC().Format(time.RFC3339))
}
