// Command countersign is the servers' and operators' program: the broker, and
// the verbs that speak to it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/terminal"
)

// version is set by the linker.
var version = "devel"

// Exit codes beside those of package cli.
const (
	exitUnreach   = 3 // the broker, or Vault, can't be reached or failed
	exitNotProven = 4 // appraise: nothing failed, and nothing proves what was given
)

func main() { cli.Main(run) }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(terminal.Writer{W: stderr}, "countersign:", message(err))
	var own *cli.Exit
	var remote *connect.Error
	if code := cli.Code(err); code != cli.No || errors.As(err, &own) || !errors.As(err, &remote) {
		return code
	}
	switch remote.Code() {
	case connect.CodeUnavailable, connect.CodeInternal, connect.CodeUnknown:
		return exitUnreach
	}
	return cli.No
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
		Use:     "countersign",
		Short:   "Credentials that machines and programs earn",
		Version: version,
	}
	o.flags(root)
	root.AddCommand(brokerCommand(o), hostCommand(o), ekRootsCommand(o), operatorCommand(o), joinTokenCommand(o), referenceCommand(o), releaseCommand(o), scopeCommand(o), appraiseCommand(o),
		whyCommand(o), leaseCommand(o), watchCommand(o), findingCommand(o), canaryCommand(o), auditCommand(o), vaultCommand(o), fsckCommand(o), configCommand(o), statusCommand(o))
	cli.Prepare(root)
	return root
}
