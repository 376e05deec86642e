package detect_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api/detector"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const user = "v-token-co-billing--abcdefghij0123456789-1772366400"

// issued is a credential of one hour, as most tests begin with.
func issued(change ...func(*ledger.Entry)) ledger.Entry {
	e := ledger.Entry{ID: "L1", Scope: "billing-db", Host: "h1", Kind: "vault", Sources: []string{"10.0.0.1"}, Issued: noon, Expires: noon.Add(time.Hour),
		Subject: ledger.Subject{Boot: "b1", Unit: "billing.service", Invocation: "i1", User: "billing", Parent: "/sbin/init", Exe: "/opt/billingd", SHA256: "aa"},
		Names:   ledger.Names{DBUsername: user, VaultLease: "database/creds/billing-ro/x"}}
	for _, f := range change {
		f(&e)
	}
	return e
}

func login(after time.Duration, from string, change ...func(*sightings.Sighting)) sightings.Sighting {
	s := sightings.Sighting{Time: noon.Add(after), Kind: sightings.Login, Source: "pg", Account: user, Program: "billingd"}
	if from != "" {
		s.From = netip.MustParseAddr(from)
	}
	for _, f := range change {
		f(&s)
	}
	return s
}

// booted are two credentials of one program, on a machine as it booted first and then:
// Secure Boot, command line and reference set of each.
func booted(as ...string) (out []ledger.Entry) {
	for i, id := range []string{"L1", "L2"} {
		out = append(out, issued(func(e *ledger.Entry) {
			e.ID, e.Issued = id, noon.Add(time.Duration(i)*time.Minute)
			m := as[3*i : 3*i+3]
			if m[0] != "" {
				on := m[0] == "on"
				e.Machine.SecureBoot = &on
			}
			e.Machine.CommandLine, e.Machine.Reference = m[1], m[2]
		}))
	}
	return out
}

