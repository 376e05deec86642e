package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const spreadScope = `
scope %[1]q {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = %[2]q }
  vault {
    path    = "database/creds/%[1]s"
    ttl     = %[3]q
    overlap = "10s"
  }
}
`

// A database is a PostgreSQL with a log that the watch follows.
type database struct {
	*lab.Postgres
	name    string
	address string
	log     string
	off     time.Duration // its clock
}

func newDatabase(t *testing.T, name, address string, off time.Duration, scopes ...string) *database {
	t.Helper()
	ctx := check.Within(t, 2*time.Minute)
	logs := folder(t)
	check.Nil(t, os.Chmod(logs, 0o777))
	d := &database{name: name, address: address, log: filepath.Join(logs, "pg.csv"), off: off}
	d.Postgres = check.Must(lab.StartPostgres(ctx, filepath.Join(folder(t), "pg"), "listen_addresses=127.0.0.1,"+address,
		"logging_collector=on", "log_destination=csvlog", "log_directory="+logs, "log_filename=pg.log"))(t)
	t.Cleanup(func() { _ = d.Close() })
	if off != 0 {
		check.Nil(t, d.SetClockOff(ctx, off))
	}
	for _, scope := range scopes {
		check.Nil(t, lab.ConfigureDatabase(ctx, services.Vault, d.Postgres, lab.DatabaseRole{Name: scope, Database: name, DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour}))
	}
	return d
}

func (d *database) sensor() string {
	return fmt.Sprintf("sensor \"postgres-csv\" %q {\n  path = %q\n}\n", d.name, d.log)
}

// connect logs in from a host.
func (d *database) connect(t *testing.T, from *lab.Namespace, user, password string) (*pgx.Conn, error) {
	t.Helper()
	return d.ConnectBy(check.Within(t, 10*time.Second), from.DialContext, d.address, user, password, d.name, "billingd")
}

func (d *database) login(t *testing.T, from *lab.Namespace, user, password string) {
	t.Helper()
	check.Nil(t, check.Must(d.connect(t, from, user, password))(t).Close(context.Background()))
}

// reconnect ends a user's sessions, and waits until it has others, from there.
func (d *database) reconnect(t *testing.T, user, from string) {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	ended := check.Must(d.Query(ctx, "postgres", "SELECT pid::text, pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", user))(t)
	if len(ended) == 0 {
		t.Fatalf("%s has no session", user)
	}
	check.Eventually(t, 20*time.Second, "the pool is in again", func() (bool, string) {
		sources := check.Must(d.Query(ctx, "postgres", "SELECT host(client_addr) FROM pg_stat_activity WHERE usename = $1 AND NOT pid::text = ANY($2)", user, ended))(t)
		return len(sources) > 0 && !slices.ContainsFunc(sources, func(s string) bool { return s != from }), fmt.Sprint(sources)
	})
}

// A spreadHost is a bench whose host has an address of its own.
type spreadHost struct {
	*bench
	net *lab.Namespace
}

func newSpreadHost(t *testing.T, broker *lab.Broker, net *lab.Namespace, credentials string) *spreadHost {
	t.Helper()
	h := &spreadHost{bench: &bench{dir: folder(t), broker: broker}, net: net}
	h.tpm = check.Must(lab.StartTPM(check.Within(t, time.Minute), filepath.Join(h.dir, "tpm"), services.TPMCA, lab.TPMOptions{}))(t)
	t.Cleanup(h.tpm.Stop)
	h.agent = check.Must(lab.NewAgent(filepath.Join(h.dir, "agent"), broker, h.tpm.Path(), credentials, false))(t)
	h.agent.Enter = net.Enter()
	h.join(t)
	return h
}

// reboot takes what ran and what was kept in memory, gives the TPM a reset and the
// kernel another boot's id, which it returns.
func (h *spreadHost) reboot(t *testing.T, programs ...*legacy) string {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	check.Nil(t, h.agent.Kill())
	for _, l := range programs {
		_ = l.cmd.Process.Kill()
		_ = l.cmd.Wait()
	}
	check.Nil(t, h.tpm.PowerCycle(ctx))
	check.Nil(t, os.RemoveAll(filepath.Join(h.agent.Dir, "run")))
	boot, file := fmt.Sprintf("5c0f3c1e-0000-4000-8000-%012d", time.Now().Unix()), filepath.Join(h.dir, "boot_id")
	check.Nil(t, os.WriteFile(file, []byte(boot+"\n"), 0o444))
	h.agent.Enter = append(h.net.Enter(), "unshare", "--mount", "sh", "-c", `mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"`, file)
	check.Nil(t, h.agent.Start(ctx))
	return boot
}

