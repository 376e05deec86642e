package cli_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/internal/cli"
)

func TestExitCodes(t *testing.T) {
	for want, lines := range map[int][][]string{
		0:         {{"group", "leaf", "x"}, {"group"}, {"--help"}},
		cli.No:    {{"group", "leaf", "no"}},
		cli.Usage: {{"nothing"}, {"group", "nothing"}, {"group", "leaf"}, {"group", "leaf", "a", "b"}, {"group", "leaf", "x", "--no-such"}, {"group", "needy"}},
		7:         {{"group", "leaf", "seven"}},
	} {
		for _, line := range lines {
			group := &cobra.Command{Use: "group"}
			group.AddCommand(&cobra.Command{Use: "leaf", Args: cli.Exactly(1), RunE: func(_ *cobra.Command, args []string) error {
				switch args[0] {
				case "no":
					return errors.New("no")
				case "seven":
					return fmt.Errorf("wrapped: %w", cli.Fail(7, errors.New("seven")))
				}
				return nil
			}})
			needy := &cobra.Command{Use: "needy", RunE: func(*cobra.Command, []string) error { return nil }}
			needy.Flags().String("flag", "", "")
			_ = needy.MarkFlagRequired("flag")
			group.AddCommand(needy)
			root := &cobra.Command{Use: "program"}
			root.AddCommand(group)
			cli.Prepare(root)
			root.SetArgs(line)
			root.SetOut(io.Discard)
			root.SetErr(io.Discard)
			if err := root.Execute(); cli.Code(err) != want {
				t.Errorf("%q exits with %d, want %d: %v", line, cli.Code(err), want, err)
			}
		}
	}
}
