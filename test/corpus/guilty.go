package main

import (
	"fmt"
	"time"
)

// sighted are the kinds of apps whose dynamic credentials some log shows.
var sighted = []string{"postgres", "postgres", "postgres", "ssh", "ocsf"}

var humans = []string{"psql", "pgAdmin 4 - DB:main", "DBeaver 24.1.0 - Main <main>", "DataGrip 2024.1"}

// guiltyStories are, for each detector, what it is there for.
var guiltyStories = []func(*world) label{
	foreignSource, useAfterRevoke, unmatchedLogin, sharedStatic, outOfBandRead, duplicateInstance, subjectDrift, sameSecret, humanUse, dormant, silentSensor, canary,
}

// foreignSource is a stolen credential: used once or often, from one address.
func foreignSource(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	w.work(l, 1+w.rng.IntN(6))
	thief := w.address(3)
	if l.app.kind == "postgres" && w.chance(25) {
		w.useBy(l, w.during(l), thief, pick(w, humans...))
		return guilty("theft/by hand", l, "foreign-source", "human-use")
	}
	if w.chance(30) {
		for range 5 + w.rng.IntN(60) {
			w.use(l, w.during(l), thief)
		}
		return guilty("theft/many logins", l, "foreign-source")
	}
	if w.chance(20) {
		// A neighbour behind the same switch, not behind the declared NAT.
		l.Sources = append(l.Sources, "10.209.7.0/24")
		thief = fmt.Sprintf("10.209.%d.9", 8+w.rng.IntN(200))
	}
	if l.app.kind == "postgres" && w.chance(40) { // and a second connection of the thief's says that it was the host
		w.forgedAddress(l.app.server, w.useBy(l, w.during(l), thief, l.app.program), thief, l.host.ip)
		return guilty("theft/forged address", l, "foreign-source")
	}
	w.use(l, w.during(l), thief)
	return guilty("theft/one login", l, "foreign-source")
}

// useAfterRevoke is a login minutes or hours after the credential's end.
func useAfterRevoke(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	story := "after/expiry"
	if w.chance(70) {
		story = "after/revocation"
		l.revoke(w.between(l.Issued.Add(10*time.Minute), l.Expires))
	}
	w.work(l, 1+w.rng.IntN(4))
	after := func() time.Time { return w.between(l.until().Add(3*time.Minute), w.end.Add(-5*time.Minute)) }
	if w.chance(20) {
		w.use(l, after(), w.address(3))
		return guilty(story+", stolen", l, "use-after-revoke", "foreign-source")
	}
	for range 1 + w.rng.IntN(5) {
		w.use(l, after(), w.home(l))
	}
	return guilty(story, l, "use-after-revoke")
}

// unmatchedLogin is a user that Vault made for a governed role, and not for the broker.
func unmatchedLogin(w *world) label {
	l := w.lasting(w.newApp("postgres", "postgres", "ocsf"))
	w.work(l, 2)
	ghost := *l
	at := w.during(l)
	ghost.Names.DBUsername = w.vaultUser(pick(w, "token-countersign-"+w.id(), "userpass-alice", "approle", "root"), l.app.role, at.Add(-time.Hour))
	from := pick(w, l.host.ip, w.address(3))
	for range 1 + w.rng.IntN(4) {
		w.use(&ghost, w.between(at, w.end.Add(-time.Hour)), from)
	}
	return label{Story: "unmatched", Wants: []string{"unmatched-login"}, Targets: []string{ghost.Names.DBUsername},
		Owns: append(owned(l), ghost.Names.DBUsername)}
}

// sharedStatic is one account for two programs, or for one that nobody attested.
func sharedStatic(w *world) label {
	a := w.newApp("static", "windows")
	l := w.lasting(a)
	w.work(l, 2)
	label := label{Story: "shared/unattested", Wants: []string{"shared-static-account"}, Targets: []string{l.ID, a.account}, Owns: owned(l)}
	switch w.rng.IntN(3) {
	case 0:
		w.use(l, w.during(l), w.address(3))
		label.Also = []string{"foreign-source"}
	case 1:
		other := w.grant(a, w.newHost(), l.Issued.Add(w.span(0, 30*time.Minute)), 8*time.Hour)
		w.work(other, 2)
		label.Story, label.Targets, label.Owns = "shared/two hosts", append(label.Targets, other.ID), owned(l, other)
	case 2:
		b := *a
		b.scope, b.unit, b.user, b.exe, b.sha = a.scope+"-2", "report.service", "report", "/opt/report/bin/report", w.hex(32)
		other := w.grant(&b, l.host, l.Issued.Add(w.span(0, 30*time.Minute)), 8*time.Hour)
		w.work(other, 2)
		label.Story, label.Targets, label.Owns = "shared/two units", append(label.Targets, other.ID), owned(l, other)
	}
	return label
}

