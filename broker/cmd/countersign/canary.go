package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"math/big"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/cli"
)

func canaryCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "canary", Short: "Decoy credentials; any use is a finding"}
	cmd.AddCommand(canaryIssueCommand(o), canaryListCommand(o), canaryRemoveCommand(o))
	return cmd
}

func canaryIssueCommand(o *options) *cobra.Command {
	req := &v1.IssueCanaryRequest{}
	cmd := &cobra.Command{
		Use: "issue --scope SCOPE", Short: "Make a user name and a password that look like a scope's, and open nothing",
		Long: `Makes a user name like those that the scope hands out, with a password, and prints both once, as the
fields that a program would read: write them into a file beside the real ones, a backup, an old config.
No database has the user. A login with it, a failed one too, is a critical finding of the watch.
The broker keeps the user name, and nobody the password.`,
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client(cmd.Context())
			if err != nil {
				return err
			}
			r, err := client.IssueCanary(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			c := r.Msg.GetCanary()
			out := struct {
				ID       string `json:"id"`
				Username string `json:"username"`
				Password string `json:"password"`
			}{c.GetId(), c.GetUsername(), likePassword()}
			fmt.Fprintf(cmd.ErrOrStderr(), "canary %s is set; `countersign canary remove %s` takes it away\n", out.ID, out.ID)
			return o.print(cmd.OutOrStdout(), out, func(w io.Writer) { fmt.Fprintf(w, "username=%s\npassword=%s\n", out.Username, out.Password) })
		},
	}
	cmd.Flags().StringVar(&req.Scope, "scope", "", "whose credentials it should look like")
	cmd.Flags().StringVar(&req.Username, "username", "", "the user name, where the scope's aren't random")
	_ = cmd.MarkFlagRequired("scope")
	return cmd
}

// likePassword is one as Vault makes them by default: twenty letters, digits and
// dashes, at least one of each kind.
func likePassword() string {
	kinds := []string{"abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "-"}
	all := strings.Join(kinds, "")
	for {
		b := make([]byte, 20)
		for i := range b {
			n, err := rand.Int(rand.Reader, big.NewInt(int64(len(all))))
			if err != nil {
				panic(err) // crypto/rand doesn't fail
			}
			b[i] = all[n.Int64()]
		}
		each := true
		for _, kind := range kinds {
			each = each && strings.ContainsAny(string(b), kind)
		}
		if each {
			return string(b)
		}
	}
}

func canaryListCommand(o *options) *cobra.Command {
	req := &v1.ListCanariesRequest{}
	cmd := &cobra.Command{Use: "list", Short: "List canaries", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ListCanaries(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			table(w, "ID SCOPE USERNAME ISSUED BY", func(row func(...any)) {
				for _, c := range r.Msg.GetCanaries() {
					row(c.GetId(), c.GetScope(), c.GetUsername(), stampText(c.GetIssued()), c.GetIssuedBy())
				}
			})
		})
	}}
	cmd.Flags().StringVar(&req.Scope, "scope", "", "of this scope")
	return cmd
}

func canaryRemoveCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "remove CANARY", Short: "Remove a canary; remove its file as well", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.RemoveCanary(cmd.Context(), connect.NewRequest(&v1.RemoveCanaryRequest{Canary: args[0]}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) { fmt.Fprintf(w, "canary %s is removed\n", args[0]) })
	}}
}
