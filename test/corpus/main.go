// Command corpus writes logs as PostgreSQL, sshd, Vault, Windows and others write
// them, with honest and guilty stories mixed, lets `countersign watch replay` read
// them, and counts what it found, missed and made up.
//
// It imports nothing of the watch and was written from what the detectors promise,
// not from how they look for it; where it and the watch differ, either may be wrong.
// A seed is drawn at every run and printed: the same seed writes the same bytes. Its
// first digits are the day it was drawn on, since syslog's short times have no year.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"time"
)

// perDay leaves a seed six digits of chance after the day.
const perDay = 1_000_000

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ok, err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "corpus:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

// run says whether every detector reached the floor.
func run(ctx context.Context, args []string, stdout io.Writer) (bool, error) {
	flags := flag.NewFlagSet("corpus", flag.ExitOnError)
	seed := flags.Uint64("seed", 0, "a seed that an earlier run printed (default: drawn)")
	stories := flags.Int("stories", 600, "how many stories")
	dir := flags.String("dir", "", "where to write (default: a temporary directory)")
	keep := flags.Bool("keep", false, "leave the files where they are")
	if err := flags.Parse(args); err != nil {
		return false, err
	}
	if *seed == 0 {
		*seed = uint64(time.Now().Unix()/86400)*perDay + rand.Uint64N(perDay)
	}
	if *stories < 1 || *stories > 100_000 {
		return false, fmt.Errorf("-stories %d: 1 to 100000", *stories)
	}
	if *dir == "" {
		made, err := os.MkdirTemp("", "countersign-corpus-")
		if err != nil {
			return false, err
		}
		*dir = made
		if !*keep {
			defer func() { _ = os.RemoveAll(made) }()
		}
	} else if err := os.MkdirAll(*dir, 0o755); err != nil {
		return false, err
	}
	w := newWorld(*seed, *stories)
	sources, err := w.write(*dir)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(stdout, "seed %d: %d stories, %d leases, %d hosts, %d logs\n", *seed, len(w.labels), len(w.ledger), w.hosts, len(sources))
	if *keep {
		fmt.Fprintln(stdout, "kept in", *dir)
	}
	found, err := replay(ctx, filepath.Join(*dir, ledgerFile), sources)
	if err != nil {
		return false, err
	}
	return report(stdout, score(w.labels, found)), nil
}
