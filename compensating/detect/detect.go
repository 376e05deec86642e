// Package detect says what is wrong with how credentials are used: it joins
// sightings to the ledger by exact names, and holds each against what was issued.
//
// A detector is a function of one sighting and the ledger, or of the ledger's
// entries of one program; what it keeps between sightings are first and last
// times. So sightings that come late, early or out of order come out the same as in
// order. What each sees, what fools it and what it asks for is in Catalogue.
//
// Trust: the ledger is the broker's word. A sighting is a log's word: its names
// decide whose credential it is, and since user names aren't secret, only a
// completed login says more than that somebody tried. Detectors promise to speak of
// what both say, and to be silent where either is: no address, no judgement of it.
package detect

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/internal/glob"
)

// Skew is how far clocks of logs, hosts and broker may be apart, and how long what
// was revoked may take to be: no time is judged more finely.
const Skew = 45 * time.Second

// A Config is what an operator says of the world.
type Config struct {
	// Governed are accounts that only the broker hands out, as globs, beside
	// those of the ledger and of its roles' user names.
	Governed []string
	// Through are addresses of NATs and poolers, from which any host may come.
	Through []netip.Prefix
}

// A Detection is one thing that a detector saw.
type Detection struct {
	Detector Name
	Lease    string // where there is one
	Host     string
	Account  string // user name, Vault path or log
	Time     time.Time
	Why      string
	Cause    string              // what tells it from others of the same detector and lease
	Sighting *sightings.Sighting // nil where the ledger alone shows it
}

// A Judge holds sightings against a ledger. It is not safe for concurrent use.
type Judge struct {
	ledger   *ledger.Index
	config   Config
	patterns []accounts              // of Governed
	made     map[string]bool         // what stands before the random part of governed user names
	roles    map[string]bool         // of Vault's database engine that are governed, as user names have them
	paths    map[string]bool         // of Vault that the ledger's entries came from
	canaries map[string]ledger.Entry // by their account, key id, and path in Vault
	boots    map[string]string       // the host that a boot was seen of first
	seen     State
	used     map[program]bool
}

// A State is what a judge remembers of sightings; the next one may go on from it.
type State struct {
	Use    map[string]map[string]*Span `json:"use,omitempty"`    // by host and boot
	Used   map[string][]string         `json:"used,omitempty"`   // scopes of hosts whose credentials were seen
	Issued map[string]bool             `json:"issued,omitempty"` // Vault's names of who reads for the broker
	Reads  []sightings.Sighting        `json:"reads,omitempty"`  // of leases that the ledger doesn't know yet
	Opened map[string][]string         `json:"opened,omitempty"` // by host and scope: who opened a file, the first ones
}

// A Span is between the first and the last login with one boot's credentials.
type Span struct {
	First    time.Time          `json:"first"`
	Last     time.Time          `json:"last"`
	Lease    string             `json:"lease"`
	Evidence sightings.Sighting `json:"evidence"` // the last
}

type program struct{ host, scope string }

// maxReads bounds the reads that wait for judgement: so many are judged at once.
const maxReads = 1 << 16

// maxOpeners bounds the programs that opened a credential's file and have a finding each.
const maxOpeners = 16

// maxActors bounds the names by which Vault knows who reads for the broker.
const maxActors = 1024

// NewJudge makes a judge over a ledger, which may grow.
func NewJudge(l *ledger.Index, c Config) *Judge {
	j := &Judge{ledger: l, config: c, made: map[string]bool{}, roles: map[string]bool{}, paths: map[string]bool{}, canaries: map[string]ledger.Entry{}, boots: map[string]string{}}
	for _, pattern := range c.Governed {
		exact, err := glob.Compile(pattern)
		folded, foldedErr := glob.Compile(strings.ToLower(pattern))
		if err == nil && foldedErr == nil {
			j.patterns = append(j.patterns, accounts{exact, folded})
		}
	}
	j.Restore(State{})
	return j
}

