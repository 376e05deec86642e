// Package cli contains what the command lines of both programs share: exit codes, checks
// of arguments, signals and logging.
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
	No    = 1 // the command failed, or its answer is no
	Usage = 2 // the command line is wrong
)

// Main calls run and exits with the code that it returns. SIGINT and SIGTERM cancel ctx; a
// second signal kills the process.
func Main(run func(ctx context.Context, args []string, stdout, stderr io.Writer) int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// An Exit is an error with an exit code.
type Exit struct {
	Code int
	err  error
}

func (e *Exit) Error() string { return e.err.Error() }

func (e *Exit) Unwrap() error { return e.err }

// Fail returns err with an exit code.
func Fail(code int, err error) error { return &Exit{code, err} }

// Code returns the exit code for the error of a command: 0 for nil, the code of an [Exit],
// Usage for cobra's own errors, and No for all others.
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

// Prepare configures a root command: it prints no errors itself, wrong flags have the exit
// code Usage, and an unknown subcommand is an error, for which cobra would print help and
// succeed.
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

// Exactly is cobra.ExactArgs with the exit code Usage.
func Exactly(n int) cobra.PositionalArgs {
	return args(func(have int) bool { return have == n })
}

// AtMost is cobra.MaximumNArgs with the exit code Usage.
func AtMost(n int) cobra.PositionalArgs {
	return args(func(have int) bool { return have <= n })
}

// AtLeast is cobra.MinimumNArgs with the exit code Usage.
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

// Log returns a logger that writes JSON if format is "json", and text otherwise.
func Log(format string, w io.Writer) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}