// judge runs all there is over entries and sightings, and says what was found.
func judge(t *testing.T, c detect.Config, entries []ledger.Entry, seen ...sightings.Sighting) string {
	t.Helper()
	var b bytes.Buffer
	for _, e := range entries {
		if err := json.NewEncoder(&b).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	x := ledger.NewIndex(bytes.NewReader(b.Bytes()))
	if err := x.Load(int64(b.Len())); err != nil {
		t.Fatal(err)
	}
	j := detect.NewJudge(x, c)
	var found []detect.Detection
	add := func(list []detect.Detection, err error) {
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, list...)
	}
	for _, e := range entries {
		j.Learn(e)
	}
	for _, s := range seen {
		add(j.See(s))
	}
	add(j.Reads())
	if err := x.Programs(func(list []ledger.Entry) error {
		add(j.Program(list))
		all := detect.Coverage{First: noon.Add(-time.Hour), Last: noon.Add(24 * time.Hour)}
		add(j.Unused(list, all, all), nil)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := x.Shared(func(f ledger.Field, list []ledger.Entry) error {
		if f == ledger.BySecret {
			add(detect.Equal(list), nil)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, d := range found {
		out = append(out, strings.TrimSpace(fmt.Sprint(d.Detector, " ", d.Lease)))
	}
	return strings.Join(out, ", ")
}

func TestDynamic(t *testing.T) {
	at := func(id string, after time.Duration, change ...func(*ledger.Entry)) ledger.Entry {
		return issued(append([]func(*ledger.Entry){func(e *ledger.Entry) {
			e.ID, e.Issued, e.Expires = id, noon.Add(after), noon.Add(after+time.Hour)
			e.Names.DBUsername = strings.Replace(user, "abc", "ab"+id[1:], 1)
			e.Names.VaultLease += id
		}}, change...)...)
	}
	of := func(e ledger.Entry) func(*sightings.Sighting) {
		return func(s *sightings.Sighting) { s.Account = e.Names.DBUsername }
	}
	boot2 := func(e *ledger.Entry) { e.Subject.Boot, e.Subject.Invocation = "b2", "i2" }
	real := func(e *ledger.Entry) { e.Subject.Boot = "4d0c3f0e-7f4a-4f0a-9d2b-0e8a2f3b7c11" }
	endless := func(e *ledger.Entry) { e.Expires = time.Time{} }
	second := at("L2", 10*time.Minute, boot2)
	moved := at("L2", 10*time.Minute, boot2, func(e *ledger.Entry) { e.Sources = []string{"10.0.0.2"} })
	for name, c := range map[string]struct {
		entries []ledger.Entry
		seen    []sightings.Sighting
		config  detect.Config
		want    string
	}{
		"used as it should be":             {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a clock 30 s behind":              {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(-30*time.Second, "10.0.0.1")}},
		"a clock 30 s ahead, at the end":   {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(time.Hour+30*time.Second, "10.0.0.1")}},
		"from elsewhere":                   {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.9")}, want: "foreign-source L1"},
		"tried from elsewhere":             {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Kind = sightings.Attempt })}},
		"through a declared pooler":        {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.9.0.9")}, config: detect.Config{Through: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}}},
		"from a source that is a prefix":   {entries: []ledger.Entry{issued(func(e *ledger.Entry) { e.Sources = []string{"10.0.0.0/24"} })}, seen: []sightings.Sighting{login(0, "10.0.0.9")}},
		"a log without addresses":          {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "")}},
		"from the target's own machine":    {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "127.0.0.1")}},
		"after its end":                    {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(62*time.Minute, "10.0.0.1")}, want: "use-after-revoke L1"},
		"after it was revoked":             {entries: []ledger.Entry{issued(func(e *ledger.Entry) { e.Revoked = noon.Add(time.Minute) })}, seen: []sightings.Sighting{login(3*time.Minute, "10.0.0.1")}, want: "use-after-revoke L1"},
		"a session that outlives it":       {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(2*time.Hour, "10.0.0.1", func(s *sightings.Sighting) { s.Kind = sightings.Session })}},
		"an account that nobody issued":    {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account = strings.Replace(user, "abc", "xyz", 1) })}, want: "unmatched-login"},
		"an account of another role":       {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account = strings.Replace(user, "billing-", "reports", 1) })}},
		"a governed one of Windows":        {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account, s.Windows = "SVC-X", true })}, config: detect.Config{Governed: []string{"svc-*"}}, want: "unmatched-login"},
		"a canary in Windows' letters":     {entries: []ledger.Entry{issued(func(e *ledger.Entry) { e.Kind, e.Scope, e.Names.DBUsername = ledger.KindCanary, "", "svc-trap" })}, seen: []sightings.Sighting{login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account, s.Windows = "SVC-Trap", true })}, want: "canary L1"},
		"an account named as governed":     {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account = "svc-x" })}, config: detect.Config{Governed: []string{"svc-*"}}, want: "unmatched-login"},
		"a name with another's in it":      {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account = "x" + user })}},
		"by a person":                      {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Program = "psql" })}, want: "human-use L1"},
		"by a program with such a name":    {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Program = "psqlproxy" })}},
		"by remote desktop":                {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Interactive = true })}, want: "human-use L1"},
		"a canary":                         {entries: []ledger.Entry{issued(func(e *ledger.Entry) { e.Kind, e.Scope = ledger.KindCanary, "" })}, seen: []sightings.Sighting{login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Kind = sightings.Attempt })}, want: "canary L1"},
		"never used":                       {entries: []ledger.Entry{issued()}, want: "dormant L1"},
		"a pool that keeps its sessions":   {entries: []ledger.Entry{issued(), at("L2", 50*time.Minute)}, seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a reboot":                         {entries: []ledger.Entry{issued(), second}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(9*time.Minute, "10.0.0.1"), login(11*time.Minute, "10.0.0.1", of(second))}},
		"a reboot to another address":      {entries: []ledger.Entry{issued(), moved}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(11*time.Minute, "10.0.0.2", of(moved)), login(12*time.Minute, "10.0.0.1", of(moved))}},
		"a reboot in two logs' times":      {entries: []ledger.Entry{issued(), second}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(11*time.Minute+40*time.Second, "10.0.0.1"), login(10*time.Minute+40*time.Second, "10.0.0.1", of(second))}},
		"the boot before lives on":         {entries: []ledger.Entry{issued(), second}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(20*time.Minute, "10.0.0.1"), login(11*time.Minute, "10.0.0.1", of(second))}, want: "duplicate-instance L1"},
		"the invocation before comes back": {entries: []ledger.Entry{issued(), second, at("L3", 20*time.Minute)}, seen: []sightings.Sighting{login(0, "10.0.0.1")}, want: "duplicate-instance L3"},
		"another path":                     {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Subject.Exe = "/tmp/x" })}, seen: []sightings.Sighting{login(0, "10.0.0.1")}, want: "subject-drift L2"},
		"Secure Boot goes off":             {entries: booted("on", "/vmlinuz-1 ro quiet", "", "off", "/vmlinuz-1 ro quiet", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}, want: "subject-drift L2"},
		"Secure Boot goes on":              {entries: booted("off", "", "", "on", "", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"another kernel command line":      {entries: booted("on", "/vmlinuz-1 ro quiet", "", "on", "/vmlinuz-1 ro init=/bin/sh", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}, want: "subject-drift L2"},
		"a kernel that was updated":        {entries: booted("on", "BOOT_IMAGE=/vmlinuz-1 ro initrd=/initrd-1", "", "on", "BOOT_IMAGE=/vmlinuz-2 ro initrd=/initrd-2", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"one of Fedora's":                  {entries: booted("on", "(hd0,gpt2)/vmlinuz-1 ro quiet", "", "on", "(hd0,gpt2)/vmlinuz-2 ro quiet", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"one of an ostree's":               {entries: booted("on", "BOOT_IMAGE=(hd0)/a/vmlinuz ostree=/ostree/boot.1/a rw", "", "on", "BOOT_IMAGE=(hd0)/b/vmlinuz ostree=/ostree/boot.0/b rw", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"one that GRUB measured":           {entries: booted("on", "/vmlinuz-1 ro quiet", "", "on", "/vmlinuz-2 ro quiet", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a boot that was approved":         {entries: booted("on", "/vmlinuz-1 ro quiet", "", "off", "/vmlinuz-1 ro", "debian12"), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a boot without a log":             {entries: booted("on", "/vmlinuz-1 ro quiet", "", "", "", ""), seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"another digest":                   {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Subject.SHA256 = "bb" }), at("L3", 2*time.Minute, func(e *ledger.Entry) { e.Subject.SHA256 = "bb" })}, seen: []sightings.Sighting{login(0, "10.0.0.1")}, want: "subject-drift L2"},
		"a digest that was announced":      {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Subject.SHA256, e.Subject.Release = "bb", "billingd-2" })}, seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a parent that couldn't be read":   {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Subject.Parent = "" })}, seen: []sightings.Sighting{login(0, "10.0.0.1")}},
		"a program on another host":        {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Host, e.Subject.Exe = "h2", "/usr/bin/x" })}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(time.Minute, "10.0.0.1", of(at("L2", 0)))}},
		"a machine copied while it ran": {entries: []ledger.Entry{issued(real), at("L2", 10*time.Minute, real, func(e *ledger.Entry) { e.Host, e.Sources = "h2", []string{"10.0.0.2"} })},
			seen: []sightings.Sighting{login(0, "10.0.0.1"), login(11*time.Minute, "10.0.0.2", of(second))}, want: "duplicate-instance L2"},
		"a machine copied while it ran, without ends": {entries: []ledger.Entry{issued(real, endless), at("L2", 10*time.Minute, real, endless, func(e *ledger.Entry) { e.Host, e.Sources = "h2", []string{"10.0.0.2"} })},
			seen: []sightings.Sighting{login(0, "10.0.0.1"), login(11*time.Minute, "10.0.0.2", of(second))}, want: "duplicate-instance L2"},
		"a machine that was enrolled anew": {entries: []ledger.Entry{issued(real, func(e *ledger.Entry) { e.Revoked = noon.Add(10 * time.Minute) }), at("L2", 10*time.Minute, real, func(e *ledger.Entry) { e.Host, e.Sources = "h2", []string{"10.0.0.2"} })},
			seen: []sightings.Sighting{login(0, "10.0.0.1"), login(11*time.Minute, "10.0.0.2", of(second))}},
		"an account of the role for somebody else": {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", func(s *sightings.Sighting) { s.Account = strings.Replace(user, "token-co", "ldap-bob", 1) })}, want: "unmatched-login"},
		"tried, and never used":                    {entries: []ledger.Entry{issued()}, seen: []sightings.Sighting{login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Kind = sightings.Attempt })}, want: "dormant L1"},
		"a canary that was taken away":             {entries: []ledger.Entry{issued(func(e *ledger.Entry) { e.Kind, e.Revoked = ledger.KindCanary, noon.Add(time.Minute) })}, seen: []sightings.Sighting{login(time.Hour, "10.0.0.1")}},
		"the same drift of two scopes": {entries: []ledger.Entry{issued(), at("L2", time.Minute, func(e *ledger.Entry) { e.Subject.User = "root" }), at("L3", 0, func(e *ledger.Entry) { e.Scope = "other" }),
			at("L4", time.Minute, func(e *ledger.Entry) { e.Scope, e.Subject.User = "other", "root" })}, seen: []sightings.Sighting{login(0, "10.0.0.1"), login(0, "10.0.0.1", of(at("L3", 0)))}, want: "subject-drift L2, subject-drift L4"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := judge(t, c.config, c.entries, c.seen...); got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
			// In the other order, as logs come when one was late.
			for i, j := 0, len(c.seen)-1; i < j; i, j = i+1, j-1 {
				c.seen[i], c.seen[j] = c.seen[j], c.seen[i]
			}
			if got := judge(t, c.config, c.entries, c.seen...); got != c.want {
				t.Errorf("in the other order: found %q, want %q", got, c.want)
			}
		})
	}
}

