package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/hostagent/internal/doctor"
	"github.com/countersign/countersign/internal/cli"
)

func doctorCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "doctor", Short: "Say what of TPM, firmware, IMA, time, network, privileges and config is wrong or missing", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		r := doctor.Examine(cmd.Context(), o.config)
		w := cmd.OutOrStdout()
		if o.output == "json" {
			if err := json.NewEncoder(w).Encode(r); err != nil {
				return err
			}
		} else {
			t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
			for _, f := range r.Findings {
				fmt.Fprintf(t, "%s\t%s\t%s\n", f.Result, f.Check, f.Detail)
				if f.Mend != "" {
					fmt.Fprintf(t, "\t\t→ %s\n", f.Mend)
				}
			}
			if err := t.Flush(); err != nil {
				return err
			}
			if len(r.EKHashes) > 0 {
				fmt.Fprintln(w, "\nany of these registers the host, by countersign host add NAME --ek-hash …")
			}
			for _, h := range r.EKHashes {
				fmt.Fprintln(w, " ", h)
			}
		}
		if !r.Healthy() {
			return errors.New("what is marked wrong keeps the agent from working")
		}
		return nil
	}}
}
