// Package ledger is what was issued, in the names by which the world outside
// knows it: one entry for each credential, as `countersign lease export` writes
// it, and an index that finds the entries of a name.
//
// An entry is the broker's word and holds no secret. The file it is read from is
// not trusted to be well formed: lines and their fields are bounded, and what
// can't be read is an error that says which line. The index promises exactness:
// a name finds the entries that bear just that name, never one that is like it.
package ledger

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	strict "github.com/go-json-experiment/json"
)

// KindCanary is the kind of an entry that nobody may use.
const KindCanary = "canary"

// MaxLine bounds one entry as JSON.
const MaxLine = 64 << 10

// An Entry is one issued credential.
type Entry struct {
	ID       string    `json:"id"`
	Scope    string    `json:"scope"`
	Host     string    `json:"host"`
	Subject  Subject   `json:"subject"`
	Machine  Machine   `json:"machine,omitzero"`
	Kind     string    `json:"kind"`
	Names    Names     `json:"names"`
	Sources  []string  `json:"sources"`  // addresses or prefixes of the host, as the broker saw them
	Audience []string  `json:"audience"` // where it may be used, as the scope says
	Issued   time.Time `json:"issued,omitzero"`
	Expires  time.Time `json:"expires,omitzero"`
	Revoked  time.Time `json:"revoked,omitzero"` // its confirmed end; zero while it may work
}

// Names are by what others know a credential; one that does not apply is empty.
type Names struct {
	DBUsername        string `json:"db_username,omitempty"`
	VaultLease        string `json:"vault_lease,omitempty"`
	VaultAccessor     string `json:"vault_accessor,omitempty"`
	VaultPath         string `json:"vault_path,omitempty"` // where it was read, for what Vault makes no lease
	CertificateSerial string `json:"certificate_serial,omitempty"`
	SSHKeyID          string `json:"ssh_key_id,omitempty"`
	SSHSerial         string `json:"ssh_serial,omitempty"`     // decimal
	SecretHMAC        string `json:"secret_hmac,omitempty"`    // by a key that stays in the broker
	SecretVersion     string `json:"secret_version,omitempty"` // of a static account's password
}

// A Subject is the attested program that a credential was issued to.
type Subject struct {
	Boot       string `json:"boot"`
	PID        int    `json:"pid,omitempty"`
	Start      Word   `json:"start,omitempty"`
	Unit       string `json:"unit,omitempty"`
	Invocation string `json:"invocation,omitempty"`
	User       string `json:"user"`
	Parent     Parent `json:"parent,omitempty"`
	Exe        string `json:"exe"`
	SHA256     string `json:"sha256"`
	Release    string `json:"release,omitempty"` // the announced release that its digest is of
}

// A Machine is how the host had booted when the credential was issued; what wasn't
// proven is left out.
type Machine struct {
	SecureBoot  *bool  `json:"secure_boot,omitempty"`
	CommandLine string `json:"kernel_command_line,omitempty"`
	Reference   string `json:"reference,omitempty"` // the approved set that the boot matched
}

// A Word is a JSON string or number, as text.
type Word string

// UnmarshalJSON reads a string, a number or null.
func (w *Word) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		var s string
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		*w = Word(s)
		return nil
	}
	if string(b) == "null" {
		return nil
	}
	var n json.Number
	if err := json.Unmarshal(b, &n); err != nil {
		return err
	}
	*w = Word(n)
	return nil
}

// MarshalJSON writes a number where it is one.
func (w Word) MarshalJSON() ([]byte, error) {
	if w != "" && strings.Trim(string(w), "0123456789") == "" && (w[0] != '0' || len(w) == 1) {
		return []byte(w), nil
	}
	return json.Marshal(string(w))
}

// Parent is the path of the program that started the subject. Its pid and start
// time, which the broker records beside it, differ at every start.
type Parent string

// UnmarshalJSON reads the path, or an object that has it as "exe".
func (p *Parent) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var o struct {
			Exe string `json:"exe"`
		}
		err := json.Unmarshal(b, &o)
		*p = Parent(o.Exe)
		return err
	}
	var w Word
	err := w.UnmarshalJSON(b)
	*p = Parent(w)
	return err
}

