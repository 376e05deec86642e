package main

import (
	"fmt"
	"net/netip"
	"time"
)

// honestStories are what must raise nothing.
var honestStories = []func(*world) label{
	rotatedPool, rotatedPool, reconnects, renewed, lastMinute, firstSecond, rebooted, restarted, stolenName, wrongPassword, pooler, ownAccounts, otherRoles,
	noSuchRole, staticReader, windowsService, otherCertificates, unseenKinds, untouchedCanary, goldenImage, rollout, beforeTheLog, deniedReads, backup, justIssued,
	neighbours, namesake, updatedKernel, hostilePostgres, hostilePostgres, hostileSSH, hostileJSON,
}

// rotatedPool keeps its sessions over rotations: each lease is replaced, lives on
// for its overlap, and its sessions outlast even that.
func rotatedPool(w *world) label {
	a, h := w.newApp(sighted...), w.newHost()
	at, life := w.between(w.start.Add(20*time.Minute), w.end.Add(-24*time.Hour)), w.span(time.Hour, 5*time.Hour)
	var leases []*lease
	for range 2 + w.rng.IntN(3) {
		l := w.grant(a, h, at, 2*life)
		if len(leases) > 0 {
			l.Subject = leases[0].Subject
		}
		l.revoke(at.Add(life + 10*time.Minute))
		if s := w.useBy(l, at.Add(w.span(0, 20*time.Second)), w.home(l), a.program); s != nil {
			s.long = life + w.span(0, 10*time.Hour)
		}
		w.work(l, w.rng.IntN(4))
		w.use(l, l.Revoked.Add(-w.span(time.Second, 10*time.Minute)), w.home(l))
		leases = append(leases, l)
		at = at.Add(life)
	}
	return honest("pool/"+a.kind, leases...)
}

// reconnects are a pool's after its server was away: dozens within seconds, again
// and again.
func reconnects(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	for range 1 + w.rng.IntN(3) {
		at := w.during(l)
		for range 20 + w.rng.IntN(40) {
			if t := at.Add(w.span(0, 3*time.Second)); t.Before(l.until()) {
				w.use(l, t, w.home(l))
			}
		}
	}
	return honest("reconnects", l)
}

// renewed leases live long beyond their first hour.
func renewed(w *world) label {
	l := w.grant(w.newApp(sighted...), w.newHost(), w.between(w.start.Add(20*time.Minute), w.end.Add(-30*time.Hour)), 72*time.Hour)
	w.work(l, 3+w.rng.IntN(9))
	return honest("renewed", l)
}

// lastMinute is a login just before the end; the server's clock may say after.
func lastMinute(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	if w.chance(70) {
		l.revoke(w.between(l.Issued.Add(10*time.Minute), l.Expires))
	}
	w.use(l, l.until().Add(-w.span(10*time.Millisecond, 3*time.Second)), w.home(l))
	w.try(l, w.between(l.until().Add(time.Minute), w.end.Add(-time.Hour)), w.home(l)) // its pool had not heard yet
	return honest("last minute", l)
}

// firstSecond is a login at once; the server's clock may say before.
func firstSecond(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	w.use(l, l.Issued.Add(w.span(0, time.Second)), w.home(l))
	return honest("first second", l)
}

// rebooted hosts come back with another boot, other pids and another address.
func rebooted(w *world) label {
	a := w.newApp("postgres", "ssh", "ocsf", "static")
	l := w.lasting(a)
	l.revoke(w.between(l.Issued.Add(10*time.Minute), l.Expires))
	w.work(l, 2)
	h := *l.host
	h.boot, h.ip = w.uuid(), w.address(0)
	next := w.grant(a, &h, l.Revoked.Add(w.span(30*time.Second, 10*time.Minute)), 6*time.Hour)
	w.work(next, 2)
	if w.chance(30) { // and an address more while it runs
		h.ip = w.address(0)
		next.Sources = append(next.Sources, h.ip)
		w.work(next, 2)
	}
	return honest("rebooted", l, next)
}

// restarted units have another pid and another invocation; old and new overlap.
func restarted(w *world) label {
	a := w.newApp("postgres", "ssh", "ocsf", "static", "windows")
	l := w.lasting(a)
	l.revoke(w.between(l.Issued.Add(30*time.Minute), l.Expires))
	w.work(l, 2)
	next := w.grant(a, l.host, l.Revoked.Add(-w.span(0, 20*time.Second)), 6*time.Hour)
	w.work(next, 1+w.rng.IntN(3))
	return honest("restarted", l, next)
}