// accounts are those of one pattern; Windows knows no letters' case.
type accounts struct{ exact, folded glob.Pattern }

// Save is what Restore takes.
func (j *Judge) Save() State {
	j.seen.Used = map[string][]string{}
	for p := range j.used {
		j.seen.Used[p.host] = append(j.seen.Used[p.host], p.scope)
	}
	for _, scopes := range j.seen.Used {
		slices.Sort(scopes)
	}
	return j.seen
}

// Restore goes on from where Save was called.
func (j *Judge) Restore(s State) {
	if s.Use == nil {
		s.Use = map[string]map[string]*Span{}
	}
	if s.Issued == nil {
		s.Issued = map[string]bool{}
	}
	if s.Opened == nil {
		s.Opened = map[string][]string{}
	}
	j.seen, j.used = s, map[program]bool{}
	for host, scopes := range s.Used {
		for _, scope := range scopes {
			j.used[program{host, scope}] = true
		}
	}
}

// Learn takes what an entry says of all of its kind: the role that governed user
// names are of, and the path that only the broker reads.
func (j *Judge) Learn(e ledger.Entry) {
	p := e.Names.Path()
	if e.Kind == ledger.KindCanary {
		for _, name := range []string{p, e.Names.DBUsername, e.Names.SSHKeyID} {
			if name != "" {
				j.canaries[name] = e
			}
		}
		return
	}
	if p != "" {
		j.paths[p] = true
	}
	made, ok := madeFor(e.Names.DBUsername)
	if !ok {
		return
	}
	j.made[made] = true
	if role := p[strings.LastIndexByte(p, '/')+1:]; role != "" {
		if role = role[:min(len(role), 8)]; strings.HasSuffix(made, "-"+role) {
			j.roles[role] = true
		}
	}
}

// madeFor is what stands before the random part of a user name that Vault's database
// engine made: v-<display>-<role>-<20 random>-<unix time>, of display and role the
// first 8 characters.
func madeFor(user string) (string, bool) {
	rest, ok := strings.CutPrefix(user, "v-")
	if !ok {
		return "", false
	}
	i := strings.LastIndexByte(rest, '-')
	if i < 0 || len(rest)-i-1 != 10 || strings.Trim(rest[i+1:], "0123456789") != "" {
		return "", false
	}
	rest = rest[:i]
	i = strings.LastIndexByte(rest, '-')
	if i < 0 || len(rest)-i-1 != 20 || strings.IndexFunc(rest[i+1:], func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) >= 0 {
		return "", false
	}
	return rest[:i], true
}

// governed says whether only the broker hands out an account of this name.
func (j *Judge) governed(s sightings.Sighting) bool {
	account := s.Account
	if made, ok := madeFor(account); ok {
		if j.made[made] {
			return true
		}
		// Of the same role, for somebody else: a display name may hold dashes, too.
		for i := range min(len(made), 9) {
			if made[i] == '-' && j.roles[made[i+1:]] {
				return true
			}
		}
	}
	return slices.ContainsFunc(j.patterns, func(g accounts) bool {
		if s.Windows {
			return g.folded.Match(strings.ToLower(account))
		}
		return g.exact.Match(account)
	})
}

// Known reports whether the ledger has what a sighting is of. Otherwise it may hear of
// it later: of the credential, or of a canary that a failed login touched.
func (j *Judge) Known(s sightings.Sighting) (bool, error) {
	if _, canary := j.canary(s); canary {
		return true, nil
	}
	switch s.Kind {
	case sightings.Read:
		return j.ours(s)
	case sightings.Open:
		return true, nil // the broker's log has it, behind what it is of
	}
	entries, err := j.entries(s)
	return len(entries) > 0, err
}

// Explains says whether the ledger has what a sighting shows, by the time of it: a
// login with a credential that was issued by then, or a read of the broker's.
func (j *Judge) Explains(s sightings.Sighting) (bool, error) {
	if s.Kind == sightings.Read {
		return j.ours(s)
	}
	entries, err := j.entries(s)
	return slices.ContainsFunc(entries, func(e ledger.Entry) bool { return !e.Issued.After(s.Time.Add(Skew)) }), err
}

