// Command countersign is the servers' and operators' program: the broker, and
// the verbs that speak to it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/countersign/countersign/internal/terminal"
)

// version is set by the linker.
var version = "devel"

// Exit codes that scripts can use.
const (
	exitOK        = 0
	exitNo        = 1 // the answer is no: invalid, refused, a check failed
	exitUsage     = 2 // the command line is wrong
	exitUnreach   = 3 // the broker, or Vault, can't be reached or failed
	exitNotProven = 4 // appraise: nothing failed, and nothing proves what was given
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends what doesn't heed the first
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// An exitError is an error with an exit code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(terminal.Writer{W: stderr}, "countersign:", message(err))
	var exit *exitError
	var remote *connect.Error
	switch {
	case errors.As(err, &exit):
		return exit.code
	case strings.HasPrefix(err.Error(), "unknown command"), strings.HasPrefix(err.Error(), "required flag"):
		return exitUsage
	case errors.As(err, &remote) && (remote.Code() == connect.CodeUnavailable || remote.Code() == connect.CodeInternal || remote.Code() == connect.CodeUnknown):
		return exitUnreach
	}
	return exitNo
}

// message is an error as a person wants it: of a broker's answer, its words.
func message(err error) string {
	var remote *connect.Error
	if errors.As(err, &remote) && remote.Code() != connect.CodeUnavailable {
		return remote.Message()
	}
	return err.Error()
}

func rootCommand() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:           "countersign",
		Short:         "Credentials that machines and programs earn",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitUsage, err} })
	o.flags(root)
	root.AddCommand(brokerCommand(o), hostCommand(o), ekRootsCommand(o), operatorCommand(o), joinTokenCommand(o), referenceCommand(o), releaseCommand(o), scopeCommand(o), appraiseCommand(o),
		whyCommand(o), leaseCommand(o), watchCommand(o), findingCommand(o), canaryCommand(o), auditCommand(o), vaultCommand(o), fsckCommand(o), configCommand(o), statusCommand(o))
	for _, sub := range root.Commands() {
		strict(sub)
	}
	return root
}

// strict has a command that only groups others refuse what is none of them;
// cobra would print its help and succeed.
func strict(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
	if !cmd.HasSubCommands() || cmd.Runnable() {
		return
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return &exitError{exitUsage, fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())}
		}
		return cmd.Help()
	}
}
