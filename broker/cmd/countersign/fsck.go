package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/ops/fsck"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
)

func configCommand(_ *options) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "The broker's config file"}
	var file string
	check := &cobra.Command{Use: "check [FILE]", Short: "Report every mistake in a config file", Args: cli.AtMost(1), RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			file = args[0]
		}
		if _, err := config.Load(file); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s is valid\n", file)
		return nil
	}}
	check.Flags().StringVarP(&file, "config", "c", defaultConfig, "the broker's config file")
	cmd.AddCommand(check)
	return cmd
}

func fsckCommand(o *options) *cobra.Command {
	var file string
	cmd := &cobra.Command{Use: "fsck", Short: "Check store and audit log against the invariants, read-only", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(file)
		if err != nil {
			return err
		}
		s, err := store.OpenReadOnly(c.StoreFile())
		if err != nil {
			return err
		}
		defer func() { _ = s.Close() }()
		p := newProgress(cmd.ErrOrStderr())
		report, err := fsck.Check(cmd.Context(), s, faults.Now(), p.show)
		p.end()
		if err != nil {
			return err
		}
		if o.output == "json" {
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(report); err != nil {
				return err
			}
		} else {
			for _, v := range report.Violations {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", v.Invariant, v.Detail)
			}
			if more := report.Total - len(report.Violations); more > 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "and %d more\n", more)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d records, %d leases, %d hosts checked\n", report.Records, report.Leases, report.Hosts)
		}
		if report.Total > 0 {
			return no("%d violations", report.Total)
		}
		return nil
	}}
	cmd.Flags().StringVarP(&file, "config", "c", defaultConfig, "the broker's config file")
	return cmd
}
