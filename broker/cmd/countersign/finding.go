package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/terminal"
)

func findingCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "finding", Short: "What the watch found"}
	cmd.AddCommand(findingListCommand(o), findingShowCommand(o), findingCloseCommand(o))
	return cmd
}

// A findingLine is a finding as scripts read it: the words of watch replay, and
// where it stands.
type findingLine struct {
	ID       string            `json:"id"`
	Status   string            `json:"status"`
	Detector string            `json:"detector"`
	Severity string            `json:"severity"`
	NHI      string            `json:"nhi,omitempty"`
	Lease    string            `json:"lease,omitempty"`
	Host     string            `json:"host,omitempty"`
	Account  string            `json:"account,omitempty"`
	Why      string            `json:"why"`
	First    time.Time         `json:"first"`
	Last     time.Time         `json:"last"`
	Count    uint64            `json:"count"`
	Evidence []json.RawMessage `json:"evidence"`
	Response string            `json:"response,omitempty"`
	ClosedBy string            `json:"closed_by,omitempty"`
	Reason   string            `json:"reason,omitempty"`
	Until    *time.Time        `json:"until,omitempty"`
}

func lineOf(f *v1.Finding) findingLine {
	l := findingLine{ID: f.GetId(), Status: f.GetStatus(), Detector: f.GetDetector(), Severity: f.GetSeverity(), NHI: f.GetNhi(), Lease: f.GetLease(), Host: f.GetHost(),
		Account: f.GetAccount(), Why: f.GetWhy(), First: f.GetFirst().AsTime(), Last: f.GetLast().AsTime(), Count: f.GetCount(), Evidence: []json.RawMessage{},
		Response: f.GetResponse(), ClosedBy: f.GetClosedBy(), Reason: f.GetReason()}
	for _, e := range f.GetEvidence() {
		l.Evidence = append(l.Evidence, e)
	}
	if f.GetUntil() != nil {
		until := f.GetUntil().AsTime()
		l.Until = &until
	}
	return l
}

// anyStatus is what list takes for findings of both.
const anyStatus = "all"

