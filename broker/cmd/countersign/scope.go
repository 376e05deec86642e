package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/hclread"
)

func scopeCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "scope", Short: "Say who may have which credential"}
	cmd.AddCommand(scopeValidateCommand(o), scopeSendCommand(o, true), scopeSendCommand(o, false), scopeFactsCommand(o))
	return cmd
}

func scopeValidateCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "validate DIR", Short: "Check a folder of scopes without a broker", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		files, err := policy.LoadDir(args[0])
		if err != nil {
			return err
		}
		set, err := issuers.Parse(files)
		var problems hclread.Problems
		if o.output == "json" && (err == nil || errors.As(err, &problems)) {
			out := map[string]any{"valid": err == nil}
			if err != nil {
				out["problems"] = map[string]any{"list": problems}
			}
			if encodeErr := json.NewEncoder(cmd.OutOrStdout()).Encode(out); encodeErr != nil {
				return encodeErr
			}
			if err != nil {
				return no("the scopes are not valid")
			}
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%d scopes are valid\n", len(set.Scopes()))
		return nil
	}}
}

// scopeSendCommand is plan and apply: the same question, once without doing it.
func scopeSendCommand(o *options, planOnly bool) *cobra.Command {
	use, short := "apply DIR", "Put a folder of scopes in force, as a whole"
	if planOnly {
		use, short = "plan DIR", "Show what applying a folder of scopes would change, and for which leases"
	}
	return &cobra.Command{Use: use, Short: short, Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		files, err := policy.LoadDir(args[0])
		if err != nil {
			return err
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		req := &v1.ApplyScopesRequest{PlanOnly: planOnly}
		for _, f := range files {
			req.Files = append(req.Files, &v1.File{Name: f.Name, Content: f.Content})
		}
		stop := newProgress(cmd.ErrOrStderr()).waits("the broker holds live leases against the new scopes")
		r, err := client.ApplyScopes(cmd.Context(), connect.NewRequest(req))
		stop()
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			for _, c := range r.Msg.GetChanges() {
				if c.GetChange() != "same" {
					fmt.Fprintf(w, "%-8s scope %s\n", c.GetChange(), c.GetScope())
				}
			}
			for _, l := range r.Msg.GetLeases() {
				fmt.Fprintf(w, "%-8s lease %s of scope %s on host %s: %s\n", l.GetChange(), l.GetLeaseId(), l.GetScope(), l.GetHost(), l.GetReason())
			}
			if more := r.Msg.GetLoses() - uint64(len(r.Msg.GetLeases())); more > 0 {
				fmt.Fprintf(w, "loses    %d more leases\n", more)
			}
			fmt.Fprintf(w, "%d live leases are kept, %d lost\n", r.Msg.GetKeeps(), r.Msg.GetLoses())
			if !planOnly {
				fmt.Fprintf(w, "version %d is in force\n", r.Msg.GetVersion())
			}
		})
	}}
}

func scopeFactsCommand(o *options) *cobra.Command {
	req := &v1.FactsRequest{}
	cmd := &cobra.Command{Use: "facts --host HOST", Short: "Show what scopes can say of a host", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.Facts(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		var facts any
		if err := json.Unmarshal(r.Msg.GetJson(), &facts); err != nil {
			return err
		}
		e := json.NewEncoder(cmd.OutOrStdout())
		if o.output == "text" {
			e.SetIndent("", "  ")
		}
		return e.Encode(facts)
	}}
	cmd.Flags().StringVar(&req.Host, "host", "", "id or name")
	cmd.Flags().StringVar(&req.Scope, "scope", "", "show the risk of the host's programs in this scope")
	_ = cmd.MarkFlagRequired("host")
	return cmd
}

func whyCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "why HOST SCOPE", Short: "Explain what a scope says of a host's program: each selector, and what it saw", Args: cli.Exactly(2), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.Why(cmd.Context(), connect.NewRequest(&v1.WhyRequest{Host: args[0], Scope: args[1]}))
		if err != nil {
			return err
		}
		if err := o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			fmt.Fprintf(w, "%s under policy version %d, on evidence of %s\n", r.Msg.GetOutcome(), r.Msg.GetPolicyVersion(), stampText(r.Msg.GetAt()))
			table(w, "RESULT SELECTOR WANTED SAW", func(row func(...any)) {
				for _, s := range r.Msg.GetSelectors() {
					row(s.GetResult(), s.GetName(), s.GetWanted(), s.GetSaw())
				}
			})
			if r.Msg.GetReason() != "" {
				fmt.Fprintln(w, r.Msg.GetReason())
			}
			pcrText(w, pcrsOf(r.Msg))
		}); err != nil {
			return err
		}
		if !r.Msg.GetAllowed() {
			return no("%s is %s scope %s", args[0], r.Msg.GetOutcome(), args[1])
		}
		return nil
	}}
}

// pcrsOf is what the broker made of each PCR.
func pcrsOf(r *v1.WhyResponse) (list []boot.PCR) {
	for _, m := range r.GetPcrs() {
		p := boot.PCR{Index: int(m.GetIndex()), Events: int(m.GetEvents()), Proven: m.GetProven(), Understood: m.GetUnderstood(), NotUnderstood: int(m.GetNotUnderstood()), Facts: m.GetFacts()}
		if l := m.GetLimit(); l != nil {
			p.Limit = &boot.Limit{Event: int(l.GetEvent()), Type: l.GetType(), Why: l.GetWhy()}
		}
		list = append(list, p)
	}
	return list
}

func countsText(counts map[string]uint64) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[k], k))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
