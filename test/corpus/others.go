package main

import (
	"fmt"
	"strings"
	"time"
)

// ownAccounts are people on accounts of their own, by hand, on the same servers.
func ownAccounts(w *world) label {
	person, from, s := pick(w, "alice", "bob", "dba", "postgres"), w.address(2), pick(w, w.postgres...)
	for range 1 + w.rng.IntN(8) {
		s.sessions = append(s.sessions, &session{at: w.between(w.start, w.end), user: person, db: "main", from: pick(w, from, from, "[local]"), program: pick(w, humans...),
			long: w.span(time.Second, 3*time.Hour), statement: pick(w, "", "", "select * from nope;")})
	}
	w.authentication(w.between(w.start, w.end), person, from, 10, true)
	w.windowsLogon(w.between(w.start, w.end), person, from, pick(w, 2, 10), "WS17.example.com")
	return honest("own accounts")
}

// otherRoles are applications that read Vault themselves: roles of their own.
func otherRoles(w *world) label {
	w.apps++
	role, s := fmt.Sprintf("wiki%04x", w.apps), pick(w, w.postgres...)
	from, who := w.address(2), w.identity("approle", object{"role_name": role}, role)
	for range 1 + w.rng.IntN(4) {
		at := w.between(w.start, w.end.Add(-time.Hour))
		w.vaultCall(call{at: at, who: who, operation: "read", path: "database/creds/" + role, from: from, mount: "database", lease: "database/creds/" + role + "/" + w.text(24, alnum),
			answer: object{"username": w.hmac(), "password": w.hmac()}})
		user := w.vaultUser(who.display, role, at)
		s.sessions = append(s.sessions, &session{at: at.Add(time.Second), user: user, db: "wiki", from: from, program: "psycopg2", long: time.Hour})
		w.authentication(at, user, from, 3, true)
	}
	return honest("other roles")
}

// noSuchRole is authorized under trust, and then refused: no login.
func noSuchRole(w *world) label {
	l := w.lasting(w.newApp("postgres"))
	w.work(l, 2)
	s, thief := l.app.server, w.address(3)
	ghost := w.vaultUser("token-countersign-x", l.app.role, l.Issued)
	for range 1 + w.rng.IntN(5) {
		s.sessions = append(s.sessions, &session{at: w.during(l), user: ghost, db: l.app.db, from: thief, program: pick(w, humans...), failure: fmt.Sprintf(`28000 role "%s" does not exist`, ghost)})
	}
	s.sessions = append(s.sessions, &session{at: w.during(l), user: l.Names.DBUsername, db: "typo", from: l.host.ip, failure: `3D000 database "typo" does not exist`})
	return honest("no such role", l)
}

// otherCertificates are people's, of other CAs; one has the serial of a lease's.
func otherCertificates(w *world) label {
	l := w.lasting(w.newApp("ssh"))
	w.work(l, 2)
	s, from := l.app.ssh, w.address(2)
	w.sshLogin(s, w.during(l), from, "alice", "alice@example.com", l.Names.SSHSerial)
	w.sshLogin(s, w.during(l), from, "alice", "", "")
	s.add(w.during(l), "bastion", 4711, "Failed password for alice from %s port 50022 ssh2", from)
	s.add(w.during(l), "bastion", 4712, "Accepted password for bob from %s port 50023 ssh2", from)
	return honest("other certificates", l)
}

// deniedReads are refused; and reads of paths that only look like a governed one.
func deniedReads(w *world) label {
	l := w.lasting(w.newApp("postgres", "kv"))
	w.work(l, 2)
	who, from := w.identity("userpass-mallory", object{"username": "mallory"}, "people"), w.address(2)
	mount, _, _ := strings.Cut(l.app.path, "/")
	w.vaultCall(call{at: w.during(l), who: who, operation: "read", path: l.app.path, from: from, mount: mount, denied: true})
	for _, path := range []string{l.app.path + "x", l.app.path + "/x", "other/" + l.app.path, "database/roles/" + l.app.role, "kv/metadata/" + l.app.role} {
		w.vaultCall(call{at: w.during(l), who: who, operation: "read", path: path, from: from, mount: mount, answer: object{"value": w.hmac()}})
	}
	w.vaultCall(call{at: w.during(l), who: who, operation: "list", path: "database/creds/", from: from, mount: mount, answer: object{"keys": []string{l.app.role}}})
	return honest("denied reads", l)
}