// Uses says whether a program was seen to use what it was issued in a scope.
func (j *Judge) Uses(host, scope string) bool { return j.used[program{host, scope}] }

// canary is the canary that a sighting touches.
func (j *Judge) canary(s sightings.Sighting) (ledger.Entry, bool) {
	names := []string{s.Account, s.SSHKeyID}
	if s.Kind == sightings.Read {
		names = []string{s.VaultPath}
	}
	for _, name := range names {
		e, ok := j.canaries[name]
		if s.Windows {
			for canary, entry := range j.canaries {
				if strings.EqualFold(canary, name) {
					e, ok = entry, true
				}
			}
		}
		if ok && name != "" && !s.Time.Before(e.Issued.Add(-Skew)) && (e.Revoked.IsZero() || s.Time.Before(e.Revoked)) {
			return e, true
		}
	}
	return ledger.Entry{}, false
}

// entries are those of the credential that a sighting names.
func (j *Judge) entries(s sightings.Sighting) ([]ledger.Entry, error) {
	switch {
	case s.SSHKeyID != "" || s.SSHSerial != "":
		found, err := j.ledger.Find(ledger.BySSHKeyID, s.SSHKeyID)
		if err != nil {
			return nil, err
		}
		// One key signed twice has one key id.
		found = slices.DeleteFunc(found, func(e ledger.Entry) bool {
			serial := e.Names.SSHSerial
			if serial == "" {
				serial = e.Names.CertificateSerial
			}
			return serial != "" && s.SSHSerial != "" && serial != s.SSHSerial
		})
		if len(found) == 0 {
			// A serial is its CA's, and means nothing where another key id stands beside it.
			if found, err = j.ledger.Find(ledger.BySSHSerial, s.SSHSerial); err == nil && len(found) == 0 {
				found, err = j.ledger.Find(ledger.BySerial, s.SSHSerial)
			}
			found = slices.DeleteFunc(found, func(e ledger.Entry) bool { return e.Names.SSHKeyID != "" })
		}
		return found, err
	case s.CertSerial != "":
		return j.ledger.Find(ledger.BySerial, s.CertSerial)
	case s.Account != "" && !s.SSH:
		found, err := j.ledger.Find(ledger.ByDBUsername, ledger.AccountKey(s.Account))
		return slices.DeleteFunc(found, func(e ledger.Entry) bool {
			// Others have accounts of KV's names, too.
			return !s.Windows && e.Names.DBUsername != s.Account || e.Names.Stored() && e.Kind != ledger.KindCanary && !aimed(e.Audience, s)
		}), err
	}
	return nil, nil
}

// ours says whether a read was the broker's: it gave a lease that the ledger has, or
// it was for a lease of just that path.
func (j *Judge) ours(s sightings.Sighting) (bool, error) {
	found, err := j.ledger.Find(ledger.ByVaultLease, s.VaultLease)
	if err != nil || len(found) > 0 || s.VaultLease != "" {
		return len(found) > 0, err
	}
	found, err = j.ledger.Find(ledger.ByID, s.Lease)
	return len(found) > 0 && found[0].Names.Path() == s.VaultPath, err
}

