package sightings_test

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/sightings"
)

// logins is a log of n sessions: as a busy server writes them, each with its
// connection, its login and its end.
func logins(kind string, n int) [][]byte {
	var out [][]byte
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for i := range n {
		at := start.Add(time.Duration(i) * 10 * time.Millisecond).Format("2006-01-02 15:04:05.000 UTC")
		user := fmt.Sprintf("v-token-co-billing--abcdefghij%010d-1790000000", i)
		pid := 1000 + i%30000
		switch kind {
		case "postgres-stderr":
			out = append(out,
				fmt.Appendf(nil, "%s [%d] [unknown]@[unknown] LOG:  connection received: host=10.0.0.1 port=4000", at, pid),
				fmt.Appendf(nil, "%s [%d] %s@billing LOG:  connection authorized: user=%s database=billing application_name=billingd", at, pid, user, user),
				fmt.Appendf(nil, "%s [%d] %s@billing LOG:  disconnection: session time: 0:00:01.042 user=%s database=billing host=10.0.0.1 port=4000", at, pid, user, user))
		case "postgres-csv":
			row := func(user, message string) []byte {
				return fmt.Appendf(nil, `%s,%s,"billing",%d,"10.0.0.1:4000",65f0.%x,1,"authentication",%s,3/2,0,LOG,00000,"%s",,,,,,,,,"billingd","client backend",,0`, at, user, pid, i, at[:23], message)
			}
			out = append(out, row("", "connection received: host=10.0.0.1 port=4000"),
				row(`"`+user+`"`, "connection authorized: user="+user+" database=billing application_name=billingd"),
				row(`"`+user+`"`, "disconnection: session time: 0:00:01.042 user="+user+" database=billing host=10.0.0.1 port=4000"))
		case "postgres-json":
			row := func(user, message string) []byte {
				return fmt.Appendf(nil, `{"timestamp":"%s",%s"dbname":"billing","pid":%d,"remote_host":"10.0.0.1","remote_port":4000,"session_id":"65f0.%x","line_num":1,"ps":"authentication","session_start":"%s","vxid":"3/2","txid":0,"error_severity":"LOG","message":"%s","application_name":"billingd","backend_type":"client backend","query_id":0}`, at, user, pid, i, at[:23], message)
			}
			out = append(out, row("", "connection received: host=10.0.0.1 port=4000"),
				row(`"user":"`+user+`",`, "connection authorized: user="+user+" database=billing application_name=billingd"),
				row(`"user":"`+user+`",`, "disconnection: session time: 0:00:01.042 user="+user+" database=billing host=10.0.0.1 port=4000"))
		case "sshd":
			out = append(out, fmt.Appendf(nil, "%s db1 sshd[%d]: Accepted publickey for app from 10.0.0.1 port 40112 ssh2: ED25519-CERT SHA256:kdzv6tT9LCFWb2Fqy0Nd0jyhqUjHQbhfZRYVHx0bZ9E ID app@billing-%d (serial %d) CA ED25519 SHA256:kdzv6tT9LCFWb2Fqy0Nd0jyhqUjHQbhfZRYVHx0bZ9E",
				start.Add(time.Duration(i)*time.Millisecond).Format("Jan _2 15:04:05"), pid, i, 1000000000000+i))
		case "vault-audit":
			out = append(out, fmt.Appendf(nil, `{"auth":{"accessor":"hmac-sha256:1b0a8c","client_token":"hmac-sha256:7a1b","display_name":"token-countersign-%d","metadata":{"grant":"%d","host":"h1","scope":"billing-db"},"policies":["countersign-billing-db"],"policy_results":{"allowed":true,"granting_policies":[{"name":"countersign-billing-db","namespace_id":"root","type":"acl"}]},"token_policies":["countersign-billing-db"],"token_issue_time":"2026-03-01T12:00:00Z","token_ttl":120,"token_type":"service"},"request":{"client_id":"x","client_token":"hmac-sha256:7a1b","client_token_accessor":"hmac-sha256:1b0a8c","headers":{"x-correlation-id":["a2a6a5"]},"id":"5a9c-%d","mount_accessor":"database_1","mount_class":"secret","mount_point":"database/","mount_running_version":"v1.21.0+builtin.vault","mount_type":"database","namespace":{"id":"root"},"operation":"read","path":"database/creds/billing-ro","remote_address":"10.0.0.250","remote_port":40112},"response":{"data":{"password":"hmac-sha256:aa","username":"hmac-sha256:bb"},"mount_accessor":"database_1","mount_class":"secret","mount_point":"database/","mount_type":"database","secret":{"lease_id":"database/creds/billing-ro/%020d"}},"time":"%s","type":"response"}`,
				i, i, i, i, start.Add(time.Duration(i)*time.Millisecond).Format(time.RFC3339Nano)))
		}
	}
	return out
}

// reading is one core's speed over a log in which every line speaks of a login, the
// slowest kind there is.
func reading(b *testing.B, kind string) {
	lines := logins(kind, 20000)
	r, err := sightings.New(kind, "log", sightings.Options{Now: func() time.Time { return time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC) }})
	if err != nil {
		b.Fatal(err)
	}
	seen, n := 0, 0
	for b.Loop() {
		r.Line(int64(n+1), lines[n%len(lines)], func(sightings.Sighting) { seen++ })
		n++
	}
	if h := r.Health(); h.Unreadable > 0 || seen == 0 {
		b.Fatalf("%d sightings, %+v", seen, h)
	}
}

// hashing is what nothing that looks at every byte does in less.
func hashing(b *testing.B, kind string) {
	lines := logins(kind, 20000)
	n := 0
	for b.Loop() {
		sha256.Sum256(lines[n%len(lines)])
		n++
	}
}

func BenchmarkStderr(b *testing.B)      { reading(b, "postgres-stderr") }
func BenchmarkStderrFloor(b *testing.B) { hashing(b, "postgres-stderr") }
func BenchmarkCSV(b *testing.B)         { reading(b, "postgres-csv") }
func BenchmarkCSVFloor(b *testing.B)    { hashing(b, "postgres-csv") }
func BenchmarkJSON(b *testing.B)        { reading(b, "postgres-json") }
func BenchmarkJSONFloor(b *testing.B)   { hashing(b, "postgres-json") }
func BenchmarkSshd(b *testing.B)        { reading(b, "sshd") }
func BenchmarkSshdFloor(b *testing.B)   { hashing(b, "sshd") }
func BenchmarkVault(b *testing.B)       { reading(b, "vault-audit") }
func BenchmarkVaultFloor(b *testing.B)  { hashing(b, "vault-audit") }