// outOfBandRead is somebody else who reads what only the broker is to.
func outOfBandRead(w *world) label {
	l := w.lasting(w.newApp("postgres", "kv", "static"))
	w.work(l, 2)
	person := w.text(6, "abcdefghijklmnop")
	var who *identity
	switch w.rng.IntN(4) {
	case 0:
		who = w.identity("userpass-"+person, object{"username": person}, "dba")
	case 1:
		who = w.identity("approle", object{"role_name": "ci-" + person}, "ci")
	case 2:
		who = w.identity("token-"+person, nil, "admin")
	case 3: // dressed up as one of the broker's
		grant := w.id()
		who = w.identity("token-countersign-"+grant, object{"grant": grant, "host": l.Host, "scope": l.Scope}, "dba")
	}
	c := call{at: w.during(l), who: who, operation: "read", path: l.app.path, from: w.address(2), mount: "database", answer: object{"username": w.hmac(), "password": w.hmac()}}
	switch l.app.kind {
	case "postgres":
		c.lease = l.app.path + "/" + w.text(24, alnum)
	case "kv":
		c.mount, c.answer = "kv", object{"data": object{"password": w.hmac()}, "metadata": object{"version": 3, "destroyed": false}}
	}
	for range 1 + w.rng.IntN(3) {
		w.vaultCall(c)
		c.at = c.at.Add(w.span(time.Second, 20*time.Minute))
	}
	mine := []string{who.display, l.app.path}
	for _, n := range []string{who.entity, person, "ci-" + person} {
		if n != "" {
			mine = append(mine, n)
		}
	}
	if who.display == "approle" {
		mine = mine[1:] // the broker's too
	}
	return label{Story: "read/" + l.app.kind, Wants: []string{"out-of-band-read"}, Targets: append(mine, l.ID), Owns: append(owned(l), mine...)}
}

// duplicateInstance is a machine copied while it ran: one instance on two hosts.
func duplicateInstance(w *world) label {
	a := w.newApp("postgres", "ssh")
	l := w.lasting(a)
	w.work(l, 2)
	twin := w.newHost()
	twin.boot = l.host.boot
	other := w.grant(a, twin, l.Issued.Add(w.span(time.Minute, 40*time.Minute)), 6*time.Hour)
	other.Subject = l.Subject
	w.work(other, 2)
	return label{Story: "clone", Wants: []string{"duplicate-instance"}, Targets: []string{l.ID, other.ID, l.Host, other.Host}, Owns: owned(l, other)}
}

// subjectDrift is a scope's credential that another program than ever before gets.
func subjectDrift(w *world) label {
	a := w.newApp("postgres", "ssh")
	l := w.lasting(a)
	l.revoke(w.between(l.Issued.Add(30*time.Minute), l.Expires))
	w.work(l, 2)
	next := w.grant(a, l.host, l.Revoked.Add(w.span(time.Second, time.Hour)), 6*time.Hour)
	w.work(next, 2)
	story := "exe"
	switch s := next.Subject; w.rng.IntN(6) {
	case 0:
		s.Exe, s.SHA256 = pick(w, "/tmp/.x/worker", "/usr/bin/python3.11", "/home/eve/"+a.user+"d"), w.hex(32)
	case 1:
		story, s.User = "user", pick(w, "root", "eve", "www-data")
	case 2:
		story, s.Unit = "unit", pick(w, "run-r4f2.service", "helper.service")
	case 3:
		story, s.Parent = "parent", &parent{PID: 4000 + w.rng.IntN(9000), Start: 77000, Exe: pick(w, "/usr/bin/bash", "/usr/sbin/sshd", "/usr/bin/gdb")}
	case 4:
		story, l.Machine, next.Machine = "secure boot", &machine{SecureBoot: true, Reference: pick(w, "", "debian12")}, &machine{}
	case 5:
		story, l.Machine = "command line", &machine{true, "BOOT_IMAGE=/vmlinuz-6.1.0-13-amd64 root=/dev/vda1 ro quiet", ""}
		next.Machine = &machine{true, "BOOT_IMAGE=/vmlinuz-6.1.0-13-amd64 root=/dev/vda1 ro quiet " + pick(w, "init=/bin/sh", "lockdown=none", "ima_appraise=off"), ""}
	}
	return label{Story: "drift/" + story, Wants: []string{"subject-drift"}, Targets: []string{next.ID}, Owns: owned(l, next)}
}