// Parse reads one line. Fields that it does not know are for others.
func Parse(line []byte) (Entry, error) {
	var e Entry
	if len(line) > MaxLine {
		return e, fmt.Errorf("an entry of %d bytes; at most %d are read", len(line), MaxLine)
	}
	if err := strict.Unmarshal(bytes.TrimSpace(line), &e); err != nil {
		return Entry{}, err
	}
	switch {
	case e.ID == "":
		return Entry{}, errors.New("an entry without an id")
	case e.Scope == "" && e.Kind != KindCanary:
		return Entry{}, fmt.Errorf("entry %s: its scope is missing", e.ID)
	}
	for _, s := range e.Sources {
		if _, err := prefix(s); err != nil {
			return Entry{}, fmt.Errorf("entry %s: source %w", e.ID, err)
		}
	}
	return e, nil
}

// prefix reads an address, or a prefix of addresses.
func prefix(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), nil
	}
	a, err := netip.ParseAddr(s)
	if port, perr := netip.ParseAddrPort(s); err != nil && perr == nil {
		a, err = port.Addr(), nil
	}
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is no address", s)
	}
	a = a.Unmap().WithZone("")
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// Prefixes are the entry's sources.
func (e Entry) Prefixes() []netip.Prefix {
	out := make([]netip.Prefix, 0, len(e.Sources))
	for _, s := range e.Sources {
		if p, err := prefix(s); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// End is when the credential stops to work: its revocation, or else its own time.
// Zero: not known.
func (e Entry) End() time.Time {
	if !e.Revoked.IsZero() && (e.Expires.IsZero() || e.Revoked.Before(e.Expires)) {
		return e.Revoked
	}
	return e.Expires
}

// Holds says whether the credential may be used at t, give or take skew.
func (e Entry) Holds(t time.Time, skew time.Duration) bool {
	end := e.End()
	return !t.Before(e.Issued.Add(-skew)) && (end.IsZero() || !t.After(end.Add(skew)))
}

// Overlaps says whether both credentials could be used at once, for longer than skew.
func (e Entry) Overlaps(o Entry, skew time.Duration) bool {
	before := func(a, b Entry) bool { return b.End().IsZero() || a.Issued.Add(skew).Before(b.End()) }
	return before(e, o) && before(o, e)
}

// Path is the place in Vault that the credential came from, without the mount's
// trailing id of the lease; empty where it isn't known.
func (n Names) Path() string {
	if n.VaultPath != "" {
		return n.VaultPath
	}
	if i := strings.LastIndexByte(n.VaultLease, '/'); i > 0 {
		return n.VaultLease[:i]
	}
	return ""
}

// AccountKey is a user name by which an account is looked for: as Windows compares
// them, without a domain and in lower case. Elsewhere names that differ in these are two.
func AccountKey(name string) string {
	if _, user, ok := strings.Cut(name, `\`); ok {
		name = user
	}
	user, _, _ := strings.Cut(name, "@")
	return strings.ToLower(user)
}

// Stored says whether the account is one that somebody wrote into Vault, as KV has
// them: nothing but its scope's audience says of which server it is.
func (n Names) Stored() bool {
	return n.DBUsername != "" && n.VaultLease == "" && n.VaultPath != "" && !strings.Contains(n.VaultPath, "/static-creds/")
}

// Program is the subject without what differs from one start to the next.
func (s Subject) Program() string {
	if s.Unit != "" {
		return s.Unit
	}
	return s.Exe
}

// Instance tells one run of the program from others: for a unit its invocation,
// otherwise its process.
func (s Subject) Instance() string {
	if s.Unit != "" && s.Invocation != "" {
		return s.Boot + " " + s.Unit + " " + s.Invocation
	}
	if s.PID == 0 && s.Start == "" {
		return s.Boot
	}
	return fmt.Sprintf("%s %d %s", s.Boot, s.PID, s.Start)
}
