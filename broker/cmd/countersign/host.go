package main

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/front/enroll/cloud"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/cli"
)

func hostCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "host", Short: "Admit, label and remove hosts"}
	cmd.AddCommand(hostListCommand(o), hostShowCommand(o), hostAddCommand(o), hostImportCommand(o), hostLabelCommand(o),
		hostActCommand(o, "approve", "Admit a pending host", false),
		hostActCommand(o, "quarantine", "Revoke a host's leases and refuse it from now on", true),
		hostActCommand(o, "release", "End a host's quarantine", false),
		hostActCommand(o, "reenrol", "Let a host join again with new keys", false),
		hostActCommand(o, "step-up", "Have a host show its whole logs at its next request", true),
		hostActCommand(o, "remove", "Revoke a host's leases and forget it, but for a tombstone", true),
		hostReferenceCommand(o))
	return cmd
}

func stampText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

func labelsText(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ",")
}

func hostListCommand(o *options) *cobra.Command {
	req := &v1.ListHostsRequest{}
	var p paging
	cmd := &cobra.Command{Use: "list", Short: "List hosts", Example: `  countersign host list -l env=prod,role!=db
  countersign host list --state stale --sort proved --limit 20`, Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		list := o.listing(cmd, "hosts", "ID NAME STATE TIER PROVED LABELS REASON")
		next, err := p.walk(func(limit uint32, after string) (int, string, error) {
			req.Limit, req.After = limit, after
			r, err := client.ListHosts(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return 0, "", err
			}
			for _, h := range r.Msg.GetHosts() {
				if err := list.row(h, h.GetId(), h.GetName(), h.GetState(), h.GetTier(), stampText(h.GetLastProved()), labelsText(h.GetLabels()), h.GetStateReason()); err != nil {
					return 0, "", err
				}
			}
			return len(r.Msg.GetHosts()), r.Msg.GetNext(), nil
		})
		if err != nil {
			return err
		}
		return list.end(next)
	}}
	cmd.Flags().StringVarP(&req.Selector, "selector", "l", "", "labels, as env=prod,role!=db")
	cmd.Flags().StringVar(&req.State, "state", "", "registered, pending, trusted, stale, failed, quarantined or removed")
	cmd.Flags().StringVar(&req.Sort, "sort", "name", "by name, or by proved: the longest silent first")
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions([]string{"name", "proved"}, cobra.ShellCompDirectiveNoFileComp))
	p.flags(cmd)
	return cmd
}

func hostShowCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "show HOST", Short: "Show one host", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ListHosts(cmd.Context(), connect.NewRequest(&v1.ListHostsRequest{Host: args[0]}))
		if err != nil {
			return err
		}
		if len(r.Msg.GetHosts()) == 0 {
			return no("no such host: %s", args[0])
		}
		h := r.Msg.GetHosts()[0]
		return o.show(cmd.OutOrStdout(), h, func(w io.Writer) {
			for _, line := range [][2]string{
				{"id", h.GetId()}, {"name", h.GetName()}, {"state", h.GetState()}, {"reason", h.GetStateReason()}, {"tier", h.GetTier()},
				{"labels", labelsText(h.GetLabels())}, {"reference", h.GetReference()}, {"address", h.GetAddress()},
				{"created", stampText(h.GetCreated())}, {"proved", stampText(h.GetLastProved())}, {"ak", h.GetAkName()},
				{"eks", strings.Join(h.GetEkHashes(), " ")},
			} {
				fmt.Fprintf(w, "%-10s %s\n", line[0], line[1])
			}
		})
	}}
}

func addHosts(cmd *cobra.Command, o *options, hosts []*v1.NewHost, dryRun bool) error {
	client, err := o.client(cmd.Context())
	if err != nil {
		return err
	}
	r, err := client.AddHosts(cmd.Context(), connect.NewRequest(&v1.AddHostsRequest{Hosts: hosts, DryRun: dryRun}))
	if err != nil {
		return err
	}
	if err := o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
		for _, p := range r.Msg.GetProblems() {
			fmt.Fprintln(w, p)
		}
		switch {
		case dryRun && len(r.Msg.GetProblems()) == 0:
			fmt.Fprintf(w, "%d hosts could be added\n", len(hosts))
		case len(hosts) == 1 && len(r.Msg.GetIds()) == 1:
			fmt.Fprintln(w, r.Msg.GetIds()[0])
		case len(r.Msg.GetIds()) > 0:
			fmt.Fprintf(w, "%d hosts added\n", len(r.Msg.GetIds()))
		}
	}); err != nil {
		return err
	}
	if n := len(r.Msg.GetProblems()); n > 0 {
		return no("no host was added: %d problems", n)
	}
	return nil
}

func hostAddCommand(o *options) *cobra.Command {
	var eks []string
	var reference string
	cmd := &cobra.Command{Use: "add NAME [k=v ...]", Short: "Expect a host by the hash of its EK", Args: cli.AtLeast(1), RunE: func(cmd *cobra.Command, args []string) error {
		labels, _, err := keyValues(args[1:])
		if err != nil {
			return err
		}
		return addHosts(cmd, o, []*v1.NewHost{{Name: args[0], EkHashes: eks, Labels: labels, Reference: reference}}, false)
	}}
	cmd.Flags().StringSliceVar(&eks, "ek-hash", nil, "SHA-256 of an EK's PKIX DER, as countersign-agent doctor prints it")
	cmd.Flags().StringVar(&reference, "reference", "", "reference set that its PCRs must match")
	_ = cmd.MarkFlagRequired("ek-hash")
	return cmd
}

