// Command largelog has the watch catch up with a long log of PostgreSQL, csvlog, of which
// three lines in ten are completed logins by accounts that nobody knows: each of them
// could be one that the broker issued just now. An account that only the broker hands
// out logs in at the beginning and at the end, and an issued credential from a strange
// address in the middle.
//
// The watch is ended on the way, as by SIGTERM, and goes on. Nothing may be dropped,
// everything has to be found, once.
//
//	go run ./test/bench/largelog -bytes 2G
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/countersign/countersign/compensating/watch"
	"github.com/countersign/countersign/test/fakebroker"
)

func main() {
	size := flag.String("bytes", "100M", "the size of the log; K, M and G are 1000 of each other")
	dir := flag.String("dir", "/var/tmp", "a folder on a disk")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	n, err := parse(*size)
	if err == nil {
		var r Result
		if r, err = Run(ctx, *dir, n); err == nil {
			err = r.print(os.Stdout)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "largelog:", err)
		os.Exit(1)
	}
}

func parse(size string) (int64, error) {
	unit := int64(1)
	for i, letter := range "KMG" {
		if rest, ok := strings.CutSuffix(size, string(letter)); ok {
			size = rest
			for range i + 1 {
				unit *= 1000
			}
		}
	}
	n, err := strconv.ParseInt(size, 10, 64)
	return n * unit, err
}

// A Result is what was measured.
type Result struct {
	Bytes, Lines, Logins int64

	Took     time.Duration // from the start to the end of the log, judged
	Ended    time.Duration // from the signal to the end, in the middle
	Resident int64         // bytes, at most
	Written  int64         // bytes, to the state's file
	Dropped  int64
	Found    map[string]uint64 // how often, by detector and account
}

// wanted is what there is to find.
var wanted = []string{"unmatched-login svc-early", "unmatched-login svc-late", "foreign-source " + issued}

const issued = "v-token-co-billing-abcdefghijklmnopqrst-1772366400"

func (r Result) print(out io.Writer) error {
	rate := float64(r.Bytes) / r.Took.Seconds() / 1e6
	fmt.Fprintf(out, "log         %d bytes, %d lines, %d logins\n", r.Bytes, r.Lines, r.Logins)
	fmt.Fprintf(out, "read        in %.1f s (%.0f MB/s)\n", r.Took.Seconds(), rate)
	fmt.Fprintf(out, "ended       %.2f s after the signal, in the middle\n", r.Ended.Seconds())
	fmt.Fprintf(out, "resident    %.0f MiB at most\n", float64(r.Resident)/(1<<20))
	fmt.Fprintf(out, "state       %.1f MB written, %.3f of the log\n", float64(r.Written)/1e6, float64(r.Written)/float64(r.Bytes))
	fmt.Fprintf(out, "dropped     %d\n", r.Dropped)
	var failed error
	if r.Dropped != 0 {
		failed = fmt.Errorf("%d were dropped", r.Dropped)
	}
	if r.Ended > 2*time.Second {
		failed = errors.Join(failed, fmt.Errorf("it ended after %v", r.Ended))
	}
	for _, name := range wanted {
		fmt.Fprintf(out, "found       %s: %d\n", name, r.Found[name])
		if r.Found[name] != 1 {
			failed = errors.Join(failed, fmt.Errorf("%s was found %d times", name, r.Found[name]))
		}
	}
	if len(r.Found) != len(wanted) {
		failed = errors.Join(failed, fmt.Errorf("found %v", r.Found))
	}
	return failed
}

// Run writes a log of so many bytes into a folder of dir, and has the watch read it.
func Run(ctx context.Context, dir string, bytes int64) (r Result, err error) {
	if dir, err = os.MkdirTemp(dir, "countersign-largelog-"); err != nil {
		return r, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	log := filepath.Join(dir, "postgresql.csv")
	if r.Bytes, r.Lines, r.Logins, err = write(log, bytes); err != nil {
		return r, err
	}

	b, err := fakebroker.Start()
	if err != nil {
		return r, err
	}
	defer b.Close()
	if err := b.Issue(fakebroker.Lease("L1", issued, "10.0.0.1", start)); err != nil {
		return r, err
	}
	debug.SetGCPercent(20) // as the program does
	w := &run{dir: dir, log: log, broker: b}
	begin := time.Now()

	// The first half.
	if err := w.start(ctx); err != nil {
		return r, err
	}
	if err := w.until(ctx, r.Lines/2); err != nil {
		return r, err
	}
	r.Dropped, r.Written = w.metric("countersign_watch_sightings_dropped_total"), w.metric("countersign_watch_state_written_bytes")
	ended := time.Now()
	if err := w.stop(); err != nil {
		return r, err
	}
	r.Ended = time.Since(ended)

	// The rest, and until all of it was judged and told.
	if err := w.start(ctx); err != nil {
		return r, err
	}
	if err := w.until(ctx, r.Lines); err != nil {
		return r, err
	}
	for read := time.Now(); w.metric("countersign_watch_sightings_held") != 0 || len(b.Findings()) < len(wanted) && time.Since(read) < 30*time.Second; {
		if err := pause(ctx); err != nil {
			return r, err
		}
	}
	r.Took = time.Since(begin)
	r.Dropped += w.metric("countersign_watch_sightings_dropped_total")
	r.Written += w.metric("countersign_watch_state_written_bytes")
	if err := w.stop(); err != nil {
		return r, err
	}
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		return r, err
	}
	r.Resident, r.Found = use.Maxrss<<10, map[string]uint64{}
	for name, f := range b.Findings() {
		r.Found[name] = f.GetCount()
	}
	return r, nil
}

