package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

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