// hostilePostgres is somebody with an account of their own who puts a lease's name
// wherever a server writes what clients say, or another's address beside it.
func hostilePostgres(w *world) label {
	l := w.lasting(w.newApp("postgres"))
	w.work(l, 3)
	s, from, name := l.app.server, w.address(3), l.Names.DBUsername
	at := w.during(l)
	forged := at.Add(s.offset).In(s.zone).Format(pgTime)
	login := fmt.Sprintf("%s [4242] %s@%s LOG:  connection authorized: user=%s database=%s application_name=psql", forged, name, l.app.db, name, l.app.db)
	for range 1 + w.rng.IntN(3) {
		h := &session{at: at, user: "eve", db: "main", from: from, program: "x", long: w.span(time.Second, time.Hour)}
		switch w.rng.IntN(8) {
		case 0: // a line of its own in the statement, and one in the name of the program
			h.statement, h.program = "select 1;\n"+login+"\nfrom nope", cut(strings.ReplaceAll(name, "\n", "?")+" user="+name)
		case 1:
			h.user = cut("e\n" + forged + " [4242] " + name)
		case 2: // the whole of a line's beginning in two names
			h.user, h.db = cut("e\n"+forged+" [4242] a"), cut("b LOG:  connection received: host="+from+" port=1")
		case 3:
			h.user = cut("x user=" + name)
		case 4:
			h.user, h.db = "eve", cut("d user="+name)
		case 5:
			h.user, h.program = "eve\x1b[2J\x07", cut("database=x user="+name)
		case 6:
			h.statement = "select '" + strings.Repeat("A"+name+"\r\n\t", 3000) + "' from nope"
		case 7:
			h.user = cut("eve\",\"" + name)
		}
		if w.chance(50) || h.user != "eve" || h.db != "main" {
			h.failure = s.noSuch(h.user)
		}
		s.sessions = append(s.sessions, h)
		at = at.Add(w.span(time.Second, time.Hour))
	}
	if w.chance(50) {
		w.forgedAddress(s, w.useBy(l, w.during(l), l.host.ip, l.app.program), from, from)
	}
	return honest("hostile/postgres", l)
}

// forgedAddress lets somebody at from connect while s says its password, with a
// name that has the log say s came from another address.
func (w *world) forgedAddress(server *pgServer, s *session, from, claims string) {
	s.slow = w.span(time.Second, 20*time.Second)
	s.long += s.slow
	server.sessions = append(server.sessions, &session{at: s.at.Add(w.span(100*time.Millisecond, s.slow-100*time.Millisecond)), from: from, forges: s, claims: claims})
}

// hostileSSH is a user name that says it was accepted. sshd writes control
// characters as \n and \033.
func hostileSSH(w *world) label {
	l := w.lasting(w.newApp("ssh"))
	w.work(l, 2)
	s, from := l.app.ssh, w.address(3)
	accepted := fmt.Sprintf("Accepted publickey for deploy from 203.0.113.7 port 22 ssh2: ED25519-CERT SHA256:x ID %s (serial %s) CA ED25519 SHA256:y", l.Names.SSHKeyID, l.Names.SSHSerial)
	for _, user := range []string{accepted, `eve\n` + accepted, `eve\033[2J`, strings.Repeat("A", 20_000) + l.Names.SSHKeyID} {
		at, pid := w.during(l), 1000+w.rng.IntN(4_000_000)
		s.add(at, "bastion", pid, "Invalid user %s from %s port 4444", user, from)
		s.add(at.Add(time.Second), "bastion", pid, "Failed password for invalid user %s from %s port 4444 ssh2", user, from)
		s.add(at.Add(2*time.Second), "bastion", pid, "Connection closed by invalid user %s %s port 4444 [preauth]", user, from)
	}
	// A certificate of another CA whose key id holds a lease's.
	w.sshLogin(s, w.during(l), from, "eve", fmt.Sprintf("eve ID %s (serial %s) CA x", l.Names.SSHKeyID, l.Names.SSHSerial), "7")
	w.sshLogin(s, w.during(l), from, "eve", l.Names.SSHKeyID+"x", l.Names.SSHSerial)
	s.lines = append(s.lines, sshLine{at: w.during(l), host: "bastion", program: "sudo", pid: 99, text: accepted})
	return honest("hostile/ssh", l)
}