// A run is a watch that is started and ended.
type run struct {
	dir, log string
	broker   *fakebroker.Broker
	metrics  string
	cancel   context.CancelFunc
	done     chan error
}

func (w *run) start(ctx context.Context) error {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	w.metrics = free.Addr().String()
	if err := free.Close(); err != nil {
		return err
	}
	c := &watch.Config{StateDir: filepath.Join(w.dir, "state"), MetricsListen: w.metrics, Governed: []string{"svc-*"},
		Sensors: []watch.Sensor{{Kind: "postgres-csv", Name: "db", Path: w.log}}}
	service, err := watch.Open(c, w.broker.Dial, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})), time.Now)
	if err != nil {
		return err
	}
	ctx, w.cancel = context.WithCancel(ctx)
	w.done = make(chan error, 1)
	go func() {
		err := service.Run(ctx)
		service.Close()
		w.done <- err
	}()
	return nil
}

func (w *run) stop() error {
	w.cancel()
	return <-w.done
}

// until waits until so many lines were read.
func (w *run) until(ctx context.Context, lines int64) error {
	for w.metric(`countersign_watch_sensor_lines{sensor="db"}`) < lines {
		select {
		case err := <-w.done:
			return fmt.Errorf("the watch ended: %w", err)
		default:
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return errors.New("interrupted")
	case <-time.After(100 * time.Millisecond):
		return nil
	}
}

// metric is the value of a series; -1 where there is none yet.
func (w *run) metric(series string) int64 {
	a, err := http.Get("http://" + w.metrics + "/metrics")
	if err != nil {
		return -1
	}
	defer func() { _ = a.Body.Close() }()
	for lines := bufio.NewScanner(a.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return -1
			}
			return int64(f)
		}
	}
	return -1
}

// start is the time of the log's first line.
var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// write makes the log.
func write(path string, bytes int64) (size, lines, logins int64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, 0, 0, err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	statement := strings.Repeat("SELECT amount, currency, due FROM invoices WHERE customer = 4711 AND paid IS NULL; ", 3)
	login := func(account, from string) {
		at := start.Add(time.Duration(lines) * time.Millisecond)
		n, _ := fmt.Fprintf(w, "%s,\"%s\",\"billing\",%d,\"%s:4000\",%x.%x,2,\"authentication\",%s,3/2,0,LOG,00000,\"connection authorized: user=%s database=billing application_name=billingd\",,,,,,,,,\"billingd\",\"client backend\",,0\n",
			at.Format("2006-01-02 15:04:05.000 UTC"), account, 1000+lines%30_000, from, start.Unix(), lines, at.Format("2006-01-02 15:04:05 UTC"), account)
		size, lines, logins = size+int64(n), lines+1, logins+1
	}
	record := func() {
		at := start.Add(time.Duration(lines) * time.Millisecond)
		n, _ := fmt.Fprintf(w, "%s,\"app\",\"billing\",%d,\"10.0.0.9:4000\",%x.1,7,\"SELECT\",%s,3/7,0,LOG,00000,\"duration: 1.042 ms  statement: %s\",,,,,,,,,\"billingd\",\"client backend\",,0\n",
			at.Format("2006-01-02 15:04:05.000 UTC"), 7, start.Unix(), start.Format("2006-01-02 15:04:05 UTC"), statement)
		size, lines = size+int64(n), lines+1
	}
	stolen := false
	for size < bytes {
		switch {
		case lines == 10:
			login("svc-early", "10.0.0.9")
		case size > bytes/2 && !stolen:
			stolen = true
			login(issued, "10.6.6.6")
		case lines%10 < 3:
			login(fmt.Sprintf("app%d", lines), fmt.Sprintf("10.1.%d.%d", lines>>8&255, lines&255))
		default:
			record()
		}
	}
	login("svc-late", "10.0.0.9")
	for range 4000 { // which settle it, by the log's clock
		record()
	}
	return size, lines, logins, errors.Join(w.Flush(), f.Close())
}
