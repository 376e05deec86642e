package main

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const brokerAddress = "10.1.0.2"

// An app is a program with a scope, and how it logs in.
type app struct {
	kind       string // postgres, static (an account of PostgreSQL's), ocsf, windows, ssh, tls, kv
	scope      string
	role, path string
	user, unit string
	exe, sha   string
	program    string // application_name
	db         string
	server     *pgServer
	ssh        *sshLog
	account    string // of a static one
	secret     string // its hmac
	nat        string // addresses that stand for its hosts', a prefix
}

// newApp makes an app of one of the kinds. The first eight letters of its role,
// which are all that Vault puts into a user name, are no other's.
func (w *world) newApp(kinds ...string) *app {
	w.apps++
	word := pick(w, "bill", "ship", "cart", "crm", "risk", "tax", "mail", "stok", "hr", "pay")
	a := &app{kind: pick(w, kinds...), role: fmt.Sprintf("%s%04x-%s", word, w.apps, pick(w, "ro", "rw", "app")), sha: w.hex(32)}
	a.scope, a.user, a.unit = a.role, word, word+".service"
	a.exe, a.db = "/opt/"+word+"/bin/"+word+"d", pick(w, word, word, word, word, "main", "main", "main", "Prod Data")
	a.program = pick(w, "", word+"d", "PostgreSQL JDBC Driver", "Npgsql", "my app [v2]: host=10.0.0.1 user=x")
	a.server, a.ssh = pick(w, w.postgres...), pick(w, w.ssh...)
	switch a.kind {
	case "postgres", "ocsf":
		a.path = "database/creds/" + a.role
	case "static", "windows":
		a.path, a.account, a.secret = "database/static-creds/"+a.role, fmt.Sprintf("svc_%s%d", word, w.apps), w.hex(32)
		if w.chance(40) { // one that somebody wrote down
			a.path = fmt.Sprintf("kv/data/%s/%d", word, w.apps)
		}
	case "kv":
		a.path, a.secret = fmt.Sprintf("kv/data/%s/%d", word, w.apps), w.hex(32)
		if w.chance(50) { // of what none of these logs tells
			a.account = fmt.Sprintf("api_%s%d", word, w.apps)
		}
	case "ssh":
		a.path = "ssh/sign/" + a.role
	case "tls":
		a.path = "pki/issue/" + a.role
	}
	return a
}

// vaultUser is a user of Vault's database engine: v-DISPLAY-ROLE-RANDOM-SECONDS.
func (w *world) vaultUser(display, role string, at time.Time) string {
	return fmt.Sprintf("v-%.8s-%.8s-%s-%d", display, role, w.text(20, alnum), at.Unix())
}

// subject is a process of a on h, as its agent attested it.
func (w *world) subject(a *app, h *host) *subject {
	return &subject{Boot: h.boot, PID: 300 + w.rng.IntN(30000), Start: uint64(1000 + w.rng.IntN(9_000_000)), Unit: a.unit, Invocation: w.hex(16), User: a.user,
		Parent: &parent{PID: 1, Start: 1, Exe: "/usr/lib/systemd/systemd"}, Exe: a.exe, SHA256: a.sha}
}

// grant puts a lease into the ledger.
func (w *world) grant(a *app, h *host, issued time.Time, ttl time.Duration) *lease {
	issued = issued.Truncate(time.Microsecond)
	l := &lease{ID: w.id(), Scope: a.scope, Host: h.id, Kind: "vault", Subject: w.subject(a, h), Sources: []string{h.ip}, Issued: issued, Expires: issued.Add(ttl), app: a, host: h}
	l.Names.VaultAccessor = w.text(24, alnum)
	if a.nat != "" {
		l.Sources = append(l.Sources, a.nat)
	}
	l.Audience = []string{fmt.Sprintf("postgres://%s.example.com:5432/app", a.server.file[:3])}
	switch a.kind {
	case "postgres", "ocsf":
		l.Names.DBUsername = w.vaultUser("token-countersign-"+l.ID, a.role, issued)
		l.Names.VaultLease = a.path + "/" + w.text(24, alnum)
		if a.kind == "ocsf" {
			l.Audience = []string{"sqlserver://mssql1.example.com:1433"}
		}
	case "static", "windows":
		l.Names.DBUsername, l.Names.VaultPath, l.Names.SecretHMAC = a.account, a.path, a.secret
		if a.kind == "windows" {
			l.Audience = []string{"sqlserver://mssql1.example.com:1433"}
		} else if strings.HasPrefix(a.path, "kv/") {
			l.Audience = []string{fmt.Sprintf("postgres://%s.example.com:5432/%s", a.server.file[:3], url.PathEscape(a.db))}
		}
	case "kv":
		l.Names.VaultPath, l.Names.SecretHMAC, l.Audience = a.path, a.secret, nil
		if l.Names.DBUsername = a.account; a.account != "" && w.chance(50) {
			l.Audience = []string{"https://api.example.com"}
		}
	case "ssh":
		l.Names.SSHKeyID = "vault-token-countersign-" + l.ID + "-" + w.hex(32)
		l.Names.SSHSerial = strconv.FormatUint(w.rng.Uint64(), 10)
		l.Audience = []string{"ssh://bastion.example.com"}
	case "tls":
		l.Kind, l.Names.VaultAccessor = "certificate", ""
		l.Names.CertificateSerial, l.Audience = w.hex(16), nil
	}
	w.ledger = append(w.ledger, l)
	return l
}

