package detect

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// static says whether entries are readers of one account, which outlives them.
func static(entries []ledger.Entry) bool {
	e := entries[0]
	_, made := madeFor(e.Names.DBUsername)
	return e.Names.DBUsername != "" && e.Names.VaultLease == "" && !made
}

// aimed says whether a login is at a place of an audience: at one of its databases or
// at those that every server has; of Windows' accounts, at anything of Windows'.
func aimed(audience []string, s sightings.Sighting) bool {
	return slices.ContainsFunc(audience, func(place string) bool {
		u, err := url.Parse(place)
		if err != nil {
			return false
		}
		switch u.Scheme {
		case "sqlserver", "mssql":
			if s.Windows {
				return true
			}
		case "postgres", "postgresql", "mysql", "mariadb", "oracle":
			if s.Windows {
				return false
			}
		default:
			return false
		}
		database := strings.Trim(u.Path, "/")
		return database == "" || s.Target == "" || s.Target == database || s.Target == u.Hostname() || s.Target == "postgres" || s.Target == "template1"
	})
}

// dynamic judges a login with a credential that was made for one program.
func (j *Judge) dynamic(e ledger.Entry, s sightings.Sighting) (out []Detection) {
	if end := e.End(); !end.IsZero() && s.Time.After(end.Add(Skew)) {
		out = append(out, detection(UseAfterRevoke, &e, s, fmt.Sprintf("logged in %s after its end at %s", s.Time.Sub(end).Round(time.Second), end.UTC().Format(time.RFC3339))))
	}
	switch j.where(e, s) {
	case elsewhere:
		out = append(out, detection(ForeignSource, &e, s, fmt.Sprintf("used from %s; it was issued to host %s at %s", s.From, e.Host, strings.Join(e.Sources, ", "))))
	case there:
		if d, ok := j.twice(e, s); ok {
			out = append(out, d)
		}
	}
	return out
}

// A place is what a sighting's address says.
type place int

const (
	unknown   place = iota
	there           // one of the host's
	through         // declared for any host
	elsewhere       // no host's to which it was issued
)

func (j *Judge) where(e ledger.Entry, s sightings.Sighting) place {
	if !s.From.IsValid() || s.Local {
		return unknown
	}
	prefixes := e.Prefixes()
	contains := func(p netip.Prefix) bool { return p.Contains(s.From) }
	switch {
	case slices.ContainsFunc(prefixes, contains) || j.ledger.At(e.Host, s.From, s.Time, Skew):
		return there
	case slices.ContainsFunc(j.config.Through, contains):
		return through
	case len(prefixes) == 0, s.From.IsLoopback() && !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Addr().IsLoopback() }):
		return unknown // the target's own machine may be the host
	}
	return elsewhere
}

// twice sees a host that runs twice: credentials of one boot are used, then those of
// another, then those of the first again, each from an address that is the host's.
func (j *Judge) twice(e ledger.Entry, s sightings.Sighting) (Detection, bool) {
	if e.Subject.Boot == "" {
		return Detection{}, false
	}
	boots := j.seen.Use[e.Host]
	if boots == nil {
		boots = map[string]*Span{}
		j.seen.Use[e.Host] = boots
	}
	at := boots[e.Subject.Boot]
	if at == nil {
		at = &Span{First: s.Time, Last: s.Time, Lease: e.ID, Evidence: s}
		boots[e.Subject.Boot] = at
	}
	if s.Time.Before(at.First) {
		at.First = s.Time
	}
	if !s.Time.Before(at.Last) {
		at.Last, at.Lease, at.Evidence = s.Time, e.ID, s
	}
	for boot, other := range boots {
		if boot == e.Subject.Boot {
			continue
		}
		older, newer := at, other
		if other.First.Before(at.First) {
			older, newer = other, at
		}
		// Two logs may be off in two directions.
		if older.Last.After(newer.First.Add(2 * Skew)) {
			return Detection{Detector: DuplicateInstance, Lease: older.Lease, Host: e.Host, Account: older.Evidence.Account, Time: older.Last, Cause: e.Host,
				Why: "credentials of an earlier boot are in use beside those of a later one: the host runs twice", Sighting: &older.Evidence}, true
		}
	}
	return Detection{}, false
}

// static judges a login with an account whose password several may have read.
func (j *Judge) static(readers []ledger.Entry, s sightings.Sighting) []Detection {
	var here []ledger.Entry
	somewhere := unknown
	for _, e := range readers {
		if e.Issued.After(s.Time.Add(Skew)) {
			continue
		}
		at := j.where(e, s)
		if at == there {
			here = append(here, e)
		}
		somewhere = max(somewhere, at)
	}
	switch {
	case len(here) == 0 && somewhere == elsewhere:
		return []Detection{detection(SharedStaticAccount, nil, s, fmt.Sprintf("used from %s, where no program was given it", s.From))}
	case len(here) > 0 && !slices.ContainsFunc(here, func(e ledger.Entry) bool { return e.Holds(s.Time, Skew) }):
		last := slices.MaxFunc(here, func(a, b ledger.Entry) int { return a.End().Compare(b.End()) })
		return []Detection{detection(UseAfterRevoke, &last, s, fmt.Sprintf("logged in after its lease ended at %s; only a rotation ends the password", last.End().UTC().Format(time.RFC3339)))}
	}
	if a, b, ok := together(readers); ok {
		return []Detection{detection(SharedStaticAccount, nil, s, fmt.Sprintf("%s of host %s and %s of host %s have it at once", a.Subject.Program(), a.Host, b.Subject.Program(), b.Host))}
	}
	return nil
}

// together finds two programs that hold an account at once.
func together(readers []ledger.Entry) (a, b ledger.Entry, ok bool) {
	slices.SortFunc(readers, func(a, b ledger.Entry) int { return a.Issued.Compare(b.Issued) })
	last := readers[0] // of those before, the one that holds longest
	for _, e := range readers[1:] {
		if (e.Host != last.Host || e.Subject.Program() != last.Subject.Program()) && last.Overlaps(e, Skew) {
			return last, e, true
		}
		if end := last.End(); !end.IsZero() && (e.End().IsZero() || e.End().After(end)) {
			last = e
		}
	}
	return a, b, false
}

// people's programs, as they name themselves, in lower case.
var people = []string{"psql", "pgadmin", "dbeaver", "datagrip", "microsoft sql server management studio", "ssms", "sqlcmd", "azuredatastudio", "heidisql",
	"navicat", "tableplus", "toad", "sql developer", "sqldeveloper", "postico", "pgcli", "beekeeper", "dbvisualizer", "squirrel sql", "mysql workbench", "adminer"}

// human says why a login looks like a person's; empty: it doesn't.
func human(s sightings.Sighting) string {
	if s.Interactive {
		return "an interactive logon with a program's account"
	}
	name := strings.ToLower(s.Program)
	if i := strings.LastIndexAny(name, `/\`); i >= 0 {
		name = name[i+1:]
	}
	for _, p := range people {
		if rest, ok := strings.CutPrefix(name, p); ok && (rest == "" || !letter(rest[0])) {
			return fmt.Sprintf("used by %q, a program for people", s.Program)
		}
	}
	return ""
}

func letter(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' }