// Hosts with addresses of their own do what honest ones do: a pool keeps sessions
// over a rotation, pools reconnect, one host comes through a pooler, leases are
// extended and used long after, databases' clocks are off, a host reboots, and
// somebody tries a stolen user name. Nothing of it is a finding. Then a credential
// is copied from its host's file and used from another host: it is found within a
// minute, its lease revoked, and that is the only finding there is.
func TestStolenAcrossHosts(t *testing.T) {
	ctx := check.Within(t, 8*time.Minute)
	var nets []*lab.Namespace
	for n := range byte(4) {
		s := check.Must(lab.NewNamespace(ctx, 21+n))(t)
		t.Cleanup(func() { check.Nil(t, s.Close()) })
		nets = append(nets, s)
	}
	direct, pooled, pooler, thief := nets[0], nets[1], nets[2], nets[3]
	front := check.Must(pooled.Link(ctx, pooler, 25))(t)

	// Names of this run alone: Vault's audit log has other tests' in it.
	dir := folder(t)
	run := filepath.Base(dir)
	names := map[string]string{} // of scopes and of Vault's roles
	exes, files := map[string]string{}, map[string]string{}
	var scopes strings.Builder
	for what, ttl := range map[string]string{"rotated": "1m", "pooled": "30m", "behind": "30m", "ahead": "30m"} {
		names[what] = run + "-" + what
		exes[what], files[what] = copyExe(t, dir, what+"d"), filepath.Join(dir, what+".properties")
		fmt.Fprintf(&scopes, spreadScope, names[what], exes[what], ttl)
	}
	credential := func(what, more string) string {
		return fileCredential(names[what], exes[what], files[what], more)
	}
	db := newDatabase(t, run, direct.Here, 0, names["rotated"], names["pooled"])
	behind := newDatabase(t, run+"behind", direct.Here, -30*time.Second, names["behind"])
	ahead := newDatabase(t, run+"ahead", direct.Here, 30*time.Second, names["ahead"])

	b := newBrokerWith(t, scopes.String(), lab.BrokerOptions{Listen: direct.Here})
	w := b.startWatch(t, fmt.Sprintf("through = [\"%s/32\"]\n", pooler.Address)+db.sensor()+behind.sensor()+ahead.sensor()+
		fmt.Sprintf("sensor \"vault-audit\" \"vault\" {\n  path = %q\n}\n", services.Vault.AuditLog))
	quiet := func(what string) {
		t.Helper()
		for _, f := range b.findings(t, "") {
			t.Errorf("%s: found %s of lease %s, host %s: %s", what, f.Detector, f.Lease, f.Host, f.Evidence)
		}
		if t.Failed() {
			t.FailNow()
		}
	}

	users := filepath.Join(dir, "userlist.txt")
	pgb := check.Must(lab.StartPooler(check.Within(t, 20*time.Second), pooler, filepath.Join(dir, "pooler"), front, db.address, db.Port, db.name, users))(t)
	t.Cleanup(func() { _ = pgb.Stop() })
	one := newSpreadHost(t, b.broker, direct, credential("rotated", "")+credential("behind", "")+credential("ahead", ""))
	two := newSpreadHost(t, b.broker, pooled, credential("pooled", fmt.Sprintf(`file %q {
    template = "{{ .username | json }} {{ .password | json }}\n"
    owner    = "nobody"
    mode     = "0400"
  }`, users)))
	start := func(what string, h *spreadHost, host string, port int, database string) *legacy {
		t.Helper()
		return startLegacyAt(t, h.net.Enter(), exes[what], files[what], host, port, database)
	}
	rotated := start("rotated", one, db.address, db.Port, db.name)
	first, firstPassword := rotated.getsIn(t, files["rotated"])
	through := start("pooled", two, front, 6432, db.name)
	check.Eventually(t, 30*time.Second, "the pooler's users are there", func() (bool, string) { _, err := os.Stat(users); return err == nil, fmt.Sprint(err) })
	check.Nil(t, pgb.Reload())
	victim, password := through.getsIn(t, files["pooled"])
	issued := time.Now()
	stolen := b.leaseOf(t, victim)

	db.reconnect(t, first, direct.Address)
	db.reconnect(t, victim, pooler.Address)
	// A session that is kept while the credential is rotated.
	kept := check.Must(db.connect(t, direct, first, firstPassword))(t)
	t.Cleanup(func() { _ = kept.Close(context.Background()) })
	for range 3 {
		db.login(t, direct, first, firstPassword)
	}
	if _, err := db.connect(t, thief, victim, "wrong"); err == nil {
		t.Fatal("a wrong password gets in")
	}
	check.Eventually(t, time.Minute, "a rotation", func() (bool, string) {
		st := rotated.last(t)
		return st.Pools > 1 && st.User != first, fmt.Sprintf("%+v", st)
	})
	var as string
	check.Nil(t, kept.QueryRow(ctx, "SELECT session_user").Scan(&as))
	if as != first {
		t.Errorf("the session that was kept is of %s, want %s", as, first)
	}
	check.Eventually(t, time.Minute, "the rotated user is gone", func() (bool, string) { return !roleExistsIn(t, db.Postgres, first), first })
	if _, err := db.connect(t, direct, first, firstPassword); err == nil {
		t.Fatal("a user that is gone gets in")
	}
	quiet("after a rotation")

	// Up to the reboot, and after it, by clocks that tell another order.
	for _, d := range []*database{behind, ahead} {
		what := strings.TrimPrefix(d.name, run)
		clock := check.Must(strconv.ParseFloat(check.Must(d.Query(ctx, "postgres", "SELECT extract(epoch FROM clock_timestamp())::text"))(t)[0], 64))(t)
		if off := time.Until(time.UnixMilli(int64(clock * 1000))); (off - d.off).Abs() > 5*time.Second {
			t.Fatalf("%s: the clock is off by %v, want %v", what, off, d.off)
		}
		l := start(what, one, d.address, d.Port, d.name)
		user, password := l.getsIn(t, files[what])
		d.login(t, direct, user, password)
		l.stop()
		check.Eventually(t, 20*time.Second, "the user is gone with its program", func() (bool, string) { return !roleExistsIn(t, d.Postgres, user), user })
	}
	boot := one.reboot(t, rotated)
	rotated = start("rotated", one, db.address, db.Port, db.name)
	check.Eventually(t, 30*time.Second, "the program gets in by what was issued after the reboot", func() (bool, string) {
		st := rotated.last(t)
		for _, e := range b.exported(t) {
			if e.Host == one.host && e.Subject.Boot == boot && e.Names["db_username"] == st.User {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", st)
	})

	start("behind", one, behind.address, behind.Port, behind.name).getsIn(t, files["behind"])

	// Until the delivery was acknowledged, leases had two minutes to live.
	time.Sleep(time.Until(issued.Add(2*time.Minute + 50*time.Second)))
	db.reconnect(t, victim, pooler.Address)
	if now := b.leaseOf(t, victim); now.ID != stolen.ID || now.State != "live" {
		t.Errorf("the lease is %+v, was %+v", now, stolen)
	}

	// All of it was read and judged.
	for _, d := range []*database{db, behind, ahead} {
		check.Nil(t, d.Exec(ctx, "postgres", "SELECT"))
		want := time.Now().Add(d.off - 2*time.Second)
		check.Eventually(t, 20*time.Second, "the log is read", func() (bool, string) {
			newest, err := w.Metric(ctx, fmt.Sprintf("countersign_watch_sensor_newest_seconds{sensor=%q}", d.name))
			if err != nil {
				return false, err.Error()
			}
			held := check.Must(w.Metric(ctx, "countersign_watch_sightings_held"))(t)
			unreadable := check.Must(w.Metric(ctx, fmt.Sprintf("countersign_watch_sensor_unreadable{sensor=%q}", d.name)))(t)
			return newest >= float64(want.Unix()) && held == 0 && unreadable == 0, fmt.Sprintf("newest %v, want %v; %v held, %v unreadable", newest, want.Unix(), held, unreadable)
		})
	}
	quiet("honest hosts")

	login := time.Now()
	db.login(t, thief, victim, password)
	check.Eventually(t, time.Minute, "the copied credential is revoked", func() (bool, string) {
		return b.leaseOf(t, victim).ID == "" && !roleExistsIn(t, db.Postgres, victim), fmt.Sprintf("%+v", b.leaseOf(t, victim))
	})
	t.Logf("found and revoked %v after the login", time.Since(login).Round(10*time.Millisecond))
	time.Sleep(10 * time.Second) // what else it may lead to
	found := b.findings(t, "")
	if len(found) != 1 || found[0].Detector != "foreign-source" || found[0].Lease != stolen.ID || found[0].Host != two.host || found[0].Account != victim ||
		found[0].Count != 1 || found[0].Status != "open" || found[0].Response != "revoke" {
		t.Errorf("want one foreign-source of lease %s and nothing else", stolen.ID)
	}
	for _, f := range found {
		for _, e := range f.Evidence {
			if !strings.Contains(string(e), thief.Address) || strings.Contains(string(e), password) {
				t.Errorf("%s: the evidence is %s", f.Detector, e)
			}
		}
		if t.Failed() {
			t.Logf("found %s of lease %s, host %s, %s, %s: %s", f.Detector, f.Lease, f.Host, f.Status, f.Response, f.Evidence)
		}
	}

	// Each host was seen at its own address.
	for _, e := range b.exported(t) {
		want := map[string]string{one.host: direct.Address, two.host: pooled.Address}[e.Host]
		if !slices.Equal(e.Sources, []string{want}) {
			t.Errorf("lease %s was issued to %v, want %s", e.ID, e.Sources, want)
		}
	}

	// Nobody but the config says that the pooler is one.
	ledger := filepath.Join(b.dir, "ledger.jsonl")
	check.Nil(t, os.WriteFile(ledger, check.Must(b.broker.CLI(ctx, "lease", "export"))(t), 0o600))
	replay := func(log string, config ...string) (from []string) {
		t.Helper()
		args := append([]string{"watch", "replay", "--ledger", ledger, "--source", "postgres-csv=" + log, "-o", "json"}, config...)
		out := check.Must(exec.CommandContext(ctx, check.Must(lab.Program("countersign", false))(t), args...).Output())(t)
		for line := range strings.Lines(string(out)) {
			var f reported
			check.Nil(t, json.Unmarshal([]byte(line), &f))
			for _, e := range f.Evidence {
				var login struct{ From string }
				check.Nil(t, json.Unmarshal(e, &login))
				from = append(from, f.Detector+" "+f.Lease+" "+login.From)
			}
		}
		slices.Sort(from)
		return slices.Compact(from)
	}
	theft := "foreign-source " + stolen.ID + " " + thief.Address
	if got := replay(db.log, "--config", w.Config()); !slices.Equal(got, []string{theft}) {
		t.Errorf("replayed: %q", got)
	}
	if got, want := replay(db.log), []string{"foreign-source " + stolen.ID + " " + pooler.Address, theft}; !slices.Equal(got, want) {
		t.Errorf("replayed without the pooler's address: %q, want %q", got, want)
	}
	for _, d := range []*database{behind, ahead} {
		if got := replay(d.log); len(got) != 0 {
			t.Errorf("%s replayed: %q", d.name, got)
		}
	}
	// A minute more is too much.
	late := filepath.Join(b.dir, "late.csv")
	check.Nil(t, os.WriteFile(late, later(t, check.Must(os.ReadFile(ahead.log))(t), time.Minute), 0o600))
	if got := replay(late); len(got) != 1 || !strings.HasPrefix(got[0], "use-after-revoke ") {
		t.Errorf("a clock 90 s ahead, replayed: %q, want one use-after-revoke", got)
	}
}

var logTime = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC,`)

// later is a csvlog by a clock that is further ahead.
func later(t *testing.T, log []byte, by time.Duration) []byte {
	t.Helper()
	const layout = "2006-01-02 15:04:05.000 MST,"
	return logTime.ReplaceAllFunc(log, func(b []byte) []byte {
		return []byte(check.Must(time.Parse(layout, string(b)))(t).Add(by).Format(layout))
	})
}
