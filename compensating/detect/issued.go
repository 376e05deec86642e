package detect

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/compensating/ledger"
)

// Program judges the entries of one scope on one host, by the time of issue.
func (j *Judge) Program(entries []ledger.Entry) ([]Detection, error) {
	twins, err := j.twins(entries)
	return slices.Concat(drift(entries), returned(entries), twins), err
}

// bootID is how long the kernel's name of a boot is: what is shorter may not be random.
const bootID = 32

// twins sees one run of a program on two hosts at once: a machine that was copied
// while it ran.
func (j *Judge) twins(entries []ledger.Entry) ([]Detection, error) {
	for _, e := range entries {
		if len(e.Subject.Boot) < bootID {
			continue
		}
		first, seen := j.boots[e.Subject.Boot]
		if !seen {
			j.boots[e.Subject.Boot] = e.Host
			first = e.Host
		}
		if first == e.Host {
			continue
		}
		others, err := j.ledger.Program(first, e.Scope)
		if err != nil {
			return nil, err
		}
		for _, o := range others {
			if o.Subject.Instance() == e.Subject.Instance() && o.Overlaps(e, Skew) {
				return []Detection{{Detector: DuplicateInstance, Lease: e.ID, Host: e.Host, Account: e.Names.DBUsername, Time: e.Issued, Cause: e.Host + " " + first,
					Why: fmt.Sprintf("the run of the program that host %s has credentials for (lease %s): the machine was copied while it ran", first, o.ID)}}, nil
			}
		}
	}
	return nil, nil
}

// drift sees a program that is no longer what it was: another path, unit, user or
// parent than any before, or another digest that no release announced; and a machine
// that booted otherwise, into what no approved set has.
func drift(entries []ledger.Entry) (out []Detection) {
	seen := map[string]map[string]bool{}
	for _, e := range entries {
		var changes []string
		for _, f := range []struct{ name, value string }{
			{"exe", e.Subject.Exe}, {"unit", e.Subject.Unit}, {"user", e.Subject.User}, {"parent", string(e.Subject.Parent)}, {"sha256", e.Subject.SHA256},
			{"secure boot", onOff(e.Machine.SecureBoot)}, {"kernel command line", bootOptions(e.Machine.CommandLine)},
		} {
			if f.value == "" {
				continue
			}
			before := seen[f.name]
			if before == nil {
				before = map[string]bool{}
				seen[f.name] = before
			}
			var announced bool
			switch f.name {
			case "sha256":
				announced = e.Subject.Release != ""
			case "secure boot":
				announced = e.Machine.Reference != "" || f.value == "on"
			case "kernel command line":
				announced = e.Machine.Reference != ""
			}
			if len(before) > 0 && !before[f.value] && !announced {
				changes = append(changes, fmt.Sprintf("%s is %s", f.name, f.value))
			}
			before[f.value] = true
		}
		if len(changes) > 0 {
			out = append(out, Detection{Detector: SubjectDrift, Lease: e.ID, Host: e.Host, Account: e.Names.DBUsername, Time: e.Issued, Cause: e.Host + " " + e.Scope + ": " + strings.Join(changes, ", "),
				Why: "not seen before for this scope on this host: " + strings.Join(changes, ", ")})
		}
	}
	return out
}

// bootOptions is a kernel command line without the names of kernel, initrd and
// deployment, which each update changes.
func bootOptions(line string) string {
	words := strings.Fields(line)
	if len(words) > 0 {
		if name, _, _ := strings.Cut(words[0], "="); strings.Contains(name, "/") {
			words = words[1:] // as GRUB measures it: /vmlinuz-6.1, (hd0,gpt2)/vmlinuz-6.1
		}
	}
	return strings.Join(slices.DeleteFunc(words, func(w string) bool {
		name, _, _ := strings.Cut(w, "=")
		return slices.Contains([]string{"BOOT_IMAGE", "initrd", "ostree"}, name)
	}), " ")
}

func onOff(b *bool) string {
	switch {
	case b == nil:
		return ""
	case *b:
		return "on"
	}
	return "off"
}

// returned sees an invocation of a unit, or a boot, that is issued to again after
// another was: neither comes back, so there are two.
func returned(entries []ledger.Entry) []Detection {
	last := map[string]string{} // of a unit, or of all else: the instance that was issued to last
	over := map[string]bool{}
	for _, e := range entries {
		instance := e.Subject.Boot // of processes without a unit there may be several
		if e.Subject.Unit != "" {
			instance = e.Subject.Instance()
		}
		if strings.TrimSpace(instance) == "" {
			continue
		}
		unit := e.Subject.Unit
		if over[unit+"\x00"+instance] {
			return []Detection{{Detector: DuplicateInstance, Lease: e.ID, Host: e.Host, Account: e.Names.DBUsername, Time: e.Issued, Cause: e.Host,
				Why: "issued to a run of the program that another had followed: the host runs twice"}}
		}
		if before, ok := last[unit]; ok && before != instance {
			over[unit+"\x00"+before] = true
		}
		last[unit] = instance
	}
	return nil
}

// Equal judges entries whose secrets are equal: of one account they are, of two
// they never should.
func Equal(entries []ledger.Entry) []Detection {
	slices.SortFunc(entries, func(a, b ledger.Entry) int { return a.Issued.Compare(b.Issued) })
	account := func(e ledger.Entry) string {
		if e.Names.DBUsername != "" && !e.Names.Stored() {
			return e.Names.DBUsername
		}
		if p := e.Names.Path(); p != "" {
			return p
		}
		return e.Scope
	}
	first := entries[0]
	for _, e := range entries[1:] {
		if account(e) != account(first) {
			return []Detection{{Detector: SameSecret, Lease: e.ID, Host: e.Host, Account: account(e), Time: e.Issued, Cause: e.Names.SecretHMAC,
				Why: fmt.Sprintf("its secret is that of %s, too (lease %s of host %s)", account(first), first.ID, first.Host)}}
		}
	}
	return nil
}

// A Coverage is the time of which logs tell: of databases, or of sshd.
type Coverage struct{ First, Last time.Time }

// covers says whether the whole life of a credential lies in it.
func (c Coverage) covers(e ledger.Entry) bool {
	end := e.End()
	return !c.First.IsZero() && !end.IsZero() && !e.Issued.Before(c.First) && !end.After(c.Last)
}

// Unused judges the entries of one scope on one host by what was seen while the logs
// told of logins: a program that never used what it got, for the whole life of at
// least one credential.
func (j *Judge) Unused(entries []ledger.Entry, databases, sshd Coverage) []Detection {
	if j.Uses(entries[0].Host, entries[0].Scope) {
		return nil
	}
	for _, e := range entries {
		told := e.Names.DBUsername != "" && databases.covers(e) && (!e.Names.Stored() || database(e.Audience)) || e.Names.SSHKeyID != "" && sshd.covers(e)
		if !told || e.End().Sub(e.Issued) < shortest {
			continue
		}
		return []Detection{{Detector: Dormant, Lease: e.ID, Host: e.Host, Account: e.Names.DBUsername, Time: e.End(),
			Why: fmt.Sprintf("issued at %s, and never used to its end", e.Issued.UTC().Format(time.RFC3339))}}
	}
	return nil
}

// database says whether an audience has a database whose logs are read.
func database(audience []string) bool {
	return slices.ContainsFunc(audience, func(place string) bool {
		return strings.HasPrefix(place, "postgres://") || strings.HasPrefix(place, "postgresql://")
	})
}

// shortest is the life of a credential below which it says nothing that nobody used it.
const shortest = 5 * time.Minute