// See judges one sighting.
func (j *Judge) See(s sightings.Sighting) ([]Detection, error) {
	if e, ok := j.canary(s); ok {
		d := detection(Canary, &e, s, "a canary that nobody was given was touched")
		if s.Kind == sightings.Read {
			d.Account = s.VaultPath
		}
		return []Detection{d}, nil
	}
	switch s.Kind {
	case sightings.Read:
		return j.read(s)
	case sightings.Attempt:
		return nil, nil // anybody may try
	case sightings.Open:
		return j.opened(s)
	}
	entries, err := j.entries(s)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		if s.Kind == sightings.Login && j.governed(s) {
			return []Detection{detection(UnmatchedLogin, nil, s, "the account is governed, and was not issued by the broker")}, nil
		}
		return nil, nil
	}
	entries = slices.DeleteFunc(entries, func(e ledger.Entry) bool { return e.Kind == ledger.KindCanary })
	if len(entries) == 0 {
		return nil, nil // a canary that was taken away
	}
	for _, e := range entries {
		j.used[program{e.Host, e.Scope}] = true
	}
	if s.Kind != sightings.Login {
		return nil, nil
	}
	var out []Detection
	if static(entries) {
		out = j.static(entries, s)
	} else {
		newest := slices.MaxFunc(entries, func(a, b ledger.Entry) int { return a.Issued.Compare(b.Issued) })
		out = j.dynamic(newest, s)
	}
	if why := human(s); why != "" {
		e := slices.MaxFunc(entries, func(a, b ledger.Entry) int { return a.Issued.Compare(b.Issued) })
		d := detection(HumanUse, &e, s, why)
		if static(entries) {
			d.Lease, d.Host = "", ""
		}
		out = append(out, d)
	}
	return out, nil
}

func detection(name Name, e *ledger.Entry, s sightings.Sighting, why string) Detection {
	d := Detection{Detector: name, Account: s.Account, Time: s.Time, Why: why, Sighting: &s}
	if s.Windows {
		d.Account = strings.ToLower(s.Account) // one account has one cause
	}
	if e != nil {
		d.Lease, d.Host = e.ID, e.Host
	}
	return d
}

// read keeps who reads for the broker, and what somebody else may have read.
func (j *Judge) read(s sightings.Sighting) ([]Detection, error) {
	ours, err := j.ours(s)
	if err != nil {
		return nil, err
	}
	if ours {
		// A token of a lease's own is no name for the next.
		if s.Lease == "" && len(j.seen.Issued) < maxActors {
			j.seen.Issued[s.Actor] = true
		}
		return nil, nil
	}
	if !j.paths[s.VaultPath] {
		return nil, nil
	}
	if j.seen.Reads = append(j.seen.Reads, s); len(j.seen.Reads) < maxReads {
		return nil, nil
	}
	return j.Reads() // who reads for the broker may show later, but what was seen isn't let go
}

// opened judges that a credential's file was opened by a program that isn't its own, by
// the word of its host's agent.
func (j *Judge) opened(s sightings.Sighting) ([]Detection, error) {
	found, err := j.ledger.Find(ledger.ByID, s.Lease)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	e := found[0]
	of, who := e.Host+" "+e.Scope, s.Program+" "+s.Actor
	if !slices.Contains(j.seen.Opened[of], who) {
		if len(j.seen.Opened[of]) >= maxOpeners {
			who = "and others" // a host can name any number
		} else {
			j.seen.Opened[of] = append(j.seen.Opened[of], who)
		}
	}
	return []Detection{{Detector: OutOfBandRead, Lease: e.ID, Host: e.Host, Account: e.Names.DBUsername, Time: s.Time, Cause: of + " " + who,
		Why: fmt.Sprintf("its file %s was opened by %s (%s), which isn't the program it was made for", s.Target, s.Program, s.Actor), Sighting: &s}}, nil
}

// Reads judges the reads of governed paths that were seen: after the ledger had the
// time to hear of the broker's own.
func (j *Judge) Reads() (out []Detection, err error) {
	for _, s := range j.seen.Reads {
		ours, err := j.ours(s)
		if err != nil {
			return nil, err
		}
		if ours || !j.paths[s.VaultPath] || s.Actor != "" && j.seen.Issued[s.Actor] {
			continue
		}
		out = append(out, Detection{Detector: OutOfBandRead, Account: s.VaultPath, Time: s.Time, Cause: s.VaultPath + " " + s.Actor,
			Why: fmt.Sprintf("read by %q, who is not the broker", s.Actor), Sighting: &s})
	}
	j.seen.Reads = nil
	return out, nil
}