// lasting is a lease of a fresh host that is issued within the log, with room
// before and after.
func (w *world) lasting(a *app) *lease {
	ttl := w.span(time.Hour, 12*time.Hour)
	return w.grant(a, w.newHost(), w.between(w.start.Add(20*time.Minute), w.end.Add(-16*time.Hour)), ttl)
}

func (l *lease) revoke(at time.Time) { l.Revoked = at.Truncate(time.Millisecond) }

// during is a time at which l was good and the log ran.
func (w *world) during(l *lease) time.Time {
	end := l.until()
	if last := w.end.Add(-time.Minute); end.After(last) {
		end = last
	}
	return w.between(l.Issued.Add(time.Second), end.Add(-time.Second))
}

// use is a completed login with l.
func (w *world) use(l *lease, at time.Time, from string) { w.useBy(l, at, from, l.app.program) }

func (w *world) useBy(l *lease, at time.Time, from, program string) *session {
	a := l.app
	switch a.kind {
	case "postgres", "static":
		s := &session{at: at, user: l.Names.DBUsername, db: a.db, from: from, program: program, long: w.span(time.Second, 2*time.Hour), open: w.chance(10)}
		a.server.sessions = append(a.server.sessions, s)
		return s
	case "ssh":
		w.sshLogin(a.ssh, at, from, "deploy", l.Names.SSHKeyID, l.Names.SSHSerial)
	case "ocsf":
		w.authentication(at, l.Names.DBUsername, from, 3, true)
	case "windows":
		w.windowsLogon(at, pick(w, l.Names.DBUsername, strings.ToUpper(l.Names.DBUsername)), from, 3, "SRV1.example.com")
	}
	return nil
}

// home is an address from which l's host is seen.
func (w *world) home(l *lease) string {
	if l.app.nat != "" && w.chance(70) {
		return w.behind(l.app.nat)
	}
	return l.host.ip
}

// work is n honest logins with l.
func (w *world) work(l *lease, n int) {
	for range n {
		w.use(l, w.during(l), w.home(l))
	}
}

// try is a login with l's name that the server refuses.
func (w *world) try(l *lease, at time.Time, from string) {
	a, name := l.app, l.Names.DBUsername
	switch a.kind {
	case "postgres", "static":
		a.server.sessions = append(a.server.sessions, &session{at: at, user: name, db: a.db, from: from,
			failure: fmt.Sprintf(`auth 28P01 password authentication failed for user "%s"`, name)})
	case "ssh":
		port := 32768 + w.rng.IntN(28000)
		a.ssh.add(at, "bastion", 1000+w.rng.IntN(4_000_000), "Failed publickey for deploy from %s port %d ssh2: ED25519-CERT SHA256:%s ID %s (serial %s) CA ED25519 SHA256:%s",
			from, port, w.text(43, alnum), l.Names.SSHKeyID, l.Names.SSHSerial, w.text(43, alnum))
	case "ocsf":
		w.authentication(at, name, from, 3, false)
	case "windows":
		w.windowsEvent(at, 4776, "DC1.example.com", object{"PackageName": "MICROSOFT_AUTHENTICATION_PACKAGE_V1_0", "TargetUserName": name, "Workstation": "WS77", "Status": "0xc000006a"})
	}
}

// owned are all names by which a finding may mean these leases.
func owned(leases ...*lease) []string {
	var out []string
	for _, l := range leases {
		for _, n := range []string{l.ID, l.Host, l.Names.DBUsername, l.Names.VaultPath} {
			if n != "" && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out
}

func honest(story string, leases ...*lease) label {
	return label{Story: "honest/" + story, Owns: owned(leases...)}
}

// guilty is a story whose finding names the lease.
func guilty(story string, l *lease, wants ...string) label {
	return label{Story: story, Wants: wants, Targets: []string{l.ID}, Owns: owned(l)}
}
