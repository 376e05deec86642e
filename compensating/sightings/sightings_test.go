package sightings_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/sightings"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// read reads a log to its end.
func read(t testing.TB, kind string, o sightings.Options, lines ...string) ([]sightings.Sighting, sightings.Health) {
	t.Helper()
	if o.Now == nil {
		o.Now = func() time.Time { return noon }
	}
	r, err := sightings.New(kind, "log", o)
	if err != nil {
		t.Fatal(err)
	}
	var out []sightings.Sighting
	emit := func(s sightings.Sighting) { out = append(out, s) }
	for i, line := range lines {
		r.Line(int64(i+1), []byte(line), emit)
	}
	r.Flush(emit)
	return out, r.Health()
}

func words(list []sightings.Sighting) string {
	var out []string
	for _, s := range list {
		from := ""
		if s.From.IsValid() {
			from = "@" + s.From.String()
		}
		out = append(out, fmt.Sprintf("%s %s%s", s.Kind, s.Account, from))
	}
	return strings.Join(out, ", ")
}

func TestPostgresStderr(t *testing.T) {
	const received = "2026-03-01 12:00:00.000 UTC [7] [unknown]@[unknown] LOG:  connection received: host=10.0.0.1 port=4000"
	const auth = "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db"
	for name, c := range map[string]struct {
		prefix string
		lines  []string
		want   string
		bad    int64
	}{
		"a login": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db application_name=x SSL enabled (protocol=TLSv1.3, cipher=TLS_AES_256_GCM_SHA384, bits=256)"}, "login app@10.0.0.1", 0},
		"PostgreSQL's own prefix": {"", []string{"2026-03-01 12:00:00.000 UTC [7] LOG:  connection received: host=10.0.0.1 port=4000",
			"2026-03-01 12:00:00.010 UTC [7] LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 0},
		"a stated prefix": {"%m %c %h <%u|%d|%a> ", []string{"2026-03-01 12:00:00.010 UTC 65f0.7 10.0.0.1 <app|db|> LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 0},
		"an offset for a zone": {"", []string{"2026-03-01 14:00:00.000 +02 [7] LOG:  connection received: host=10.0.0.1 port=4000",
			"2026-03-01 14:00:00.010 +02 [7] LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 0},
		"IPv6, mapped": {"", []string{"2026-03-01 12:00:00.000 UTC [7] LOG:  connection received: host=::ffff:10.0.0.1 port=4000",
			"2026-03-01 12:00:00.010 UTC [7] LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 0},
		"a clock that is set back":                 {"", []string{received, auth, `2026-03-01 11:00:00.000 UTC [8] e@f LOG:  x`}, "login app@10.0.0.1, session e", 0},
		"a process id that comes again":            {"", []string{received, auth, `2026-03-01 12:00:00.020 UTC [7] other@db LOG:  connection authorized: user=other database=db`}, "login app@10.0.0.1, login other@10.0.0.1", 0},
		"and whose next session is another host's": {"", []string{received, auth, `2026-03-01 12:00:00.020 UTC [7] [unknown]@[unknown] LOG:  connection received: host=10.0.0.9 port=1`}, "login app@10.0.0.1", 0},
		"a wrong password": {"", []string{received, `2026-03-01 12:00:00.010 UTC [7] app@db FATAL:  password authentication failed for user "app"`,
			`2026-03-01 12:00:00.010 UTC [7] app@db DETAIL:  Connection matched pg_hba.conf line 97: "host all all all scram-sha-256"`}, "attempt app@10.0.0.1", 0},
		"authorized by trust, and there is no such role": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db",
			`2026-03-01 12:00:00.012 UTC [7] app@db FATAL:  role "app" does not exist`}, "attempt app@10.0.0.1", 0},
		"a session that is ended later logged in": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db",
			"2026-03-01 12:00:00.500 UTC [7] app@db FATAL:  terminating connection due to administrator command"}, "login app@10.0.0.1", 0},
		"a session from before": {"", []string{"2026-03-01 12:00:00.010 UTC [7] app@db ERROR:  relation \"x\" does not exist", "2026-03-01 12:00:01.010 UTC [7] app@db ERROR:  again"}, "session app", 0},
		"a name that holds a login": {"", []string{received,
			"2026-03-01 12:00:00.010 UTC [7] x LOG:  connection authorized: user=app database=b@db FATAL:  password authentication failed for user \"x LOG:  connection authorized: user=app database=b\""},
			"attempt x LOG:  connection authorized: user=app database=b@10.0.0.1", 0},
		"a program that holds a login": {"%m [%p] user=%u db=%d app=%a client=%h ", []string{"2026-03-01 12:00:00.000 UTC [7] user=[unknown] db=[unknown] app=[unknown] client=10.0.0.1 LOG:  connection received: host=10.0.0.1 port=4000",
			"2026-03-01 12:00:00.010 UTC [7] user=bob db=db app=q client=10.0.0.9 LOG:  connection authorized: user=app database=db client=10.0.0.1 LOG:  connection authorized: user=bob database=db application_name=q client=10.0.0.9 LOG:  connection authorized: user=app database=db"},
			"login bob@10.0.0.1", 0},
		"a program cannot hide its login": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] bob@db LOG:  connection authorized: user=bob database=db application_name=LOG:  connection received: host=9.9.9.9"}, "login bob@10.0.0.1", 0},
		"a statement that looks like a login": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] bob@db LOG:  connection authorized: user=bob database=db",
			"2026-03-01 12:00:00.020 UTC [7] bob@db LOG:  statement: select 'a", "\t2026-03-01 12:00:00.020 UTC [7] app@db LOG:  connection authorized: user=app database=db'",
			"2026-03-01 12:00:00.030 UTC [7] bob@db LOG:  statement: select 'LOG:  connection authorized: user=app database=db'"}, "login bob@10.0.0.1", 0},
		"a database with a space":                              {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@Prod Data LOG:  connection authorized: user=app database=Prod Data application_name=x"}, "login app@10.0.0.1", 0},
		"a database with a space, without names in the prefix": {"", []string{"2026-03-01 12:00:00.010 UTC [7] LOG:  connection authorized: user=app database=Prod Data application_name=x"}, "login app", 0},
		"a forged address, with the true line's rest behind it": {"", []string{received, "2026-03-01 12:00:00.005 UTC [8] e",
			"2026-03-01 12:00:00.005 UTC [7] [unknown]@[unknown] LOG:  connection received: host=10.0.0.9 port=1 FATAL:  password authentication failed for user \"e\"",
			"2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 2},
		"a forged address, with the true line's rest below it": {"", []string{received, "2026-03-01 12:00:00.005 UTC [8] e@f LOG:  x",
			"2026-03-01 12:00:00.005 UTC [7] [unknown]@[unknown] LOG:  connection received: host=10.0.0.9 port=1", " FATAL:  password authentication failed for user \"e\"",
			"2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db"}, "session e, login app@10.0.0.1", 2},
		"a forged address behind a name that looks whole": {"", []string{received, "2026-03-01 12:00:00.005 UTC [8] e@f LOG:  x",
			"2026-03-01 12:00:00.005 UTC [7] [unknown]@[unknown] LOG:  connection received: host=10.0.0.9 port=1 FATAL:  password authentication failed for user \"e\"",
			"2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db"}, "session e, login app@10.0.0.1", 1},
		"a forged end of a session that was let in": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db",
			"2026-03-01 12:00:00.020 UTC [8] e@f LOG:  x", "2026-03-01 12:00:00.020 UTC [7] app@db FATAL:  password authentication failed for user \"e\""}, "session e, login app@10.0.0.1", 0},
		"what a child of PostgreSQL's writes right behind a login": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db", "cp: cannot stat 'x'",
			`2026-03-01 12:00:00.012 UTC [7] app@db FATAL:  role "app" does not exist`}, "attempt app@10.0.0.1", 1},
		"a line break right behind a login doesn't hide it": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db",
			"2026-03-01 12:00:00.011 UTC [8] e", "x@db FATAL:  password authentication failed for user \"e\""}, "login app@10.0.0.1", 2},
		"turned away after it was let in, by itself": {"", []string{received, "2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db",
			"2026-03-01 12:00:00.300 UTC [7] app@db FATAL:  invalid frontend message type 1"}, "login app@10.0.0.1", 0},
		"many severities in a name don't hide the next line": {"", []string{received, "2026-03-01 12:00:00.005 UTC [8] ", strings.Repeat(":  ", 8) + "x@db FATAL:  password authentication failed",
			"2026-03-01 12:00:00.010 UTC [7] app@db LOG:  connection authorized: user=app database=db"}, "login app@10.0.0.1", 2},
		"a zone that is none": {"", []string{"9999-11-22 03:04:05.000 +99 [7] LOG:  x", "9999-11-22 03:04:05.000 UTC [7] LOG:  x"}, "", 2},
		"no entry for a host": {"", []string{received, `2026-03-01 12:00:00.010 UTC [7] LOG:  x`, `2026-03-01 12:00:00.010 UTC [7] FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "app", database "db", no encryption`}, "attempt app@10.0.0.1", 0},
		"rubbish":             {"", []string{"", "x", "2026-99-01 12:00:00.000 UTC [7] LOG:  connection received: host=10.0.0.1 port=4000", "2026-03-01 12:00:00.000 XYZ [7] LOG:  x", strings.Repeat("LOG:  ", 5000)}, "", 4},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "postgres-stderr", sightings.Options{LogLinePrefix: c.prefix}, c.lines...)
			if words(seen) != c.want || health.Unreadable != c.bad {
				t.Errorf("%s (%d unreadable: %s), want %s (%d)", words(seen), health.Unreadable, health.Sample, c.want, c.bad)
			}
		})
	}
}

