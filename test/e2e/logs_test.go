package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// TestRealLogs: a real PostgreSQL writes its log in all three forms at once, while
// hosts with addresses of their own do what honest ones do, and one that stole a
// credential. Replayed, each form shows the theft, and nothing else.
func TestRealLogs(t *testing.T) {
	ctx := check.Within(t, 2*time.Minute)
	honest := check.Must(lab.NewNamespace(ctx, 1))(t)
	t.Cleanup(func() { check.Nil(t, honest.Close()) })
	thief := check.Must(lab.NewNamespace(ctx, 2))(t)
	t.Cleanup(func() { check.Nil(t, thief.Close()) })
	logs := folder(t)
	check.Nil(t, os.Chmod(logs, 0o777))
	pg := check.Must(lab.StartPostgres(ctx, filepath.Join(folder(t), "pg"), "listen_addresses=127.0.0.1,"+honest.Here+","+thief.Here,
		"logging_collector=on", "log_destination=stderr,csvlog,jsonlog", "log_directory="+logs, "log_filename=pg.log", "log_file_mode=0644", "log_statement=all"))(t)
	t.Cleanup(func() { _ = pg.Close() })

	start := time.Now()
	user := func(n int) string { return fmt.Sprintf("v-token-co-billing--%020d-%d", n, start.Unix()) }
	var ledger strings.Builder
	for n := range 3 {
		check.Nil(t, pg.Exec(ctx, "postgres", fmt.Sprintf(`CREATE ROLE %q LOGIN PASSWORD 'p%d'`, user(n), n)))
		fmt.Fprintf(&ledger, `{"id":"L%d","scope":"billing-db","host":"h%d","subject":{"boot":"b","user":"billing","exe":"/opt/billingd","sha256":"aa"},"kind":"vault","names":{"db_username":%q,"vault_lease":"database/creds/billing-ro/%d"},"sources":[%q],"audience":[],"issued":%q,"expires":%q}`+"\n",
			n, n, user(n), n, honest.Address, start.UTC().Format(time.RFC3339), start.Add(time.Hour).UTC().Format(time.RFC3339))
	}
	connect := func(from *lab.Namespace, n int, password, program string) (*pgx.Conn, error) {
		return pg.ConnectBy(ctx, from.DialContext, from.Here, user(n), password, "postgres", program)
	}
	closed := func(c *pgx.Conn, err error) {
		t.Helper()
		check.Nil(t, err)
		check.Nil(t, c.Close(ctx))
	}
	// A pool that keeps a session, reconnects, and says hostile things.
	pool := check.Must(connect(honest, 0, "p0", "billingd"))(t)
	closed(connect(honest, 0, "p0", "billingd"))
	closed(connect(honest, 1, "p1", "x LOG:  connection authorized: user="+user(2)+" database=postgres"))
	_, err := pool.Exec(ctx, "SELECT 'connection authorized: user="+user(2)+" database=postgres\n"+start.UTC().Format("2006-01-02 15:04:05.000 UTC")+" [1] LOG:  x'")
	check.Nil(t, err)
	// User names are no secret: a wrong password, from elsewhere.
	if _, err := connect(thief, 0, "wrong", "psql"); err == nil {
		t.Fatal("a wrong password gets in")
	}
	// A name with a line break in it, and with another's in it.
	for _, name := range []string{"x\n" + start.UTC().Format("2006-01-02 15:04:05.000 UTC") + " [1] " + user(0), user(0) + " database=postgres"} {
		if _, err := pg.ConnectBy(ctx, thief.DialContext, thief.Here, name, "x", "postgres", ""); err == nil {
			t.Fatal("nobody gets in")
		}
	}
	// The theft.
	closed(connect(thief, 2, "p2", "billingd"))
	closed(connect(thief, 2, "p2", "billingd"))
	check.Nil(t, pool.Close(ctx))
	check.Nil(t, pg.Stop())

	name := filepath.Join(folder(t), "ledger.jsonl")
	check.Nil(t, os.WriteFile(name, []byte(ledger.String()), 0o600))
	bin := check.Must(lab.Program("countersign", false))(t)
	for kind, file := range map[string]string{"postgres-stderr": "pg.log", "postgres-csv": "pg.csv", "postgres-json": "pg.json"} {
		out, err := exec.CommandContext(ctx, bin, "watch", "replay", "--ledger", name, "--source", kind+"="+filepath.Join(logs, file), "-o", "json").Output()
		check.Nil(t, err)
		var found []string
		for line := range strings.Lines(string(out)) {
			var f reported
			check.Nil(t, json.Unmarshal([]byte(line), &f))
			found = append(found, fmt.Sprint(f.Detector, " ", f.Lease, " ", f.Count))
			if !strings.Contains(line, thief.Address) {
				t.Errorf("%s: %s", kind, line)
			}
		}
		if !slices.Equal(found, []string{"foreign-source L2 2"}) {
			text, _ := os.ReadFile(filepath.Join(logs, file))
			t.Errorf("%s: found %v in\n%s", kind, found, text)
		}
	}
}

// TestActivity: of a PostgreSQL whose log nobody gets, its sessions tell; each once,
// though the watch is killed while they live.
func TestActivity(t *testing.T) {
	ctx := check.Within(t, 2*time.Minute)
	b := newBroker(t, fmt.Sprintf(billingScope, "/bin/true"), false)
	check.Nil(t, services.PG.Exec(ctx, "postgres", `CREATE ROLE "svc-governed" LOGIN PASSWORD 'p'`))
	t.Cleanup(func() { _ = services.PG.Exec(context.Background(), "postgres", `DROP ROLE "svc-governed"`) })
	dsn := filepath.Join(b.dir, "dsn")
	check.Nil(t, os.WriteFile(dsn, []byte(services.PG.DSN(services.PG.User, services.PG.Password, "postgres")), 0o600))
	w := check.Must(lab.StartWatch(filepath.Join(b.dir, "watch"), b.broker, fmt.Sprintf(`
governed = ["svc-*"]
sensor "postgres-activity" "db" {
  dsn_file = %q
}
`, dsn)))(t)
	t.Cleanup(func() { _ = w.Stop() })
	conn := check.Must(services.PG.ConnectBy(ctx, (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}}).DialContext, "127.0.0.1", "svc-governed", "p", "postgres", "app"))(t)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	found := func(want int) {
		t.Helper()
		check.Eventually(t, 30*time.Second, "the session is found", func() (bool, string) {
			n := 0
			for _, f := range b.findings(t, "") {
				if f.Detector == "unmatched-login" && f.Account == "svc-governed" && strings.Contains(string(f.Evidence[0]), "127.0.0.9") {
					n = f.Count
				}
			}
			return n == want, fmt.Sprint(n)
		})
	}
	found(1)
	check.Nil(t, w.Kill())
	check.Nil(t, w.Start())
	again := check.Must(services.PG.ConnectBy(ctx, (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}}).DialContext, "127.0.0.1", "svc-governed", "p", "postgres", "app"))(t)
	t.Cleanup(func() { _ = again.Close(context.Background()) })
	found(2)
	for _, path := range []string{w.Log(), filepath.Join(w.Dir, "state", "state.json")} {
		if text := check.Must(os.ReadFile(path))(t); strings.Contains(string(text), services.PG.Password) {
			t.Errorf("%s holds the password", path)
		}
	}
}
