// Command demo shows the main job, end to end: a legacy program gets in with a
// credential that its machine and its process earned, and loses it. Each line
// rests on somebody else's word: PostgreSQL's, openssl's, Vault's, systemd's.
//
// With KEEP=1 everything stays up until Ctrl-C, and it says how to look around.
// -break STEP spoils one step on purpose, so that a test can see it fail.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	spoil := flag.String("break", "", "spoil this step")
	list := flag.Bool("list", false, "list the steps")
	flag.Parse()
	if *list {
		for _, s := range steps {
			fmt.Println(s.key)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, *spoil, os.Getenv("KEEP") == "1"); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// A step shows one thing.
type step struct {
	key  string // for -break
	what string
	run  func(context.Context, *demo) (detail string, err error)
	// spoil does what makes the step fail, through the same doors that an
	// accident would take.
	spoil func(context.Context, *demo) error
}

// stepTime bounds one step.
const stepTime = 3 * time.Minute

func run(ctx context.Context, out io.Writer, spoil string, keep bool) (err error) {
	d, err := newDemo()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	passed, failed := 0, 0
	for _, s := range steps {
		if spoil != "" && spoil != s.key && slow[s.key] {
			continue // what is to be seen needs not wait for it
		}
		start := time.Now()
		detail, err := one(ctx, d, s, spoil)
		if err != nil {
			failed++
			fmt.Fprintf(out, "failed  %6.1fs  %s: %v\n", time.Since(start).Seconds(), s.what, strings.Join(strings.Fields(err.Error()), " "))
			break // what follows stands on it
		}
		passed++
		if detail != "" {
			detail = ": " + detail
		}
		fmt.Fprintf(out, "ok      %6.1fs  %s%s\n", time.Since(start).Seconds(), s.what, detail)
	}
	if keep && ctx.Err() == nil {
		d.lookAround(out)
		<-ctx.Done()
	}
	fmt.Fprintf(out, "demo: %d passed, %d failed\n", passed, failed)
	if failed > 0 || passed < len(steps) {
		return errors.New("not everything was shown")
	}
	return nil
}

// slow are the steps that wait for a credential's life to pass.
var slow = map[string]bool{"rotation": true, "sealed": true}

func one(ctx context.Context, d *demo, s step, spoil string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	if spoil == s.key {
		if err := s.spoil(ctx, d); err != nil {
			return "", fmt.Errorf("spoiling: %w", err)
		}
	}
	return s.run(ctx, d)
}
