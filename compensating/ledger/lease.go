package ledger

import (
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// OfLease is a lease as the broker tells it.
func OfLease(l *v1.Lease) (Entry, error) {
	n := l.GetNames()
	e := Entry{ID: l.GetId(), Scope: l.GetScope(), Host: l.GetHost(), Kind: l.GetKind(), Sources: l.GetSources(), Audience: l.GetAudience(),
		Issued: moment(l.GetIssued()), Expires: moment(l.GetExpires()), Revoked: moment(l.GetRevoked()),
		Names: Names{DBUsername: n["db_username"], VaultLease: n["vault_lease"], VaultAccessor: n["vault_accessor"], VaultPath: n["vault_path"],
			CertificateSerial: n["certificate_serial"], SSHKeyID: n["ssh_key_id"], SSHSerial: n["ssh_serial"], SecretHMAC: n["secret_hmac"], SecretVersion: n["secret_version"]}}
	var err error
	if e.Subject, err = subjectOf(l.GetSubject()); err != nil {
		return e, fmt.Errorf("lease %s: its subject: %w", l.GetId(), err)
	}
	e.Subject.Release = l.GetRelease()
	if m := l.GetMachine(); m != nil {
		e.Machine = Machine{SecureBoot: m.SecureBoot, CommandLine: m.GetKernelCommandLine(), Reference: m.GetReference()}
	}
	return e, nil
}

// subjectOf reads an attested program, in either version of its encoding: the
// first has all facts side by side, the second has its files and what its system
// adds in objects of their own.
func subjectOf(b []byte) (Subject, error) {
	var p struct {
		Subject
		Executables []struct {
			Path   string `json:"path"`
			SHA256 string `json:"sha256"`
		} `json:"executables"`
		Linux *struct {
			Unit       string `json:"unit"`
			Invocation string `json:"invocation"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return Subject{}, err
	}
	s := p.Subject
	if len(p.Executables) > 0 {
		s.Exe, s.SHA256 = p.Executables[0].Path, p.Executables[0].SHA256
	}
	if p.Linux != nil {
		s.Unit, s.Invocation = p.Linux.Unit, p.Linux.Invocation
	}
	return s, nil
}

// OfCanary is the entry of a canary.
func OfCanary(c *v1.Canary) Entry {
	return Entry{ID: c.GetId(), Scope: c.GetScope(), Kind: KindCanary, Names: Names{DBUsername: c.GetUsername()}, Sources: []string{}, Audience: c.GetAudience(), Issued: moment(c.GetIssued())}
}

func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
