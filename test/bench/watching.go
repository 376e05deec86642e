package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

// ledgerEntries is how many credentials the watch's ledger has.
const ledgerEntries = 1_000_000

// watching measures how fast the watch reads logs, and how much memory a large
// ledger takes.
func watching(ctx context.Context, dir string) (rows []Row, err error) {
	say("readers of logs")
	const pkg = "compensating/sightings"
	rows, err = benchmarks(ctx, dir, []measured{
		{pkg, "Stderr", "StderrFloor", Row{Name: "read a line of PostgreSQL's stderr (aim: ≤ 5 µs, 200,000/s)", Unit: "µs"}, bare, 10, 1},
		{pkg, "CSV", "CSVFloor", Row{Name: "read a line of its csvlog (aim: ≤ 5 µs)", Unit: "µs"}, bare, 10, 1},
		{pkg, "JSON", "JSONFloor", Row{Name: "read a line of its jsonlog (aim: ≤ 5 µs)", Unit: "µs"}, bare, 20, 1},
		{pkg, "Sshd", "SshdFloor", Row{Name: "read a line of sshd's (aim: ≤ 5 µs)", Unit: "µs"}, bare, 12, 1},
		{pkg, "Vault", "VaultFloor", Row{Name: "read an answer in Vault's audit log (aim: ≤ 20 µs, 50,000/s)", Unit: "µs"}, bare, 20, 1},
	})
	if err != nil {
		return nil, err
	}
	say(fmt.Sprintf("a ledger of %d entries", ledgerEntries))
	ledger, log := filepath.Join(dir, "ledger.jsonl"), filepath.Join(dir, "postgresql.log")
	if err := writeLedger(ledger); err != nil {
		return nil, err
	}
	if err := os.WriteFile(log, []byte("2026-03-01 12:00:00.000 UTC [7] LOG:  connection received: host=10.0.0.1 port=4000\n"), 0o600); err != nil {
		return nil, err
	}
	bin, err := lab.Program("countersign", false)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, bin, "watch", "replay", "--ledger", ledger, "--source", "postgres-stderr="+log, "-o", "json")
	start := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("watch replay: %w\n%s", err, out)
	}
	took := time.Since(start)
	use, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return nil, errors.New("no resource usage of a process")
	}
	return append(rows,
		Row{Name: "watch: the most it had resident with 1,000,000 entries", Value: float64(use.Maxrss) / 1024, Unit: "MiB"}.within(150),
		Row{Name: "watch: reading and judging the entries", Value: float64(took.Microseconds()) / ledgerEntries, Unit: "µs"}), os.Remove(ledger)
}

// writeLedger writes live credentials of 10,000 hosts with ten programs each.
func writeLedger(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for i := range ledgerEntries {
		host, scope := i%10_000, i/10_000%10
		issued := start.Add(time.Duration(i) * time.Millisecond)
		fmt.Fprintf(w, `{"id":"%016x","scope":"scope-%d","host":"host-%06d","subject":{"boot":"boot-%d","pid":%d,"start":%d,"unit":"app%d.service","invocation":"%d","user":"app","exe":"/opt/app/bin/appd","sha256":"%064x"},`+
			`"kind":"vault","names":{"db_username":"v-token-co-scope-%d-%020d-1772366400","vault_lease":"database/creds/scope-%d/%024d","vault_accessor":"%024d","secret_hmac":"%064x"},`+
			`"sources":["10.1.%d.%d"],"audience":["postgres://db1.example.com:5432/billing"],"issued":"%s","expires":"%s"}`+"\n",
			i*7919, scope, host, host, i%30_000+1, i, scope, host, scope, scope, i, scope, i, i, i, host>>8, host&255,
			issued.Format(time.RFC3339Nano), issued.Add(8*time.Hour).Format(time.RFC3339))
	}
	return errors.Join(w.Flush(), f.Close())
}

// canaries is how many logins the watch is timed by.
const canaries = 60

// alerting measures the time from a login's line in a log to the broker's finding.
// Canaries stand for stolen credentials: the same way for the login, which waits until
// PostgreSQL can't turn it away any more.
func alerting(ctx context.Context, dir string) (rows []Row, err error) {
	say(fmt.Sprintf("the watch, and %d logins", canaries))
	b, _, err := newBroker(ctx, filepath.Join(dir, "watched"), fleet.Scope, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Stop()) }()
	log := filepath.Join(dir, "watched.csv")
	w, err := lab.StartWatch(filepath.Join(dir, "watch"), b, fmt.Sprintf("sensor \"postgres-csv\" \"db\" {\n  path = %q\n}\n", log))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Stop()) }()
	for i := range canaries {
		if _, err := b.CLI(ctx, "canary", "issue", "--scope", "fleet", "--username", fmt.Sprintf("canary%d", i)); err != nil {
			return nil, err
		}
	}
	if err := pause(ctx, 3*time.Second); err != nil { // until the watch knows them
		return nil, err
	}
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	written, took := map[string]time.Time{}, map[string]float64{}
	for i := 0; len(took) < canaries; i++ {
		if i < canaries {
			now, user := time.Now().UTC(), fmt.Sprintf("canary%d", i)
			if _, err := fmt.Fprintf(f, "%s,\"%s\",\"db\",%d,\"10.0.0.1:4000\",%x.1,2,\"authentication\",%s,3/2,0,LOG,00000,\"connection authorized: user=%s database=db\",,,,,,,,,\"\",\"client backend\",,0\n",
				now.Format("2006-01-02 15:04:05.000 UTC"), user, 1000+i, i, now.Format("2006-01-02 15:04:05 UTC"), user); err != nil {
				return nil, err
			}
			written[user] = now
		} else if i > canaries+300 {
			return nil, fmt.Errorf("%d of %d logins were found", len(took), canaries)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
		out, err := b.CLI(ctx, "finding", "list", "-o", "json")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(out)) {
			var found struct{ Account string }
			if err := json.Unmarshal([]byte(line), &found); err != nil {
				return nil, err
			}
			if at, ok := written[found.Account]; ok && took[found.Account] == 0 {
				took[found.Account] = time.Since(at).Seconds()
			}
		}
	}
	raw := slices.Sorted(maps.Values(took))
	return []Row{
		{Name: "watch: from a login's line to the broker's finding: median", Value: raw[len(raw)/2], Unit: "s"},
		Row{Name: "watch: from a login's line to the broker's finding: p99", Value: raw[len(raw)*99/100], Unit: "s", Raw: raw}.aim("≤ 5 s"),
	}, nil
}
