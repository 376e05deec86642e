package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/terminal"
)

func leaseCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "lease", Short: "Show and revoke what was issued"}
	cmd.AddCommand(leaseListCommand(o), leaseShowCommand(o), leaseRevokeCommand(o), leaseExportCommand(o))
	return cmd
}

// eachLease calls f for every lease that p leaves of a list, page by page, and returns
// where the list goes on.
func eachLease(ctx context.Context, o *options, req *v1.ListLeasesRequest, p paging, f func(*v1.Lease) error) (next string, err error) {
	client, err := o.client(ctx)
	if err != nil {
		return "", err
	}
	return p.walk(func(limit uint32, after string) (int, string, error) {
		req.Limit, req.After = limit, after
		r, err := client.ListLeases(ctx, connect.NewRequest(req))
		if err != nil {
			return 0, "", err
		}
		for _, l := range r.Msg.GetLeases() {
			if err := f(l); err != nil {
				return 0, "", err
			}
		}
		return len(r.Msg.GetLeases()), r.Msg.GetNext(), nil
	})
}

// Orders of lists by time.
const (
	newest = "newest"
	oldest = "oldest"
)

// sortFlag adds --sort for a list by time, the newest first unless it says otherwise.
func sortFlag(cmd *cobra.Command, sort *string, by string) {
	cmd.Flags().StringVar(sort, "sort", newest, "newest or oldest first, by "+by)
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions([]string{newest, oldest}, cobra.ShellCompDirectiveNoFileComp))
}

func newestFirst(sort string) (bool, error) {
	if sort != newest && sort != oldest {
		return false, cli.Fail(cli.Usage, fmt.Errorf("--sort %s: use newest or oldest", sort))
	}
	return sort == newest, nil
}

func leaseListCommand(o *options) *cobra.Command {
	req := &v1.ListLeasesRequest{}
	var p paging
	var sort string
	cmd := &cobra.Command{Use: "list", Short: "List leases whose end is not confirmed", Example: `  countersign lease list --state revoking
  countersign lease list --scope billing-db --limit 20
  countersign lease list --host web-3 --all --sort oldest -o json`, Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) (err error) {
		if req.Newest, err = newestFirst(sort); err != nil {
			return err
		}
		list := o.listing(cmd, "leases", "ID HOST SCOPE KIND STATE EXPIRES NOTE")
		next, err := eachLease(cmd.Context(), o, req, p, func(l *v1.Lease) error {
			note := l.GetReason()
			if l.GetLastError() != "" {
				note = fmt.Sprintf("%s; attempt %d: %s", note, l.GetAttempts(), l.GetLastError())
			}
			return list.row(l, l.GetId(), l.GetHostName(), l.GetScope(), l.GetKind(), l.GetState(), stampText(l.GetExpires()), note)
		})
		if err != nil {
			return err
		}
		return list.end(next)
	}}
	cmd.Flags().StringVar(&req.Host, "host", "", "of this host")
	cmd.Flags().StringVar(&req.Scope, "scope", "", "of this scope")
	cmd.Flags().StringVar(&req.State, "state", "", "intended, provisional, live, retiring, revoking or gone")
	cmd.Flags().BoolVar(&req.Ended, "all", false, "also the ones that are gone")
	sortFlag(cmd, &sort, "the time of issue")
	p.flags(cmd)
	return cmd
}

func leaseShowCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "show LEASE", Short: "Show one lease", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		_, err := eachLease(cmd.Context(), o, &v1.ListLeasesRequest{Lease: args[0]}, paging{}, func(l *v1.Lease) error {
			return o.show(cmd.OutOrStdout(), l, func(w io.Writer) {
				for _, line := range [][2]string{
					{"id", l.GetId()}, {"host", l.GetHost()}, {"scope", l.GetScope()}, {"kind", l.GetKind()}, {"state", l.GetState()}, {"reason", l.GetReason()},
					{"names", labelsText(l.GetNames())}, {"sources", strings.Join(l.GetSources(), " ")}, {"audience", strings.Join(l.GetAudience(), " ")},
					{"issued", stampText(l.GetIssued())}, {"expires", stampText(l.GetExpires())}, {"ended", stampText(l.GetRevoked())}, {"subject", string(l.GetSubject())},
				} {
					fmt.Fprintf(w, "%-9s %s\n", line[0], line[1])
				}
			})
		})
		return err
	}}
}

func leaseRevokeCommand(o *options) *cobra.Command {
	req := &v1.RevokeLeasesRequest{}
	cmd := &cobra.Command{Use: "revoke [LEASE ...]", Short: "Revoke leases by id, or all of a host or a scope", RunE: func(cmd *cobra.Command, args []string) error {
		req.Leases = args
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.RevokeLeases(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			fmt.Fprintf(w, "%d ended, or being ended: `countersign lease list --state revoking` shows what is not confirmed\n"+
				"their hosts hear of it at their next proof, and may earn new ones; `countersign host quarantine` prevents that\n", len(r.Msg.GetRevoking()))
		})
	}}
	cmd.Flags().StringVar(&req.Host, "host", "", "all leases of this host")
	cmd.Flags().StringVar(&req.Scope, "scope", "", "all leases of this scope")
	cmd.Flags().StringVar(&req.Reason, "reason", "", "why, for the audit log")
	return cmd
}

func leaseExportCommand(o *options) *cobra.Command {
	req := &v1.ListLeasesRequest{Ended: true}
	cmd := &cobra.Command{Use: "export", Short: "Write every lease, ended ones too, and every canary, as JSON lines", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		e := json.NewEncoder(cmd.OutOrStdout())
		if _, err := eachLease(cmd.Context(), o, req, paging{}, func(l *v1.Lease) error {
			out, err := ledger.OfLease(l)
			if err != nil {
				return err
			}
			return e.Encode(out)
		}); err != nil || req.GetHost() != "" {
			return err // a canary is on no host
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ListCanaries(cmd.Context(), connect.NewRequest(&v1.ListCanariesRequest{Scope: req.GetScope()}))
		if connect.CodeOf(err) == connect.CodePermissionDenied {
			fmt.Fprintf(cmd.ErrOrStderr(), "canaries are left out: %s\n", terminal.Printable(message(err)))
			return nil
		}
		if err != nil {
			return err
		}
		for _, c := range r.Msg.GetCanaries() {
			if err := e.Encode(ledger.OfCanary(c)); err != nil {
				return err
			}
		}
		return nil
	}}
	cmd.Flags().StringVar(&req.Host, "host", "", "of this host")
	cmd.Flags().StringVar(&req.Scope, "scope", "", "of this scope")
	return cmd
}

func at(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func rfc3339(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return at(t).Format(time.RFC3339Nano)
}