func TestStatic(t *testing.T) {
	reader := func(id, host, source string, change ...func(*ledger.Entry)) ledger.Entry {
		return issued(append([]func(*ledger.Entry){func(e *ledger.Entry) {
			e.ID, e.Host, e.Sources, e.Names = id, host, []string{source}, ledger.Names{DBUsername: "svc-old", VaultPath: "database/static-creds/old", SecretHMAC: "m1"}
		}}, change...)...)
	}
	used := func(after time.Duration, from string) sightings.Sighting {
		return login(after, from, func(s *sightings.Sighting) { s.Account = "svc-old" })
	}
	aim := func(e *ledger.Entry) {
		e.Audience, e.Names.VaultPath = []string{"postgres://db1:5432/billing"}, "kv/data/old"
	}
	windows := func(e *ledger.Entry) {
		e.Audience, e.Names.VaultPath, e.Names.DBUsername = []string{"sqlserver://mssql1"}, "kv/data/old", `CORP\svc-old`
	}
	mail := func(e *ledger.Entry) { e.Audience, e.Names.VaultPath = []string{"smtp://mail:25"}, "kv/data/mail" }
	at := func(database string, change ...func(*sightings.Sighting)) sightings.Sighting {
		return login(0, "10.0.0.9", append([]func(*sightings.Sighting){func(s *sightings.Sighting) { s.Account, s.Target = "svc-old", database }}, change...)...)
	}
	machine := func(s *sightings.Sighting) { s.Windows = true }
	svc := detect.Config{Governed: []string{"svc-*"}}
	later := func(e *ledger.Entry) {
		e.Issued, e.Expires, e.Subject.Boot, e.Subject.Invocation = noon.Add(time.Hour), noon.Add(2*time.Hour), "b2", "i2"
	}
	for name, c := range map[string]struct {
		entries []ledger.Entry
		seen    []sightings.Sighting
		want    string
		config  detect.Config
	}{
		"one reader":                    {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1")}, seen: []sightings.Sighting{used(0, "10.0.0.1")}, want: ""},
		"the same program, again":       {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1"), reader("2", "h1", "10.0.0.1", later)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), used(61*time.Minute, "10.0.0.1")}, want: ""},
		"two hosts at once":             {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1"), reader("2", "h2", "10.0.0.2")}, seen: []sightings.Sighting{used(0, "10.0.0.1")}, want: "shared-static-account"},
		"one host, then another":        {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1"), reader("2", "h2", "10.0.0.2", later)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), used(90*time.Minute, "10.0.0.2")}, want: ""},
		"where nobody was given it":     {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1")}, seen: []sightings.Sighting{used(0, "10.0.0.1"), used(0, "10.0.0.9")}, want: "shared-static-account"},
		"in other letters, at Windows":  {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", windows)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account, s.Windows, s.Target = "SVC-Old", true, "SRV1" })}, want: "shared-static-account"},
		"another account in them":       {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1")}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account = "SVC-Old" })}, want: ""},
		"of another database":           {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account, s.Target = "svc-old", "reports" })}, want: ""},
		"of a static role anywhere":     {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim, func(e *ledger.Entry) { e.Names.VaultPath = "database/static-creds/old" })}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account, s.Target = "svc-old", "reports" })}, want: "shared-static-account"},
		"of its database":               {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(0, "10.0.0.9", func(s *sightings.Sighting) { s.Account, s.Target = "svc-old", "billing" })}, want: "shared-static-account"},
		"after its lease":               {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1")}, seen: []sightings.Sighting{used(2*time.Hour, "10.0.0.1")}, want: "use-after-revoke 1"},
		"one secret for two accounts":   {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1"), reader("2", "h1", "10.0.0.1", later, func(e *ledger.Entry) { e.Scope, e.Names.DBUsername = "other", "svc-new" })}, seen: []sightings.Sighting{used(0, "10.0.0.1"), login(61*time.Minute, "10.0.0.1", func(s *sightings.Sighting) { s.Account = "svc-new" })}, want: "same-secret 2"},
		"at what every server has":      {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), at("postgres")}, want: "shared-static-account"},
		"one of mail's":                 {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", mail)}, seen: []sightings.Sighting{at("billing")}},
		"a machine's, not a database's": {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), at("WS-77", machine)}},
		"governed, at another":          {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim)}, seen: []sightings.Sighting{used(0, "10.0.0.1"), at("payroll")}, want: "unmatched-login", config: svc},
		"two of one name":               {entries: []ledger.Entry{reader("1", "h1", "10.0.0.1", aim), reader("2", "h1", "10.0.0.1", aim, func(e *ledger.Entry) { e.Scope, e.Names.VaultPath = "other", "kv/data/hr" })}, seen: []sightings.Sighting{used(0, "10.0.0.1")}, want: "same-secret 2"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := judge(t, c.config, c.entries, c.seen...); got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
}

