package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// late is by how much a line may come later than another of its log.
const late = 30 * time.Second

// arrived puts lines in the order in which a collector got them.
func arrived[T any](w *world, lines []T, at func(T) time.Time) []T {
	type delayed struct {
		line T
		at   time.Time
	}
	all := make([]delayed, len(lines))
	for i, l := range lines {
		all[i] = delayed{l, at(l)}
		if w.chance(30) {
			all[i].at = all[i].at.Add(w.span(0, late))
		}
	}
	slices.SortStableFunc(all, func(a, b delayed) int { return a.at.Compare(b.at) })
	var out []T
	for _, d := range all {
		if t := at(d.line); !t.Before(w.start) && !t.After(w.end) {
			out = append(out, d.line)
		}
	}
	return out
}

// An sshLog is what a log host got of many sshds: times as "Nov 22 04:05:06" or
// with date, fraction and zone.
type sshLog struct {
	file  string
	short bool
	lines []sshLine
}

type sshLine struct {
	at         time.Time
	host, text string
	program    string
	pid        int
}

func (s *sshLog) source() source { return source{"sshd", s.file} }

func (s *sshLog) add(at time.Time, host string, pid int, format string, args ...any) {
	s.lines = append(s.lines, sshLine{at: at, host: host, program: "sshd", pid: pid, text: fmt.Sprintf(format, args...)})
}

func (s *sshLog) render(w *world) []byte {
	slices.SortStableFunc(s.lines, func(a, b sshLine) int { return a.at.Compare(b.at) })
	var out bytes.Buffer
	for _, l := range arrived(w, s.lines, func(l sshLine) time.Time { return l.at }) {
		stamp := l.at.Format("2006-01-02T15:04:05.000000+00:00")
		if s.short {
			stamp = l.at.Format(time.Stamp)
		}
		fmt.Fprintf(&out, "%s %s %s[%d]: %s\n", stamp, l.host, l.program, l.pid, l.text)
	}
	return out.Bytes()
}

// sshLogin is a login by certificate; with an id of "" by a plain key.
func (w *world) sshLogin(s *sshLog, at time.Time, from, user, id, serial string) {
	target, pid, port := "bastion", 1000+w.rng.IntN(4_000_000), 32768+w.rng.IntN(28000)
	key := "ED25519 SHA256:" + w.text(43, alnum)
	if id != "" {
		key = fmt.Sprintf("%s-CERT SHA256:%s ID %s (serial %s) CA %s SHA256:%s", pick(w, "ED25519", "RSA", "ECDSA"), w.text(43, alnum), id, serial, pick(w, "ED25519", "RSA"), w.text(43, alnum))
	}
	s.add(at, target, pid, "Connection from %s port %d on 10.1.0.9 port 22 rdomain \"\"", from, port)
	s.add(at.Add(30*time.Millisecond), target, pid, "Accepted publickey for %s from %s port %d ssh2: %s", user, from, port, key)
	s.add(at.Add(50*time.Millisecond), target, pid, "pam_unix(sshd:session): session opened for user %s(uid=%d) by (uid=0)", user, 1000+w.rng.IntN(200))
	end := at.Add(w.span(time.Second, time.Hour))
	s.add(end, target, pid, "Received disconnect from %s port %d:11: disconnected by user", from, port)
	s.add(end.Add(time.Millisecond), target, pid, "Disconnected from user %s %s port %d", user, from, port)
	s.add(end.Add(2*time.Millisecond), target, pid, "pam_unix(sshd:session): session closed for user %s", user)
}

// An eventLog is a log of JSON lines that a collector wrote.
type eventLog struct {
	at     source
	form   int // of windowsForms
	offset time.Duration
	events []event
}

type event struct {
	at   time.Time
	line []byte
}

func (e *eventLog) source() source { return e.at }

func (e *eventLog) render(w *world) []byte {
	slices.SortStableFunc(e.events, func(a, b event) int { return a.at.Compare(b.at) })
	var out bytes.Buffer
	for _, l := range arrived(w, e.events, func(l event) time.Time { return l.at }) {
		out.Write(l.line)
	}
	return out.Bytes()
}

func (e *eventLog) add(at time.Time, v any) {
	line, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings, numbers and maps
	}
	e.events = append(e.events, event{at, append(line, '\n')})
}