func TestPrefixesThatCannotBeRead(t *testing.T) {
	for prefix, want := range map[string]string{
		"%u@%d ":     "it needs one of %m",
		"%m ":        "it needs one of %p",
		"%m %p %u%d": "nothing stands between %u and %d",
		"%m [%p] %z": "%z is no escape",
	} {
		if _, err := sightings.NewPostgresStderr("log", prefix); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", prefix, err, want)
		}
	}
}

func csv(user, severity, message string) string {
	return `2026-03-01 12:00:00.010 UTC,` + user + `,"db",7,"10.0.0.1:4000",65f0.7,2,"authentication",2026-03-01 12:00:00 UTC,3/2,0,` + severity + `,00000,"` + message + `",,,,,,,,,"","client backend",,0`
}

func TestPostgresCSV(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  string
		bad   int64
	}{
		"a login": {[]string{csv(`"app"`, "LOG", "connection authorized: user=app database=db application_name=x")}, "login app@10.0.0.1", 0},
		"a record of several lines": {[]string{`2026-03-01 12:00:00.010 UTC,"a` + "\"\"b", `2026-03-01 12:00:00.010 UTC,""x","db",7,"10.0.0.1:4000",65f0.7,2,"",,,,FATAL,28P01,"no",,,,,,,,,"","",,0`},
			"attempt a\"b\n2026-03-01 12:00:00.010 UTC,\"x@10.0.0.1", 0},
		"a message that isn't of the record's user": {[]string{csv(`"bob"`, "LOG", "connection authorized: user=app database=db")}, "", 1},
		"a user with a space":                       {[]string{csv(`"app database=db"`, "LOG", "connection authorized: user=app database=db database=db")}, "login app database=db@10.0.0.1", 0},
		"columns are missing":                       {[]string{`2026-03-01 12:00:00.010 UTC,"app"`}, "", 1},
		"half a record first":                       {[]string{`rest of a record","x"`, csv(`"app"`, "LOG", "connection authorized: user=app database=db")}, "login app@10.0.0.1", 1},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "postgres-csv", sightings.Options{}, c.lines...)
			if words(seen) != c.want || health.Unreadable != c.bad {
				t.Errorf("%s (%d unreadable: %s), want %s (%d)", words(seen), health.Unreadable, health.Sample, c.want, c.bad)
			}
		})
	}
}