// stolenName is somebody who read a user name and has no password for it.
func stolenName(w *world) label {
	l := w.lasting(w.newApp("postgres", "postgres", "ssh", "ocsf", "static", "windows"))
	w.work(l, 2)
	thief := w.address(3)
	for range 1 + w.rng.IntN(30) {
		w.try(l, w.between(l.Issued, w.end.Add(-time.Minute)), thief)
	}
	return honest("stolen name", l)
}

// wrongPassword is a program that has the old one still.
func wrongPassword(w *world) label {
	l := w.lasting(w.newApp("postgres", "static", "ocsf", "windows"))
	for range 3 {
		w.try(l, w.during(l), l.host.ip)
	}
	w.work(l, 3)
	return honest("wrong password", l)
}

// behind is an address of a prefix.
func (w *world) behind(prefix string) string {
	p := netip.MustParsePrefix(prefix)
	addr := p.Addr()
	for range w.rng.IntN(6) {
		addr = addr.Next()
	}
	return addr.String()
}

// pooler is a program that is seen from its pooler's addresses, or its NAT's.
func pooler(w *world) label {
	a := w.newApp(sighted...)
	a.nat = pick(w, w.address(1)+".0/24", "198.51.100.16/29", "2001:db8:ffff::/64")
	var leases []*lease
	for range 1 + w.rng.IntN(3) {
		l := w.lasting(a)
		w.work(l, 2+w.rng.IntN(5))
		leases = append(leases, l)
	}
	return honest("pooler", leases...)
}

// staticReader is the one program that an account is for, over restarts.
func staticReader(w *world) label {
	a := w.newApp("static")
	l := w.lasting(a)
	w.work(l, 3)
	again := w.grant(a, l.host, l.until(), 4*time.Hour)
	w.work(again, 1)
	return honest("static reader", l, again)
}

// namesake is an account of another database that is called like one of KV's.
func namesake(w *world) label {
	a := w.newApp("static")
	a.path = fmt.Sprintf("kv/data/namesake/%d", w.apps)
	l := w.lasting(a)
	w.work(l, 2)
	for range 1 + w.rng.IntN(4) {
		w.useBy(l, w.during(l), w.address(3), "other").db = "elsewhere"
	}
	return honest("namesake", l)
}

// updatedKernel is a host that boots a newer kernel, and one that boots what was
// approved.
func updatedKernel(w *world) label {
	l := w.lasting(w.newApp("postgres", "ssh"))
	l.revoke(w.between(l.Issued.Add(30*time.Minute), l.Expires))
	w.work(l, 2)
	l.Machine = &machine{true, "BOOT_IMAGE=/vmlinuz-6.1.0-13-amd64 root=/dev/vda1 ro quiet", ""}
	l.host.boot = w.uuid()
	next := w.grant(l.app, l.host, l.Revoked.Add(w.span(10*time.Minute, time.Hour)), 6*time.Hour)
	w.work(next, 2)
	next.Machine = &machine{true, "BOOT_IMAGE=/vmlinuz-6.1.0-18-amd64 root=/dev/vda1 ro quiet", ""}
	if w.chance(50) {
		next.Machine = &machine{w.chance(50), "BOOT_IMAGE=/vmlinuz-6.1.0-18-amd64 root=/dev/vda1 ro", "debian12"}
	}
	return honest("kernel", l, next)
}

// windowsService is a service's account: logons of its service, by its own address
// in both forms, and tickets.
func windowsService(w *world) label {
	l := w.lasting(w.newApp("windows"))
	account, computer := l.Names.DBUsername, l.host.name+".example.com"
	w.windowsLogon(w.during(l), account, "-", 5, computer)
	w.work(l, 1)
	mapped := l.host.ip
	if netip.MustParseAddr(mapped).Is4() {
		mapped = "::ffff:" + mapped
	}
	w.windowsEvent(w.during(l), 4769, "DC1.example.com", object{"TargetUserName": account + "@EXAMPLE.COM", "TargetDomainName": "EXAMPLE.COM", "ServiceName": "SQL1$",
		"TicketOptions": "0x40810000", "TicketEncryptionType": "0x12", "IpAddress": mapped, "IpPort": "50111", "Status": "0x0"})
	w.windowsEvent(w.during(l), 4648, computer, object{"SubjectUserSid": "S-1-5-18", "SubjectUserName": "SRV$", "SubjectDomainName": "EXAMPLE", "TargetUserName": account,
		"TargetDomainName": "EXAMPLE", "TargetServerName": "localhost", "ProcessName": `C:\Windows\System32\services.exe`, "IpAddress": "-", "IpPort": "-"})
	w.windowsEvent(w.during(l), 4776, "DC1.example.com", object{"PackageName": "MICROSOFT_AUTHENTICATION_PACKAGE_V1_0", "TargetUserName": account, "Workstation": l.host.name, "Status": "0x0"})
	return honest("windows service", l)
}