// authentication is OCSF's Authentication, 3002: a logon.
func (w *world) authentication(at time.Time, user, from string, logonType int, ok bool) {
	t := at.Add(w.ocsf.offset)
	status, id := "Success", 1
	if !ok {
		status, id = "Failure", 2
	}
	w.ocsf.add(t, object{"activity_id": 1, "activity_name": "Logon", "category_uid": 3, "class_uid": 3002, "class_name": "Authentication", "type_uid": 300201,
		"severity_id": 1, "status": status, "status_id": id, "time": t.UnixMilli(), "is_remote": true, "logon_type_id": logonType,
		"user": object{"name": user, "type_id": 1}, "src_endpoint": object{"ip": from, "port": 32768 + w.rng.IntN(28000)},
		"dst_endpoint": object{"hostname": "mssql1.example.com", "port": 1433}, "service": object{"name": "MSSQLSERVER"},
		"metadata": object{"version": "1.3.0", "uid": w.uuid(), "product": object{"name": "SQL Server", "vendor_name": "Microsoft"}}})
}

// windowsForms are the JSON of evtx_dump, of Winlogbeat and of NXLog. One
// collector writes one of them.
var windowsForms = []func(w *world, at time.Time, id int, computer string, data object) object{
	func(w *world, at time.Time, id int, computer string, data object) object {
		return object{"Event": object{"#attributes": object{"xmlns": "http://schemas.microsoft.com/win/2004/08/events/event"},
			"System": object{"Provider": object{"#attributes": object{"Name": "Microsoft-Windows-Security-Auditing", "Guid": "54849625-5478-4994-A5BA-3E3B0328C30D"}},
				"EventID": id, "Version": 2, "Level": 0, "Channel": "Security", "Computer": computer, "EventRecordID": len(w.windows.events) + 1000,
				"TimeCreated": object{"#attributes": object{"SystemTime": at.Format("2006-01-02T15:04:05.000000Z")}}},
			"EventData": data}}
	},
	func(w *world, at time.Time, id int, computer string, data object) object {
		return object{"@timestamp": at.Format("2006-01-02T15:04:05.000Z"), "event": object{"code": fmt.Sprint(id), "kind": "event", "provider": "Microsoft-Windows-Security-Auditing"},
			"winlog": object{"channel": "Security", "computer_name": computer, "event_id": fmt.Sprint(id), "provider_name": "Microsoft-Windows-Security-Auditing",
				"record_id": len(w.windows.events) + 1000, "event_data": texts(data)}}
	},
	func(w *world, at time.Time, id int, computer string, data object) object {
		flat := texts(data)
		flat["EventTime"], flat["Hostname"], flat["EventID"] = at.Format("2006-01-02T15:04:05.000000+00:00"), computer, id
		flat["Channel"], flat["SourceName"], flat["RecordNumber"] = "Security", "Microsoft-Windows-Security-Auditing", len(w.windows.events)+1000
		return flat
	},
}

// texts is data with strings for numbers.
func texts(data object) object {
	out := object{}
	for k, v := range data {
		out[k] = fmt.Sprint(v)
	}
	return out
}

// windowsEvent is a security event.
func (w *world) windowsEvent(at time.Time, id int, computer string, data object) {
	t := at.Add(w.windows.offset)
	w.windows.add(t, windowsForms[w.windows.form](w, t, id, computer, data))
}

// windowsLogon is 4624, a logon.
func (w *world) windowsLogon(at time.Time, user, from string, logonType int, computer string) {
	w.windowsEvent(at, 4624, computer, object{"SubjectUserSid": "S-1-5-18", "SubjectUserName": strings.ToUpper(strings.SplitN(computer, ".", 2)[0]) + "$", "SubjectDomainName": "EXAMPLE",
		"TargetUserSid": "S-1-5-21-1-2-3-" + w.text(4, "123456789"), "TargetUserName": user, "TargetDomainName": "EXAMPLE", "TargetLogonId": "0x" + w.hex(4),
		"LogonType": logonType, "LogonProcessName": "NtLmSsp ", "AuthenticationPackageName": "NTLM", "WorkstationName": "-",
		"LogonGuid": "00000000-0000-0000-0000-000000000000", "ProcessId": "0x" + w.hex(2), "ProcessName": "-", "IpAddress": from, "IpPort": "0"})
}