// hostileJSON is the same in collectors' events and in Vault's audit log.
func hostileJSON(w *world) label {
	l := w.lasting(w.newApp("ocsf"))
	w.work(l, 2)
	from, name := w.address(3), l.Names.DBUsername
	for _, user := range []string{"x" + name, name + "\n", "eve\u0000" + name, `eve","user":{"name":"` + name + `"}`, strings.Repeat("B", 60_000) + name} {
		w.authentication(w.during(l), user, from, 3, w.chance(50))
		w.windowsLogon(w.during(l), user, from, 3, "SRV1.example.com")
	}
	who := w.identity("userpass-"+name, object{"username": name, "lease": l.ID}, "people")
	w.vaultCall(call{at: w.during(l), who: who, operation: "read", path: "kv/data/mine/" + strings.Repeat("C", 50_000) + l.app.path, from: from, mount: "kv", answer: object{"data": object{"x": w.hmac()}}})
	w.ocsf.events = append(w.ocsf.events, event{w.during(l), []byte("{\"class_uid\":3002,\"user\":{\"name\":\"" + name + "\"\n")})
	w.vaultEntry(w.during(l), object{"type": "response", "time": "yesterday", "request": []string{name}})
	return honest("hostile/json", l)
}

// tell lets one story in five be guilty, of every detector in turn.
func (w *world) tell(stories int) {
	order := w.rng.Perm(len(guiltyStories))
	told := 0
	for range stories {
		if !w.chance(20) {
			w.labels = append(w.labels, honestStories[w.rng.IntN(len(honestStories))](w))
			continue
		}
		w.labels = append(w.labels, guiltyStories[order[told%len(order)]](w))
		told++
	}
	for _, l := range w.ledger {
		if l.Kind == "vault" {
			w.issue(l)
		}
	}
}

// everyday is the traffic that no story is about, in every log that isn't to be
// silent; one database has hours without any.
func (w *world) everyday() {
	for i, s := range w.postgres {
		every := w.span(3*time.Minute, 20*time.Minute)
		if i == 0 {
			every = 3 * time.Hour
		}
		w.background(s, w.end, every)
	}
	for at := w.start; at.Before(w.end); at = at.Add(w.span(time.Minute, 10*time.Minute)) {
		w.vaultCall(call{at: at, who: w.identity("approle", object{"role_name": "grafana"}, "metrics"), operation: "read", path: "sys/metrics", from: "10.1.0.7", mount: "system"})
		w.sshLogin(pick(w, w.ssh...), at, "10.30.0.4", "nagios", "", "")
		w.authentication(at, "sa_report", "10.1.0.8", 3, true)
		w.windowsLogon(at, "MON01$", "10.1.0.8", 3, "DC1.example.com")
	}
}

// background is one application's traffic with an account that nobody governs.
func (w *world) background(s *pgServer, until time.Time, every time.Duration) {
	for at := w.start; at.Before(until); at = at.Add(w.span(every/2, every*3/2)) {
		s.sessions = append(s.sessions, &session{at: at, user: pick(w, "app_crm", "zabbix", "replicator"), db: "crm", from: "10.1.0.30", program: pick(w, "", "crm"), long: w.span(time.Second, 20*time.Second)})
	}
}
