// Command large fills a broker's store like a year's use, runs the real broker on it,
// and prints what each of the operators' verbs takes: time, the memory of the program
// and of the broker, and how long proofs of a host took meanwhile.
//
// What fails is a size, a verb that fails, and a proof that waited for a verb: one that
// took more than twenty times the median of an idle broker. How many took more than
// three times that median is printed; a row with one core busy with something else says
// how many do by the load of the machine alone.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	slow       = 3   // times the median of an idle broker: what a proof should stay below
	blocked    = 20  // times that median: a proof that waited for somebody
	mostBroker = 256 // MiB
	mostCLI    = 100 // MiB, of verbs that ask the broker
	mostFsck   = 512 // MiB, of verbs that read the store themselves
	pageFactor = 20  // of an empty broker's, for a list's first page
	overdue    = 20_000
	eventRate  = 20 // a second
	sweepShare = 0.5
)

func main() {
	scale := flag.Float64("scale", 1, "how much of a year's use: 1 is 10,000 hosts with 600,000 leases")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *scale); err != nil {
		fmt.Fprintln(os.Stderr, "large:", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "large: "+format+"\n", args...) }

// A bench is one broker, and the hosts that prove themselves to it.
type bench struct {
	dir    string
	broker *lab.Broker
	hosts  []*fleet.Host
	failed []string
}

func (b *bench) fail(format string, args ...any) {
	b.failed = append(b.failed, fmt.Sprintf(format, args...))
}