// A statement longer than a line is given changes nothing about what follows it.
func TestLongStatement(t *testing.T) {
	victim := csv(`"app"`, "LOG", "connection authorized: user=app database=db")
	for _, quotes := range []string{"", `""`} {
		long := csv(`"bob"`, "ERROR", strings.Repeat("x", 2<<20)+quotes)
		begin := long[:1<<20]
		log, err := sightings.New("postgres-csv", "log", sightings.Options{})
		if err != nil {
			t.Fatal(err)
		}
		var seen []sightings.Sighting
		emit := func(s sightings.Sighting) { seen = append(seen, s) }
		log.Line(1, []byte(begin), emit)
		log.Rest([]byte(long[1<<20:]))
		open := csv(`"bob"`, "ERROR", "select nope /*")
		log.Line(2, []byte(open[:strings.Index(open, "/*")+2]), emit) // whose quotation is open
		log.Line(3, []byte(victim), emit)
		log.Line(4, []byte(`*/",,,,,,,,,"","client backend",,0`), emit)
		log.Line(5, []byte(csv(`"eve"`, "LOG", "connection authorized: user=eve database=db")), emit)
		log.Flush(emit)
		if got := words(slices.DeleteFunc(seen, func(s sightings.Sighting) bool { return s.Kind == sightings.Session })); got != "login eve@10.0.0.1" {
			t.Errorf("saw %q", got)
		}
	}
}