// unseenKinds are credentials that none of these logs can show.
func unseenKinds(w *world) label {
	return honest("no sensor", w.lasting(w.newApp("kv")), w.lasting(w.newApp("tls")))
}

func untouchedCanary(w *world) label {
	l := w.canary(w.newApp("postgres", "ssh", "kv"))
	if l.app.kind != "kv" && w.chance(50) { // and its neighbour at work beside it
		l2 := w.grant(w.newApp(l.app.kind), l.host, l.Issued, 12*time.Hour)
		w.work(l2, 2)
		return honest("untouched canary", l, l2)
	}
	return honest("untouched canary", l)
}

// goldenImage is two machines of one image: the same pid, start and unit, but each
// its own boot.
func goldenImage(w *world) label {
	a := w.newApp("postgres", "ssh")
	l, other := w.lasting(a), w.lasting(a)
	s := *l.Subject
	s.Boot, s.Invocation = other.host.boot, w.hex(16)
	other.Subject = &s
	w.work(l, 2)
	w.work(other, 2)
	return honest("golden image", l, other)
}

// rollout is a release: every host of the scope gets the new digest. Logs can't
// say whether it was announced, so that an alarm is right too.
func rollout(w *world) label {
	a := w.newApp("postgres")
	next := *a
	next.sha = w.hex(32)
	at := w.between(w.start.Add(6*time.Hour), w.end.Add(-18*time.Hour))
	var leases []*lease
	for range 3 + w.rng.IntN(5) {
		h := w.newHost()
		change := at.Add(w.span(0, 30*time.Minute))
		old := w.grant(a, h, at.Add(-5*time.Hour), 10*time.Hour)
		old.revoke(change)
		l := w.grant(&next, h, change, 10*time.Hour)
		w.work(old, 2)
		w.work(l, 2)
		leases = append(leases, old, l)
	}
	out := honest("release", leases...)
	out.Also = []string{"subject-drift"}
	return out
}

// beforeTheLog is a lease whose sessions began before the log did.
func beforeTheLog(w *world) label {
	l := w.grant(w.newApp("postgres"), w.newHost(), w.start.Add(-w.span(time.Hour, 20*time.Hour)), 30*time.Hour)
	at := w.between(l.Issued, w.start.Add(-time.Minute))
	s := w.useBy(l, at, l.host.ip, l.app.program)
	s.before, s.open, s.long = true, w.chance(50), w.start.Sub(at)+w.span(time.Minute, 20*time.Hour)
	return honest("before the log", l)
}

// backup is a machine's own use of one of PostgreSQL's programs.
func backup(w *world) label {
	a := w.newApp("postgres")
	a.exe, a.unit, a.user, a.program = "/usr/lib/postgresql/15/bin/pg_dump", "backup.service", "backup", "pg_dump"
	l := w.lasting(a)
	w.work(l, 2)
	return honest("backup", l)
}

// justIssued is too young to be called unused.
func justIssued(w *world) label {
	return honest("just issued", w.grant(w.newApp(sighted...), w.newHost(), w.end.Add(-w.span(time.Minute, 20*time.Minute)), 8*time.Hour))
}

// neighbours are two programs of one host, each with its own credential.
func neighbours(w *world) label {
	l := w.lasting(w.newApp(sighted...))
	b := w.newApp(sighted...)
	b.unit, b.user, b.exe = fmt.Sprintf("side%d.service", w.apps), "side", "/opt/side/bin/side"
	other := w.grant(b, l.host, l.Issued.Add(time.Minute), 5*time.Hour)
	w.work(l, 2)
	w.work(other, 2)
	return honest("neighbours", l, other)
}