func run(ctx context.Context, scale float64) (err error) {
	dir, err := os.MkdirTemp("/var/tmp", "countersign-large-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{dir: dir}
	if err := b.begin(ctx); err != nil {
		return err
	}
	defer func() { _ = b.broker.Stop() }()
	say("an empty broker's lists")
	empty, err := b.verbs(ctx, lists)
	if err != nil {
		return err
	}
	if err := b.fill(ctx, "-scale", fmt.Sprint(scale)); err != nil {
		return err
	}
	say("the verbs, beside a host that proves itself")
	full, err := b.verbs(ctx, append(lists, others(dir)...))
	if err != nil {
		return err
	}
	b.table(os.Stdout, full, empty)
	if err := b.sweeps(ctx, int(overdue*scale)); err != nil {
		return err
	}
	if len(b.failed) > 0 {
		for _, f := range b.failed {
			fmt.Println("FAILED:", f)
		}
		return fmt.Errorf("%d limits don't hold", len(b.failed))
	}
	return nil
}

// begin starts a broker with the scopes of the filled store and of the fleet.
func (b *bench) begin(ctx context.Context) error {
	ca, err := lab.NewTPMCA(filepath.Join(b.dir, "tpmca"))
	if err != nil {
		return err
	}
	roots := filepath.Join(b.dir, "ek-roots.pem")
	root, intermediate := ca.PEM()
	if err := os.WriteFile(roots, append(root, intermediate...), 0o644); err != nil {
		return err
	}
	if b.broker, err = lab.NewBroker(ctx, filepath.Join(b.dir, "broker"), lab.BrokerOptions{EKRoots: []string{roots}, CA: `crl_every = "1h"`}); err != nil {
		return err
	}
	if err := b.broker.Start(ctx); err != nil {
		return err
	}
	program, err := lab.Program("fill", false)
	if err != nil {
		return err
	}
	scopes, err := exec.CommandContext(ctx, program, "-scopes").Output()
	if err != nil {
		return err
	}
	if err := b.broker.ApplyScopes(ctx, string(scopes)+fleet.Scope); err != nil {
		return err
	}
	const size = 8
	if b.hosts, err = fleet.Join(ctx, b.broker, ca, size); err != nil {
		return err
	}
	return b.connect(ctx)
}

func (b *bench) connect(ctx context.Context) error {
	return fleet.Each(b.hosts, func(h *fleet.Host) error {
		if err := h.Connect(ctx); err != nil || h.Lease != "" {
			return err
		}
		return h.Obtain(ctx)
	})
}

// fill stops the broker, writes into its store and starts it again.
func (b *bench) fill(ctx context.Context, args ...string) error {
	if err := b.broker.Stop(); err != nil {
		return err
	}
	program, err := lab.Program("fill", false)
	if err != nil {
		return err
	}
	began := time.Now()
	cmd := exec.CommandContext(ctx, program, append([]string{"-store", filepath.Join(b.broker.State(), "store.db")}, args...)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(b.broker.State(), "store.db"))
	if err != nil {
		return err
	}
	say("filled (%v) in %.0f s; the store has %d MiB", args, time.Since(began).Seconds(), info.Size()>>20)
	began = time.Now()
	if err := b.broker.Start(ctx); err != nil {
		return err
	}
	say("the broker started in %.2f s", time.Since(began).Seconds())
	return b.connect(ctx)
}

// A verb is a command line of an operator's.
type verb struct {
	name   string
	args   []string
	limit  int  // MiB of its own memory
	first  bool // a list's first page, to be held against an empty broker's
	atOnce int  // how many run at a time; 0: one
	spins  bool // keeps one core busy, and asks nobody anything
}

var lists = []verb{
	{"status", []string{"status"}, mostCLI, true, 0, false},
	{"host list, a page", []string{"host", "list", "--limit", "100"}, mostCLI, true, 0, false},
	{"host list -l, a page", []string{"host", "list", "-l", "role=role-03", "--limit", "100"}, mostCLI, false, 0, false},
	{"host list --sort proved, a page", []string{"host", "list", "--sort", "proved", "--limit", "100"}, mostCLI, true, 0, false},
	{"lease list, a page", []string{"lease", "list", "--limit", "100"}, mostCLI, true, 0, false},
	{"lease list --scope, a page", []string{"lease", "list", "--scope", "app-007", "--limit", "100"}, mostCLI, true, 0, false},
	{"lease list --state revoking", []string{"lease", "list", "--state", "revoking"}, mostCLI, true, 0, false},
	{"finding list, a page", []string{"finding", "list", "--limit", "100"}, mostCLI, true, 0, false},
}

func others(dir string) []verb {
	return []verb{
		{"lease list --state revoking, 8 at once", []string{"lease", "list", "--state", "revoking"}, mostCLI, false, 8, false},
		{"host list", []string{"host", "list"}, mostCLI, false, 0, false},
		{"lease list", []string{"lease", "list"}, mostCLI, false, 0, false},
		{"lease list -o json", []string{"lease", "list", "-o", "json"}, mostCLI, false, 0, false},
		{"finding list --status all -o json", []string{"finding", "list", "--status", "all", "-o", "json"}, mostCLI, false, 0, false},
		{"lease export", []string{"lease", "export"}, mostCLI, false, 0, false},
		{"reference show", []string{"reference", "show"}, mostCLI, false, 0, false},
		{"scope plan, one scope changed", []string{"scope", "plan", filepath.Join(dir, "one")}, mostCLI, false, 0, false},
		{"scope plan, all scopes changed", []string{"scope", "plan", filepath.Join(dir, "all")}, mostCLI, false, 0, false},
		{"scope apply, all scopes changed", []string{"scope", "apply", filepath.Join(dir, "all")}, mostCLI, false, 0, false},
		{"host import, 10,000 hosts", []string{"host", "import", "-f", filepath.Join(dir, "hosts.csv")}, mostCLI, false, 0, false},
		{"audit verify", []string{"audit", "verify"}, mostCLI, false, 0, false},
		{"fsck", []string{"fsck", "-c", filepath.Join(dir, "broker", "broker.hcl")}, mostFsck, false, 0, false},
		{"broker backup", []string{"broker", "backup", "-c", filepath.Join(dir, "broker", "broker.hcl"), filepath.Join(dir, "backup.db")}, mostFsck, false, 0, false},
	}
}

// A result is what a verb took.
type result struct {
	verb
	seconds float64
	memory  int // MiB, of the largest
	bytes   int64
	broker  int // MiB, at the most
	proofs  []float64
	code    int
}

// verbs runs each verb beside proofs, and once nothing: the first result.
func (b *bench) verbs(ctx context.Context, list []verb) ([]result, error) {
	if err := errors.Join(b.changedScopes(), b.newHosts()); err != nil {
		return nil, err
	}
	var results []result
	for _, v := range slices.Concat([]verb{{name: "nothing"}, {name: "nothing, one core busy with something else", spins: true}}, list) {
		say("%s", v.name)
		r, err := b.measure(ctx, v)
		if err != nil {
			return nil, err
		}
		results = append(results, r)
	}
	return results, nil
}

// newHosts writes a list of hosts that the broker doesn't know.
func (b *bench) newHosts() error {
	var list bytes.Buffer
	list.WriteString("name,ek_hash,labels,reference\n")
	for i := range 10_000 {
		fmt.Fprintf(&list, "new-%05d,%x,role=new,\n", i, sha256.Sum256(fmt.Append(nil, "new", i)))
	}
	return os.WriteFile(filepath.Join(b.dir, "hosts.csv"), list.Bytes(), 0o600)
}

// changedScopes writes two folders of scopes that differ from those in force: by one
// scope, and by all.
func (b *bench) changedScopes() error {
	text, err := os.ReadFile(filepath.Join(b.broker.Scopes(), "scopes.hcl"))
	if err != nil {
		return err
	}
	for name, changed := range map[string][]byte{
		"one": bytes.Replace(text, []byte(`"/opt/app-003/bin/app"`), []byte(`"/opt/app-003/bin/other"`), 1),
		"all": bytes.ReplaceAll(text, []byte(`grace   = "24h"`), []byte(`grace   = "23h"`)),
	} {
		dir := filepath.Join(b.dir, name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "scopes.hcl"), changed, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// idleFor is how long proofs are measured beside nothing.
const idleFor = 15 * time.Second

func (b *bench) measure(ctx context.Context, v verb) (result, error) {
	r := result{verb: v}
	during, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	var failed error
	group.Go(func() { r.proofs, failed = b.proofs(during) })
	group.Go(func() { r.broker = b.watchMemory(during) })
	began := time.Now()
	if v.spins {
		group.Go(func() {
			for during.Err() == nil {
			}
		})
	}
	err := b.command(ctx, v, &r)
	r.seconds = time.Since(began).Seconds()
	time.Sleep(300 * time.Millisecond) // at least a proof
	cancel()
	group.Wait()
	return r, errors.Join(err, failed)
}

// proofs has hosts prove themselves in turn, and returns what each took, in
// milliseconds.
func (b *bench) proofs(ctx context.Context) (took []float64, err error) {
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return took, nil
		case <-time.After(100 * time.Millisecond):
		}
		h := b.hosts[i%len(b.hosts)]
		began := time.Now()
		if err := h.Prove(context.WithoutCancel(ctx)); err != nil {
			return took, err
		}
		took = append(took, float64(time.Since(began).Microseconds())/1000)
	}
}

func (b *bench) watchMemory(ctx context.Context) (most int) {
	for {
		if now, _, err := fleet.Memory(b.broker.PID()); err == nil {
			most = max(most, now>>10)
		}
		select {
		case <-ctx.Done():
			return most
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// command runs a verb's command line.
func (b *bench) command(ctx context.Context, v verb, r *result) error {
	if len(v.args) == 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(idleFor):
			return nil
		}
	}
	program, err := lab.Program("countersign", false)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var group sync.WaitGroup
	for range max(v.atOnce, 1) {
		group.Go(func() {
			cmd := exec.CommandContext(ctx, program, append([]string{"--socket", filepath.Join(b.broker.State(), "operator.sock")}, v.args...)...)
			var out counter
			var stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &stderr
			err := cmd.Run()
			mu.Lock()
			defer mu.Unlock()
			r.bytes += int64(out)
			if cmd.ProcessState == nil {
				b.fail("%s: %v", v.name, err)
				return
			}
			r.code = max(r.code, cmd.ProcessState.ExitCode())
			r.memory = max(r.memory, int(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss>>10))
			if err != nil {
				b.fail("%s: %v: %s", v.name, err, bytes.TrimSpace(stderr.Bytes()))
			}
		})
	}
	group.Wait()
	return ctx.Err()
}

// A counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// table prints results and holds them against their limits.
func (b *bench) table(w io.Writer, results, empty []result) {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "VERB\tSECONDS\tEMPTY\tMiB\tOUTPUT KiB\tBROKER MiB\tPROOFS\tMEDIAN ms\tMAX ms\tOVER %d×\t\n", slow)
	idle := median(results[0].proofs)
	for _, r := range results {
		before := ""
		for _, e := range empty {
			if e.name == r.name && r.first {
				before = fmt.Sprintf("%.2f", e.seconds)
				if r.seconds > pageFactor*e.seconds {
					b.fail("%s: %.2f s, an empty broker takes %.2f s", r.name, r.seconds, e.seconds)
				}
			}
		}
		most, over := slices.Max(r.proofs), 0
		for _, took := range r.proofs {
			if took > slow*idle {
				over++
			}
		}
		fmt.Fprintf(t, "%s\t%.2f\t%s\t%d\t%d\t%d\t%d\t%.1f\t%.1f\t%d\t\n", r.name, r.seconds, before, r.memory, r.bytes>>10, r.broker, len(r.proofs), median(r.proofs), most, over)
		if r.limit > 0 && r.memory > r.limit {
			b.fail("%s: %d MiB, at most %d", r.name, r.memory, r.limit)
		}
		if r.broker > mostBroker {
			b.fail("%s: the broker had %d MiB, at most %d", r.name, r.broker, mostBroker)
		}
		if r.limit > 0 && most > blocked*idle {
			b.fail("%s: a proof took %.1f ms, the median of an idle broker is %.1f: it waited for the verb", r.name, most, idle)
		}
	}
	_ = t.Flush()
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// sweeps measures how fast due leases are revoked: alone, and while other hosts keep
// the broker busy.
func (b *bench) sweeps(ctx context.Context, n int) error {
	var rates [2]float64
	for i, busy := range []bool{false, true} {
		if err := b.fill(ctx, "-retire", strconv.Itoa(n)); err != nil {
			return err
		}
		rate, err := b.sweep(ctx, n, busy)
		if err != nil {
			return err
		}
		rates[i] = rate
	}
	fmt.Printf("%d due leases were revoked at %.0f/s alone, at %.0f/s while %d events a second came: %.2f of it\n", n, rates[0], rates[1], eventRate, rates[1]/rates[0])
	if rates[1] < sweepShare*rates[0] {
		b.fail("due leases are revoked at %.2f of the idle rate under events, at least %.2f", rates[1]/rates[0], sweepShare)
	}
	return nil
}

func (b *bench) sweep(ctx context.Context, n int, busy bool) (rate float64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events := make(chan error, 1)
	if busy {
		go func() { events <- b.events(ctx) }()
	}
	began := time.Now()
	first, err := b.ending(ctx)
	if err != nil {
		return 0, err
	}
	for left := first; left > 0; {
		select {
		case err := <-events:
			return 0, err
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		if left, err = b.ending(ctx); err != nil {
			return 0, err
		}
		if time.Since(began) > 10*time.Minute {
			return 0, fmt.Errorf("%d of %d due leases are not ended after ten minutes", left, n)
		}
	}
	// The sweeper began when the broker did, a moment before this looked.
	return float64(first) / time.Since(began).Seconds(), nil
}

// events has hosts prove themselves at a steady rate.
func (b *bench) events(ctx context.Context) error {
	ticker := time.NewTicker(time.Second / eventRate)
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := b.hosts[i%len(b.hosts)].Prove(context.WithoutCancel(ctx)); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

var leasesOf = regexp.MustCompile(`(?m)^countersign_leases\{state="(retiring|revoking)"\} (\d+)`)

// ending is how many leases wait for their end.
func (b *bench) ending(ctx context.Context) (n int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.broker.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = r.Body.Close() }()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, err
	}
	for _, m := range leasesOf.FindAllSubmatch(text, -1) {
		var one int
		if err := json.Unmarshal(m[2], &one); err != nil {
			return 0, err
		}
		n += one
	}
	return n, nil
}