// maxImport bounds an import file; ten thousand hosts take some 2 MB.
const maxImport = 64 << 20

func hostImportCommand(o *options) *cobra.Command {
	var file, from string
	var dryRun bool
	cmd := &cobra.Command{Use: "import -f FILE", Short: "Expect many hosts: CSV of name,ek_hash[;ek_hash…],k=v;k=v,reference", Long: `Expect many hosts, by the hashes of their EKs. The file is CSV with the header
line name,ek_hash,labels,reference; with --from it is the JSON that a cloud's
command line prints about VMs (see docs/CLOUDS.md). If anything in the file is
wrong, all problems are listed and no host is added.`, Example: `  countersign host import -f hosts.csv --dry-run
  countersign host import -f identities.json --from gce`, Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		hosts, err := readImport(file, from)
		if err != nil {
			return err
		}
		return addHosts(cmd, o, hosts, dryRun)
	}}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the file")
	cmd.Flags().StringVar(&from, "from", "", "the file is JSON of this cloud: "+strings.Join(cloud.Names(), ", "))
	_ = cmd.RegisterFlagCompletionFunc("from", cobra.FixedCompletions(cloud.Names(), cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what is wrong, add nothing")
	_ = cmd.MarkFlagRequired("file")
	return cmd
}

// readImport reads the whole file, so that a mistake in its last line adds
// nobody.
func readImport(file, from string) ([]*v1.NewHost, error) {
	data, err := bounded.ReadFile(file, maxImport)
	if err != nil {
		return nil, err
	}
	if from != "" {
		return readCloud(file, from, data)
	}

	r := csv.NewReader(bytes.NewReader(data))
	r.FieldsPerRecord = -1
	header, err := r.Read()
	if err != nil || len(header) < 2 || header[0] != "name" || header[1] != "ek_hash" {
		return nil, no("%s: the first line must be name,ek_hash,labels,reference", file)
	}
	var hosts []*v1.NewHost
	for {
		rec, err := r.Read()
		if errors.Is(err, io.EOF) {
			return hosts, nil
		}
		if err != nil {
			return nil, no("%s: %v", file, err)
		}
		for len(rec) < 4 {
			rec = append(rec, "")
		}
		line, _ := r.FieldPos(0)
		h := &v1.NewHost{Name: rec[0], EkHashes: strings.Split(rec[1], ";"), Reference: rec[3]}
		if rec[2] != "" {
			if h.Labels, _, err = keyValues(strings.Split(rec[2], ";")); err != nil {
				return nil, no("%s:%d: labels: %v", file, line, err)
			}
		}
		hosts = append(hosts, h)
	}
}

// readCloud reads the JSON of a cloud's command line.
func readCloud(file, from string, data []byte) ([]*v1.NewHost, error) {
	found, problems := cloud.Read(from, data)
	if len(problems) > 0 {
		return nil, no("import %s: no host was added: %d problems:\n%s", file, len(problems), strings.Join(problems, "\n"))
	}
	hosts := make([]*v1.NewHost, 0, len(found))
	for _, h := range found {
		hosts = append(hosts, &v1.NewHost{Name: h.Name, EkHashes: h.EKHashes, Labels: h.Labels})
	}
	return hosts, nil
}

func changeHost(cmd *cobra.Command, o *options, req *v1.ChangeHostRequest) error {
	client, err := o.client(cmd.Context())
	if err != nil {
		return err
	}
	r, err := client.ChangeHost(cmd.Context(), connect.NewRequest(req))
	if err != nil {
		return err
	}
	return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
		h := r.Msg.GetHost()
		fmt.Fprintf(w, "host %s (%s) is %s", h.GetId(), h.GetName(), h.GetState())
		if n := r.Msg.GetLeasesRevoked(); n > 0 {
			fmt.Fprintf(w, "; %d leases are being revoked", n)
		}
		fmt.Fprintln(w)
	})
}

func hostActCommand(o *options, action, short string, takesReason bool) *cobra.Command {
	var reason, reference string
	cmd := &cobra.Command{Use: action + " HOST", Short: short, Args: cli.Exactly(1)}
	if takesReason {
		cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit log")
	}
	if action == "approve" {
		cmd.Use += " [k=v ...]"
		cmd.Args = cli.AtLeast(1)
		cmd.Flags().StringVar(&reference, "reference", "", "reference set that its PCRs must match")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		labels, _, err := keyValues(args[1:])
		if err != nil {
			return err
		}
		return changeHost(cmd, o, &v1.ChangeHostRequest{Host: args[0], Action: action, Reason: reason, SetLabels: labels, Reference: reference})
	}
	return cmd
}

func hostLabelCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "label HOST k=v k- ...", Short: "Set and drop labels", Args: cli.AtLeast(2), RunE: func(cmd *cobra.Command, args []string) error {
		set, drop, err := keyValues(args[1:])
		if err != nil {
			return err
		}
		return changeHost(cmd, o, &v1.ChangeHostRequest{Host: args[0], Action: "label", SetLabels: set, DropLabels: drop})
	}}
}

func hostReferenceCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "reference HOST [NAME]", Short: "Have a host match a reference set, or none", Args: cli.AtLeast(1), RunE: func(cmd *cobra.Command, args []string) error {
		req := &v1.ChangeHostRequest{Host: args[0], Action: "reference"}
		if len(args) > 1 {
			req.Reference = args[1]
		}
		return changeHost(cmd, o, req)
	}}
}