func TestPostgresJSON(t *testing.T) {
	line := func(user, message string) string {
		return fmt.Sprintf(`{"timestamp":"2026-03-01 12:00:00.010 UTC","user":%q,"dbname":"db","pid":7,"remote_host":"10.0.0.1","remote_port":4000,"session_id":"65f0.7","error_severity":"LOG","message":%q}`, user, message)
	}
	for name, c := range map[string]struct {
		line, want string
		bad        int64
	}{
		"a login":                {line("app", "connection authorized: user=app database=db"), "login app@10.0.0.1", 0},
		"of another user":        {line("bob", "connection authorized: user=app database=db"), "", 1},
		"a line break in a name": {line("bob\nx", "connection authorized: user=bob\nx database=db"), "login bob\nx@10.0.0.1", 0},
		"a user twice":           {strings.Replace(line("app", "connection authorized: user=app database=db"), `"dbname"`, `"user":"bob","dbname"`, 1), "", 1},
		"cut":                    {line("app", "x")[:40], "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "postgres-json", sightings.Options{}, c.line)
			if words(seen) != c.want || health.Unreadable != c.bad {
				t.Errorf("%s (%d unreadable: %s), want %s (%d)", words(seen), health.Unreadable, health.Sample, c.want, c.bad)
			}
		})
	}
}