// sameSecret is one password for two accounts.
func sameSecret(w *world) label {
	a, b := w.newApp("static", "windows", "kv"), w.newApp("static", "windows", "kv")
	b.secret = a.secret
	l, other := w.lasting(a), w.lasting(b)
	w.work(l, 2)
	w.work(other, 2)
	return label{Story: "same secret", Wants: []string{"same-secret"}, Targets: owned(l, other), Owns: owned(l, other)}
}

// humanUse is a person at a machine's account, on the machine itself.
func humanUse(w *world) label {
	l := w.lasting(w.newApp("postgres", "postgres", "static", "windows", "ocsf"))
	w.work(l, 2)
	for range 1 + w.rng.IntN(3) {
		switch at := w.during(l); l.app.kind {
		case "windows":
			w.windowsLogon(at, l.Names.DBUsername, l.host.ip, pick(w, 2, 10), l.host.name+".example.com")
		case "ocsf":
			w.authentication(at, l.Names.DBUsername, l.host.ip, pick(w, 2, 10), true)
		default:
			w.useBy(l, at, l.host.ip, pick(w, humans...))
		}
	}
	return guilty("human/"+l.app.kind, l, "human-use").or(l.app.account)
}

// dormant is a credential that nobody ever used, though strangers may have tried.
func dormant(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	if w.chance(50) {
		l.revoke(l.Expires)
	}
	if w.chance(30) {
		w.try(l, w.during(l), w.address(3))
	}
	return guilty("dormant/"+l.app.kind, l, "dormant")
}

// silentSensor is a log with nothing in it, nothing readable, or nothing for hours
// where there was something every minute.
func silentSensor(w *world) label {
	s := w.newPostgres(pick(w, "postgres-stderr", "postgres-csv", "postgres-json"))
	story := "silent/empty"
	switch w.rng.IntN(3) {
	case 0:
		s.junk = []byte{}
	case 1:
		story = "silent/unreadable"
		for range 200 {
			s.junk = fmt.Appendf(s.junk, "10.1.2.3 - - [%s] \"GET / HTTP/1.1\" 200 612\n", w.between(w.start, w.end).Format("02/Jan/2006:15:04:05 -0700"))
		}
	case 2:
		story = "silent/stopped"
		w.background(s, w.end.Add(-w.span(12*time.Hour, 20*time.Hour)), time.Minute)
	}
	return label{Story: story, Wants: []string{"silent-sensor"}, Targets: []string{s.file}, Owns: []string{s.file}}
}

// canary is the story of one that somebody touched.
func canary(w *world) label {
	l := w.canary(w.newApp("postgres", "ssh", "ocsf", "windows", "kv"))
	thief := pick(w, w.address(3), l.host.ip)
	for range 1 + w.rng.IntN(3) {
		at := w.during(l)
		if l.app.kind == "kv" {
			w.vaultCall(call{at: at, who: w.identity("userpass-eve", object{"username": "eve"}, "dba"), operation: "read", path: l.app.path, from: thief, mount: "kv",
				answer: object{"data": object{"password": w.hmac()}, "metadata": object{"version": 1}}})
			continue
		}
		w.useBy(l, at, thief, pick(w, append(humans, "")...))
	}
	out := guilty("canary/"+l.app.kind, l, "canary").or(l.Names.DBUsername).or(l.Names.VaultPath)
	out.Also = []string{"foreign-source", "human-use", "out-of-band-read", "shared-static-account"}
	return out
}

// canary is a canary's lease.
func (w *world) canary(a *app) *lease {
	l := w.grant(a, w.newHost(), w.between(w.start.Add(time.Hour), w.end.Add(-20*time.Hour)), 30*24*time.Hour)
	l.Kind = "canary"
	return l
}

// or adds a name that the finding may have instead.
func (l label) or(name string) label {
	if name != "" {
		l.Targets = append(l.Targets, name)
	}
	return l
}