func findingListCommand(o *options) *cobra.Command {
	req := &v1.ListFindingsRequest{}
	var p paging
	var follow bool
	var sort string
	cmd := &cobra.Command{Use: "list", Short: "List findings, by when they were opened", Example: `  countersign finding list --severity high
  countersign finding list --status all --sort newest --limit 20
  countersign finding list -f -o json`, Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) (err error) {
		if follow && cmd.Flags().Changed("status") {
			return cli.Fail(cli.Usage, errors.New("-f shows what is open and what is opened from now on: leave --status away"))
		}
		if req.Status == anyStatus {
			req.Status = ""
		}
		if follow {
			return followFindings(cmd, o, req)
		}
		if req.Newest, err = newestFirst(sort); err != nil {
			return err
		}
		list := o.listing(cmd, "findings", "ID STATUS SEVERITY DETECTOR HOST LEASE ACCOUNT LAST COUNT WHY")
		next, err := eachFinding(cmd.Context(), o, req, p, func(f *v1.Finding) error {
			if o.output == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(lineOf(f))
			}
			return list.row(f, f.GetId(), f.GetStatus(), f.GetSeverity(), f.GetDetector(), f.GetHost(), f.GetLease(), f.GetAccount(), stampText(f.GetLast()), f.GetCount(), f.GetWhy())
		})
		if err != nil || o.output == "json" {
			return err
		}
		return list.end(next)
	}}
	cmd.Flags().StringVar(&req.Status, "status", "open", "open, closed or all")
	cmd.Flags().StringVar(&req.Detector, "detector", "", "of this detector")
	cmd.Flags().StringVar(&req.Host, "host", "", "about this host")
	cmd.Flags().StringVar(&req.Severity, "severity", "", "low, medium, high or critical")
	cmd.Flags().StringVar(&sort, "sort", oldest, "newest or oldest first, by when they were opened")
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions([]string{newest, oldest}, cobra.ShellCompDirectiveNoFileComp))
	p.flags(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is opened, or opened again")
	_ = cmd.RegisterFlagCompletionFunc("status", cobra.FixedCompletions([]string{"open", "closed", anyStatus}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("severity", cobra.FixedCompletions([]string{"low", "medium", "high", "critical"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// eachFinding calls f for every finding that p leaves of a list, page by page, and
// returns where the list goes on.
func eachFinding(ctx context.Context, o *options, req *v1.ListFindingsRequest, p paging, f func(*v1.Finding) error) (next string, err error) {
	client, err := o.client(ctx)
	if err != nil {
		return "", err
	}
	return p.walk(func(limit uint32, after string) (int, string, error) {
		if req.Limit = limit; after != "" {
			if req.After, err = strconv.ParseUint(after, 10, 64); err != nil {
				return 0, "", cli.Fail(cli.Usage, fmt.Errorf("--after %s: it is no place in a list of findings", after))
			}
		}
		r, err := client.ListFindings(ctx, connect.NewRequest(req))
		if err != nil {
			return 0, "", err
		}
		for _, one := range r.Msg.GetFindings() {
			if err := f(one); err != nil {
				return 0, "", err
			}
		}
		if !r.Msg.GetMore() {
			return len(r.Msg.GetFindings()), "", nil
		}
		return len(r.Msg.GetFindings()), strconv.FormatUint(r.Msg.GetNext(), 10), nil
	})
}

// followFindings prints a line for each finding, until it is interrupted. A broker
// that goes away is waited for.
func followFindings(cmd *cobra.Command, o *options, req *v1.ListFindingsRequest) error {
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	client, err := o.client(ctx)
	if err != nil {
		return err
	}
	away := false
	for {
		r, err := client.ListFindings(ctx, connect.NewRequest(req))
		if ctx.Err() != nil {
			return nil // interrupted
		}
		if connect.CodeOf(err) == connect.CodeUnavailable {
			if !away {
				away = true
				fmt.Fprintln(cmd.ErrOrStderr(), "the broker is away; waiting for it")
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(2 * time.Second):
			}
			if again, err := o.client(ctx); err == nil {
				client = again
			}
			continue
		}
		if err != nil {
			return err
		}
		away = false
		for _, f := range r.Msg.GetFindings() {
			if o.output == "json" {
				err = json.NewEncoder(w).Encode(lineOf(f))
			} else {
				_, err = fmt.Fprintln(w, terminal.Printable(fmt.Sprintf("%s %s %-8s %s host=%s lease=%s account=%s %s", stampText(f.GetLast()), f.GetId(), f.GetSeverity(), f.GetDetector(),
					f.GetHost(), f.GetLease(), f.GetAccount(), strconv.Quote(f.GetWhy()))))
			}
			if err != nil {
				return err
			}
		}
		if req.After = r.Msg.GetNext(); r.Msg.GetMore() {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func findingShowCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "show FINDING", Short: "Show one finding, with what was seen", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		_, err := eachFinding(cmd.Context(), o, &v1.ListFindingsRequest{Finding: args[0]}, paging{}, func(f *v1.Finding) error {
			return o.print(cmd.OutOrStdout(), lineOf(f), func(w io.Writer) {
				for _, line := range [][2]string{
					{"id", f.GetId()}, {"status", f.GetStatus()}, {"closed by", f.GetClosedBy()}, {"reason", f.GetReason()}, {"until", stampText(f.GetUntil())},
					{"detector", f.GetDetector()}, {"severity", f.GetSeverity()}, {"nhi", f.GetNhi()}, {"why", f.GetWhy()},
					{"lease", f.GetLease()}, {"host", f.GetHost()}, {"account", f.GetAccount()},
					{"first", stampText(f.GetFirst())}, {"last", stampText(f.GetLast())}, {"count", strconv.FormatUint(f.GetCount(), 10)}, {"response", f.GetResponse()},
				} {
					fmt.Fprintf(w, "%-9s %s\n", line[0], terminal.Printable(line[1]))
				}
				for _, e := range f.GetEvidence() {
					fmt.Fprintf(w, "%-9s %s\n", "seen", terminal.Printable(string(e)))
				}
			})
		})
		return err
	}}
}

func findingCloseCommand(o *options) *cobra.Command {
	req := &v1.CloseFindingRequest{}
	var until moment
	cmd := &cobra.Command{Use: "close FINDING --reason TEXT [--until TIME]", Short: "Close a finding that was looked into; what happens later opens it again", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		req.Finding = args[0]
		if t := time.Time(until); !t.IsZero() {
			req.Until = timestamppb.New(t)
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.CloseFinding(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		return o.print(cmd.OutOrStdout(), lineOf(r.Msg.GetFinding()), func(w io.Writer) {
			f := r.Msg.GetFinding()
			from := "now"
			if f.GetUntil() != nil {
				from = stampText(f.GetUntil())
			}
			fmt.Fprintf(w, "finding %s is closed; what is seen of it after %s opens it again\n", f.GetId(), from)
		})
	}}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "why, for whoever reads it next")
	cmd.Flags().Var(&until, "until", "keep it closed over all that happens until then: 36h or 14d from now, or as 2026-12-24T12:00:00Z")
	_ = cmd.MarkFlagRequired("reason")
	return cmd
}

// A moment is a flag's time: from now on, or as RFC 3339 writes it.
type moment time.Time

func (m *moment) Type() string { return "time" }

func (m *moment) String() string {
	if t := time.Time(*m); !t.IsZero() {
		return t.UTC().Format(time.RFC3339)
	}
	return ""
}

func (m *moment) Set(text string) error {
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		*m = moment(t)
		return nil
	}
	var d days
	if err := d.Set(text); err != nil {
		return fmt.Errorf("%w; a time as 2026-12-24T12:00:00Z", err)
	}
	*m = moment(time.Now().Add(time.Duration(d)))
	return nil
}
