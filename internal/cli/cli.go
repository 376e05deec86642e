// Package cli is what the command lines of both programs have in common: how they end,
// what arguments they take, and how they log.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes that scripts can use; a program may have more, from 3 on.
const (
	No    = 1 // it failed, or the answer is no
	Usage = 2 // the command line is wrong
)

// Main runs a program until it ends or a signal asks it to, and exits with what run
// returns. A second signal ends what doesn't heed the first.
func Main(run func(ctx context.Context, args []string, stdout, stderr io.Writer) int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// An Exit is an error with an exit code of its own.
type Exit struct {
	Code int
	err  error
}

func (e *Exit) Error() string { return e.err.Error() }

func (e *Exit) Unwrap() error { return e.err }

// Fail is err with an exit code.
func Fail(code int, err error) error { return &Exit{code, err} }

// Code is the exit code of a command's error: its own, Usage for what cobra says of the
// command line, or else No.
func Code(err error) int {
	var exit *Exit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	case strings.HasPrefix(err.Error(), "unknown command"), strings.HasPrefix(err.Error(), "required flag"):
		return Usage
	}
	return No
}

// Prepare has a root command leave errors to its caller, give usage's exit code for wrong
// flags, and refuse words that are no command where cobra would print its help and succeed.
func Prepare(root *cobra.Command) {
	root.SilenceUsage, root.SilenceErrors = true, true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Fail(Usage, err) })
	for _, sub := range root.Commands() {
		strict(sub)
	}
}

func strict(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
	if !cmd.HasSubCommands() || cmd.Runnable() {
		return
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return Fail(Usage, fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath()))
		}
		return cmd.Help()
	}
}

// Exactly is cobra.ExactArgs with usage's exit code.
func Exactly(n int) cobra.PositionalArgs {
	return args(func(have int) bool { return have == n })
}

// AtMost is cobra.MaximumNArgs with usage's exit code.
func AtMost(n int) cobra.PositionalArgs {
	return args(func(have int) bool { return have <= n })
}

// AtLeast is cobra.MinimumNArgs with usage's exit code.
func AtLeast(n int) cobra.PositionalArgs {
	return args(func(have int) bool { return have >= n })
}

func args(good func(n int) bool) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if !good(len(args)) {
			return Fail(Usage, fmt.Errorf("usage: %s", cmd.UseLine()))
		}
		return nil
	}
}

// Log writes a program's log as format says: "json", or text.
func Log(format string, w io.Writer) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}