func TestSshd(t *testing.T) {
	const key = "ED25519-CERT SHA256:kdzv6tT9LCFWb2Fqy0Nd0jyhqUjHQbhfZRYVHx0bZ9E ID app (serial 1) x (serial 17) CA ED25519 SHA256:kdzv6tT9LCFWb2Fqy0Nd0jyhqUjHQbhfZRYVHx0bZ9E"
	for name, c := range map[string]struct {
		line, want, id string
		at             time.Time
	}{
		"a certificate": {"2026-03-01T12:00:00.5+00:00 db1 sshd[7]: Accepted publickey for app from 10.0.0.1 port 4000 ssh2: " + key, "login app@10.0.0.1", "app (serial 1) x 17", noon.Add(time.Second / 2)},
		"OpenSSH 9.8":   {"2026-03-01T12:00:00+00:00 db1 sshd-session[7]: Accepted password for app from fe80::1%eth0 port 4000 ssh2", "login app@fe80::1", " ", noon},
		"without a year, of last year": {"Dec 31 12:00:00 db1 sshd[7]: Accepted password for app from 10.0.0.1 port 4000 ssh2", "login app@10.0.0.1", " ",
			time.Date(2025, 12, 31, 12, 0, 0, 0, time.UTC)},
		"without a year, a clock ahead": {"Mar  1 12:00:30 db1 sshd[7]: Accepted password for app from 10.0.0.1 port 4000 ssh2", "login app@10.0.0.1", " ", noon.Add(30 * time.Second)},
		"the 29th of February":          {"Feb 29 12:00:00 db1 sshd[7]: Accepted password for app from 10.0.0.1 port 4000 ssh2", "login app@10.0.0.1", " ", time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)},
		"the journal": {`{"__REALTIME_TIMESTAMP":"1772366400000000","_HOSTNAME":"db1","SYSLOG_IDENTIFIER":"sshd","MESSAGE":"Accepted publickey for app from 10.0.0.1 port 4000 ssh2: ` + key + `"}`,
			"login app@10.0.0.1", "app (serial 1) x 17", noon},
		"a refusal whose user name is a login": {"2026-03-01T12:00:00+00:00 db1 sshd[7]: Failed password for invalid user app from 10.0.0.9 port 1 ssh2 from 10.0.0.1 port 4000 ssh2", "attempt app from 10.0.0.9 port 1 ssh2@10.0.0.1", " ", noon},
		"another program":                      {"2026-03-01T12:00:00+00:00 db1 logger[7]: Accepted password for app from 10.0.0.1 port 4000 ssh2", "", "", noon},
		"a program that names another":         {"2026-03-01T12:00:00+00:00 db1 logger[7]: sshd[8]: Accepted password for app from 10.0.0.1 port 4000 ssh2", "", "", noon},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "sshd", sightings.Options{}, c.line)
			id := ""
			if len(seen) > 0 {
				id = seen[0].SSHKeyID + " " + seen[0].SSHSerial
			}
			if words(seen) != c.want || id != c.id || health.Unreadable != 0 || !health.Last.Equal(c.at) {
				t.Errorf("%s %q at %s (%s), want %s %q at %s", words(seen), id, health.Last, health.Sample, c.want, c.id, c.at)
			}
		})
	}
}

func TestVaultAudit(t *testing.T) {
	line := func(kind, operation, path, rest string) string {
		return fmt.Sprintf(`{"time":"2026-03-01T12:00:00Z","type":%q,"auth":{"display_name":"token-x","metadata":{"grant":"g1"}},"request":{"operation":%q,"path":%q,"mount_type":"database","remote_address":"10.0.0.1"},"response":%s}`, kind, operation, path, rest)
	}
	const leased = `{"secret":{"lease_id":"database/creds/ro/x"},"data":{"password":"hmac-sha256:1"}}`
	for name, c := range map[string]struct {
		line string
		want int
		bad  int64
	}{
		"an answer with a lease":       {line("response", "read", "database/creds/ro", leased), 1, 0},
		"its request":                  {line("request", "read", "database/creds/ro", leased), 0, 0},
		"Vault's own paths":            {line("response", "read", "sys/health", `{"data":{"type":"hmac"}}`), 0, 0},
		"an answer that is an error":   {strings.Replace(line("response", "read", "database/creds/ro", "{}"), `"auth"`, `"error":"permission denied","auth"`, 1), 0, 0},
		"a write":                      {line("response", "update", "secret/data/x", `{"data":{"version":2}}`), 0, 0},
		"a request that says it isn't": {line("request", "read", "database/creds/ro", `{"data":{"type":"response"}}`), 0, 0},
		"no JSON":                      {`"type":"response"`, 0, 1},
		"nested without end":           {`{"type":"response","x":` + strings.Repeat("[", 100000), 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "vault-audit", sightings.Options{}, c.line)
			if len(seen) != c.want || health.Unreadable != c.bad {
				t.Fatalf("%d sightings, %d unreadable, want %d and %d", len(seen), health.Unreadable, c.want, c.bad)
			}
			want := sightings.Sighting{Time: noon, Kind: sightings.Read, Source: "log", Line: 1, From: netip.MustParseAddr("10.0.0.1"), VaultLease: "database/creds/ro/x", VaultPath: "database/creds/ro", Lease: "g1", Actor: "token-x"}
			if len(seen) == 1 && seen[0] != want {
				t.Errorf("%+v, want %+v", seen[0], want)
			}
		})
	}
}