func TestReads(t *testing.T) {
	read := func(path, vaultLease, lease, actor string) sightings.Sighting {
		return sightings.Sighting{Time: noon, Kind: sightings.Read, Source: "vault", VaultPath: path, VaultLease: vaultLease, Lease: lease, Actor: actor}
	}
	ours := read("database/creds/billing-ro", "database/creds/billing-ro/x", "", "broker")
	for name, c := range map[string]struct {
		seen []sightings.Sighting
		want string
	}{
		"the broker's, by its lease":                   {[]sightings.Sighting{ours}, ""},
		"the broker's, by its grant":                   {[]sightings.Sighting{read("database/creds/billing-ro", "", "L1", "token-countersign-L1")}, ""},
		"the broker's, not in time":                    {[]sightings.Sighting{read("database/creds/billing-ro", "database/creds/billing-ro/y", "", "broker"), ours}, ""},
		"somebody's":                                   {[]sightings.Sighting{ours, read("database/creds/billing-ro", "database/creds/billing-ro/z", "", "alice")}, "out-of-band-read"},
		"somebody's of another path":                   {[]sightings.Sighting{ours, read("database/creds/reports", "database/creds/reports/z", "", "alice")}, ""},
		"who says that he is a grant":                  {[]sightings.Sighting{ours, read("database/creds/billing-ro", "", "L9", "alice")}, "out-of-band-read"},
		"who has a grant's name on a lease of his own": {[]sightings.Sighting{ours, read("database/creds/billing-ro", "database/creds/billing-ro/z", "L1", "alice")}, "out-of-band-read"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := judge(t, detect.Config{}, []ledger.Entry{issued()}, append(c.seen, login(0, "10.0.0.1"))...); got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
}

// One who reads two paths past the broker is two findings.
func TestEachPathIsACause(t *testing.T) {
	other := issued(func(e *ledger.Entry) {
		e.ID, e.Scope, e.Names = "L2", "other", ledger.Names{VaultPath: "secret/data/other"}
	})
	causes := map[string]bool{}
	var b bytes.Buffer
	for _, e := range []ledger.Entry{issued(), other} {
		if err := json.NewEncoder(&b).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	x := ledger.NewIndex(bytes.NewReader(b.Bytes()))
	if err := x.Load(int64(b.Len())); err != nil {
		t.Fatal(err)
	}
	j := detect.NewJudge(x, detect.Config{})
	j.Learn(issued())
	j.Learn(other)
	for _, path := range []string{"database/creds/billing-ro", "secret/data/other"} {
		if _, err := j.See(sightings.Sighting{Time: noon, Kind: sightings.Read, VaultPath: path, Actor: "alice"}); err != nil {
			t.Fatal(err)
		}
	}
	found, err := j.Reads()
	for _, d := range found {
		causes[d.Cause] = true
	}
	if err != nil || len(causes) != 2 {
		t.Errorf("%v, %v", found, err)
	}
}

func TestSshCertificates(t *testing.T) {
	of := func(id, serial string) ledger.Entry {
		return issued(func(e *ledger.Entry) {
			e.ID, e.Names = id, ledger.Names{SSHKeyID: "vault-token-1f", SSHSerial: serial}
		})
	}
	seen := func(key, serial, from string) sightings.Sighting {
		return login(0, from, func(s *sightings.Sighting) { s.SSH, s.Account, s.SSHKeyID, s.SSHSerial = true, user, key, serial })
	}
	entries := []ledger.Entry{of("L1", "17000000000000001"), of("L2", "17000000000000002")}
	for name, c := range map[string]struct {
		seen sightings.Sighting
		want string
	}{
		"as it should be":               {seen("vault-token-1f", "17000000000000001", "10.0.0.1"), ""},
		"the second of two for one key": {seen("vault-token-1f", "17000000000000002", "10.0.0.9"), "foreign-source L2"},
		"another CA's serial":           {seen("other", "17000000000000001", "10.0.0.9"), "dormant L2"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := judge(t, detect.Config{}, entries, c.seen); got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
}

// TestCatalogue: each detector is documented, and asks for no more than an alert
// unless a completed login shows it.
func TestCatalogue(t *testing.T) {
	for _, e := range detect.Catalogue {
		if e.Sees == "" || e.Fooled == "" || !strings.HasPrefix(e.NHI, "NHI") || detect.Of(e.Name).Name != e.Name {
			t.Errorf("%+v", e)
		}
	}
}

// TestManyReads: of any number of reads by strangers, each is judged.
func TestManyReads(t *testing.T) {
	index := ledger.NewIndex(strings.NewReader(""))
	judge := detect.NewJudge(index, detect.Config{})
	judge.Learn(issued())
	const reads = 1<<16 + 10
	found := 0
	for i := range reads {
		list, err := judge.See(sightings.Sighting{Time: noon, Kind: sightings.Read, Source: "vault", VaultPath: "database/creds/billing-ro", VaultLease: fmt.Sprint("database/creds/billing-ro/", i), Actor: "eve"})
		if err != nil {
			t.Fatal(err)
		}
		found += len(list)
	}
	list, err := judge.Reads()
	if err != nil || found+len(list) != reads {
		t.Errorf("%d of %d reads were judged, %v", found+len(list), reads, err)
	}
}

// The catalogue has each detector that findings and audit records name, once.
func TestTheCatalogueIsWhole(t *testing.T) {
	var names []detector.Name
	for _, e := range detect.Catalogue {
		names = append(names, e.Name)
	}
	if want := detector.All; !slices.Equal(names, want) {
		t.Errorf("the catalogue has %q, want %q", names, want)
	}
}