func TestWindows(t *testing.T) {
	for name, c := range map[string]struct {
		line, want  string
		interactive bool
		bad         int64
	}{
		"the event's XML":   {`{"Event":{"System":{"EventID":4624,"TimeCreated":{"#attributes":{"SystemTime":"2026-03-01T12:00:00.1234567Z"}},"Computer":"dc1"},"EventData":{"TargetUserName":"svc-app","IpAddress":"::ffff:10.0.0.1","LogonType":3}}}`, "login svc-app@10.0.0.1", false, 0},
		"Winlogbeat":        {`{"@timestamp":"2026-03-01T12:00:00.123Z","winlog":{"event_id":"4624","event_data":{"TargetUserName":"svc-app","IpAddress":"10.0.0.1","LogonType":"10"}}}`, "login svc-app@10.0.0.1", true, 0},
		"flat":              {`{"EventID":4776,"EventTime":"2026-03-01 12:00:00","TargetUserName":"svc-app","Status":"0x0"}`, "login svc-app", false, 0},
		"a wrong password":  {`{"EventID":4776,"EventTime":"2026-03-01 12:00:00","TargetUserName":"svc-app","Status":"0xc000006a"}`, "attempt svc-app", false, 0},
		"Kerberos":          {`[{"Id":4769,"TimeCreated":"/Date(1772366400000)/","TargetUserName":"svc-app@EXAMPLE.COM","IpAddress":"10.0.0.1","Status":"0x0"},{"Id":1,"TimeCreated":"/Date(1772366400000)/"}]`, "login svc-app@10.0.0.1", false, 0},
		"credentials given": {`{"EventID":4648,"EventTime":"2026-03-01 12:00:00","TargetUserName":"svc-app","IpAddress":"-"}`, "attempt svc-app", false, 0},
		"no time":           {`{"EventID":4624}`, "", false, 1},
		"no JSON":           {`EventID=4624`, "", false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "windows-json", sightings.Options{}, c.line)
			if words(seen) != c.want || health.Unreadable != c.bad || len(seen) > 0 && seen[0].Interactive != c.interactive {
				t.Errorf("%+v (%d unreadable), want %s", seen, health.Unreadable, c.want)
			}
		})
	}
}

func TestOCSF(t *testing.T) {
	for name, c := range map[string]struct {
		line, want string
		bad        int64
	}{
		"a logon":       {`{"class_uid":3002,"activity_id":1,"time":1772366400000,"status_id":1,"user":{"name":"app"},"src_endpoint":{"ip":"10.0.0.1"},"dst_endpoint":{"hostname":"db1"}}`, "login app@10.0.0.1", 0},
		"that failed":   {`{"class_uid":3002,"activity_id":1,"time":1772366400000,"status_id":2,"user":{"name":"app"},"src_endpoint":{"ip":"10.0.0.1"}}`, "attempt app@10.0.0.1", 0},
		"a logoff":      {`{"class_uid":3002,"activity_id":2,"time":1772366400000,"status_id":1,"user":{"name":"app"}}`, "", 0},
		"another class": {`{"class_uid":4001,"time":1772366400000}`, "", 0},
		"no class":      {`{"time":1772366400000}`, "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			seen, health := read(t, "ocsf", sightings.Options{}, c.line)
			if words(seen) != c.want || health.Unreadable != c.bad {
				t.Errorf("%+v (%d unreadable), want %s", seen, health.Unreadable, c.want)
			}
		})
	}
}

// FuzzReaders: no log makes a reader fail, keep a text without bound, or give what
// it says it can't read.
func FuzzReaders(f *testing.F) {
	for kind := range sightings.Kinds {
		for _, line := range logins(sightings.Kinds[kind], 2) {
			f.Add(kind, line)
		}
	}
	f.Add(slices.Index(sightings.Kinds, "windows-json"), []byte(`{"EventID":4624,"EventTime":"2026-03-01 12:00:00","TargetUserName":"a","IpAddress":"10.0.0.1"}`))
	f.Add(slices.Index(sightings.Kinds, "ocsf"), []byte(`{"class_uid":3002,"activity_id":1,"time":1772366400000,"status_id":1,"user":{"name":"app"}}`))
	f.Fuzz(func(t *testing.T, kind int, log []byte) {
		if kind < 0 || kind >= len(sightings.Kinds) {
			return
		}
		seen, health := read(t, sightings.Kinds[kind], sightings.Options{}, strings.Split(string(log), "\n")...)
		for _, s := range seen {
			if s.Kind == 0 || s.Time.IsZero() || len(s.Account) > 512 || len(s.Program) > 512 || len(s.Target) > 512 || len(s.SSHKeyID) > 512 || len(s.Actor) > 512 {
				t.Errorf("%+v", s)
			}
		}
		r, err := sightings.New(sightings.Kinds[kind], "log", sightings.Options{Now: func() time.Time { return noon }})
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(log), "\n") {
			r.Line(int64(i+1), []byte(line), func(s sightings.Sighting) {
				if _, err := json.Marshal(s); err != nil {
					t.Error(err)
				}
			})
			saved, err := r.Save()
			if err == nil {
				err = r.Restore(saved)
			}
			if err != nil {
				t.Fatalf("after line %d: %v", i+1, err)
			}
		}
		if health.Unreadable > 0 && len(health.Sample) > 200 {
			t.Errorf("a sample of %d bytes", len(health.Sample))
		}
	})
}

// TestRestartAnywhere: a reader that is made anew before any line, from what the one
// before it saved, sees the same.
func TestRestartAnywhere(t *testing.T) {
	for _, kind := range sightings.Kinds {
		var log []string
		for _, line := range logins(kind, 20) {
			log = append(log, string(line))
		}
		if kind == "postgres-csv" {
			log = append(log, csv(`"app"`, "LOG", "a statement\nof\n\"\"three\"\" lines"), csv(`"app"`, "LOG", "connection authorized: user=app database=db"))
			log = strings.Split(strings.Join(log, "\n"), "\n")
		}
		want, _ := read(t, kind, sightings.Options{}, log...)
		var seen []sightings.Sighting
		emit := func(s sightings.Sighting) { seen = append(seen, s) }
		var saved []byte
		for i, line := range log {
			r, err := sightings.New(kind, "log", sightings.Options{Now: func() time.Time { return noon }})
			if err == nil && saved != nil {
				err = r.Restore(saved)
			}
			if err != nil {
				t.Fatal(err)
			}
			r.Line(int64(i+1), []byte(line), emit)
			if i == len(log)-1 {
				r.Flush(emit)
			}
			if saved, err = r.Save(); err != nil {
				t.Fatal(err)
			}
		}
		// What there was of a record of several lines isn't kept.
		session := func(s sightings.Sighting) bool { return s.Kind == sightings.Session }
		seen, want = slices.DeleteFunc(seen, session), slices.DeleteFunc(want, session)
		if !slices.Equal(seen, want) {
			t.Errorf("%s: saw %v, want %v", kind, seen, want)
		}
	}
}
