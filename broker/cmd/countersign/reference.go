package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/verify/offline"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/internal/cli"
)

// defaultOverlap is how long what a fleet moves away from stays allowed.
const defaultOverlap = 14 * 24 * time.Hour

func referenceCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "reference", Short: "What hosts must be: boot facts, measured files, PCR values"}
	cmd.AddCommand(referenceLearnCommand(o), referenceAddCommand(o), referenceApproveCommand(o), referenceShowCommand(o), referenceDiffCommand(o), referenceMaintenanceCommand(o))
	return cmd
}

func referenceLearnCommand(o *options) *cobra.Command {
	var host, dir string
	var pcrs []uint
	cmd := &cobra.Command{Use: "learn NAME --host HOST | learn --dir DIR", Short: "Draft a version of a set of what a host, or a record, has shown", Args: cli.AtMost(1), RunE: func(cmd *cobra.Command, args []string) error {
		if (host == "") == (dir == "") || (dir == "") != (len(args) == 1) {
			return cli.Fail(cli.Usage, errors.New("learn NAME from --host HOST, or, without a name, from a record in --dir DIR"))
		}
		if dir != "" {
			content, err := learnFrom(dir)
			if err != nil {
				return err
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(content)
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		req := &v1.LearnReferenceRequest{Name: args[0], Host: host}
		for _, p := range pcrs {
			req.Pcrs = append(req.Pcrs, uint32(p))
		}
		r, err := client.LearnReference(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		return o.showDraft(cmd.OutOrStdout(), r.Msg.GetReference())
	}}
	cmd.Flags().StringVar(&host, "host", "", "the host to learn from; it must be trusted")
	cmd.Flags().StringVar(&dir, "dir", "", "folder with a record, as appraise takes it; prints the set")
	cmd.Flags().UintSliceVar(&pcrs, "pcr", nil, "PCRs to demand by their value, too (default 0-7 for a host without an event log)")
	return cmd
}

// learnFrom makes a set of a record whose evidence holds.
func learnFrom(dir string) (reference.Content, error) {
	record, err := recordFiles{dir: dir}.read()
	if err != nil {
		return reference.Content{}, cli.Fail(cli.Usage, err)
	}
	report := offline.Appraise(record, offline.Options{Now: time.Now()})
	for _, c := range report.Checks {
		if c.Result == offline.Fail {
			return reference.Content{}, no("%s: nothing is learned from evidence that doesn't hold: %s: %s", dir, c.Name, c.Detail)
		}
	}
	if report.Boot == nil && report.Measured == nil {
		return reference.Content{}, no("%s: neither an event log nor an IMA list, with PCR values, to learn from", dir)
	}
	learned := reference.Learn(report.Boot, report.PCRs, nil, report.Measured)
	if learned.DemandsNothing() {
		return reference.Content{}, no("%s: nothing of its boot or its files is proven, and a set of nothing would match every host (`countersign appraise --dir` shows why)", dir)
	}
	return learned, nil
}

func (o *options) showDraft(w io.Writer, r *v1.Reference) error {
	return o.print(w, referenceOf(r), func(w io.Writer) {
		fmt.Fprintf(w, "%s version %d is a draft: `countersign reference diff %s@%d FILE|NAME` compares it, `countersign reference approve %s` puts it in force\n",
			r.GetName(), r.GetVersion(), r.GetName(), r.GetVersion(), r.GetName())
	})
}

func referenceAddCommand(o *options) *cobra.Command {
	var file string
	cmd := &cobra.Command{Use: "add NAME -f FILE", Short: "Draft a version of a set from its JSON", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		b, err := readBounded(file)
		if err != nil {
			return cli.Fail(cli.Usage, err)
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.AddReference(cmd.Context(), connect.NewRequest(&v1.AddReferenceRequest{Name: args[0], Content: b}))
		if err != nil {
			return err
		}
		return o.showDraft(cmd.OutOrStdout(), r.Msg.GetReference())
	}}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the set, as reference learn --dir writes it")
	_ = cmd.MarkFlagRequired("file")
	return cmd
}

func referenceApproveCommand(o *options) *cobra.Command {
	overlap := days(defaultOverlap)
	cmd := &cobra.Command{Use: "approve NAME[@VERSION]", Short: "Put a version in force, the newest unless one is named", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		name, version, err := nameVersion(args[0])
		if err != nil {
			return err
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ApproveReference(cmd.Context(), connect.NewRequest(&v1.ApproveReferenceRequest{Name: name, Version: version, OlderUntil: timestamppb.New(time.Now().Add(time.Duration(overlap)))}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			fmt.Fprintf(w, "%s version %d is in force\n", r.Msg.GetReference().GetName(), r.Msg.GetReference().GetVersion())
		})
	}}
	cmd.Flags().Var(&overlap, "overlap", "how long versions that are in force stay so beside it, as 36h or 14d")
	return cmd
}

func nameVersion(arg string) (name string, version uint64, err error) {
	name, text, found := strings.Cut(arg, "@")
	if found {
		if version, err = strconv.ParseUint(text, 10, 32); err != nil || version == 0 {
			return "", 0, cli.Fail(cli.Usage, fmt.Errorf("%q: a version is a number, as %s@2", arg, name))
		}
	}
	return name, version, nil
}

// A shownReference is a version as `-o json` prints it; its content is what
// `appraise --reference` and `reference add` read.
type shownReference struct {
	Name        string          `json:"name"`
	Version     uint64          `json:"version"`
	State       string          `json:"state"`
	Until       string          `json:"until,omitempty"`
	LearnedFrom string          `json:"learned_from,omitempty"`
	Created     string          `json:"created"`
	Content     json.RawMessage `json:"content"`
}

func referenceOf(r *v1.Reference) shownReference {
	return shownReference{Name: r.GetName(), Version: r.GetVersion(), State: r.GetState(), Until: rfc3339(r.GetUntil()), LearnedFrom: r.GetLearnedFrom(),
		Created: rfc3339(r.GetCreated()), Content: r.GetContent()}
}

func referenceShowCommand(o *options) *cobra.Command {
	var content bool
	var p paging
	cmd := &cobra.Command{Use: "show [NAME[@VERSION]]", Short: "Show the versions of a set, or of all", Args: cli.AtMost(1), RunE: func(cmd *cobra.Command, args []string) error {
		arg := ""
		if len(args) > 0 {
			arg = args[0]
		}
		if content {
			c, err := o.content(cmd, arg)
			if err != nil {
				return err
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(c)
		}
		list := o.listing(cmd, "references", "NAME VERSION STATE UNTIL CREATED FROM DEMANDS")
		next, err := o.eachReference(cmd, arg, p, func(r *v1.Reference) error {
			if o.output == "json" {
				b, err := json.Marshal(referenceOf(r))
				if err != nil {
					return err
				}
				return list.value(b)
			}
			return list.row(r, r.GetName(), r.GetVersion(), r.GetState(), stampText(r.GetUntil()), stampText(r.GetCreated()), r.GetLearnedFrom(), demands(r.GetContent()))
		})
		if err != nil {
			return err
		}
		return list.end(next)
	}}
	p.flags(cmd)
	cmd.Flags().BoolVar(&content, "content", false, "print the set itself, as JSON")
	return cmd
}

// demands is a set in a few words.
func demands(content []byte) string {
	c, err := reference.Parse(content)
	if err != nil {
		return err.Error()
	}
	var parts []string
	if b := c.Boot; b != nil {
		parts = append(parts, fmt.Sprintf("boot (%d images, %d files, %d command lines)", len(b.Images), len(b.Files), len(b.KernelCommandLines)))
	}
	if c.IMA != nil {
		parts = append(parts, fmt.Sprintf("files of %d paths", len(c.IMA.Allow)))
	}
	if n := len(c.PCRs); n > 0 {
		parts = append(parts, fmt.Sprintf("%d PCR values", n))
	}
	return strings.Join(parts, ", ")
}

// eachReference calls f for the versions of NAME, the newest first, for NAME@VERSION,
// or for all, page by page, and returns where the list goes on.
func (o *options) eachReference(cmd *cobra.Command, arg string, p paging, f func(*v1.Reference) error) (next string, err error) {
	name, version, err := nameVersion(arg)
	if err != nil {
		return "", err
	}
	client, err := o.client(cmd.Context())
	if err != nil {
		return "", err
	}
	return p.walk(func(limit uint32, after string) (int, string, error) {
		r, err := client.ListReferences(cmd.Context(), connect.NewRequest(&v1.ListReferencesRequest{Name: name, Version: version, Limit: limit, After: after}))
		if err != nil {
			return 0, "", err
		}
		for _, one := range r.Msg.GetReferences() {
			if err := f(one); err != nil {
				return 0, "", err
			}
		}
		return len(r.Msg.GetReferences()), r.Msg.GetNext(), nil
	})
}

func referenceDiffCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "diff A B", Short: "Say in words how A became B; each is NAME, NAME@VERSION, a file with a set, or a folder with a record", Args: cli.Exactly(2), RunE: func(cmd *cobra.Command, args []string) error {
		var sides [2]reference.Content
		for i, arg := range args {
			var err error
			if sides[i], err = o.referenceAt(cmd, arg); err != nil {
				return err
			}
		}
		diffs := reference.Diff(sides[0], sides[1])
		return o.print(cmd.OutOrStdout(), map[string]any{"differences": append([]string{}, diffs...)}, func(w io.Writer) {
			for _, d := range diffs {
				fmt.Fprintln(w, d)
			}
		})
	}}
}

func (o *options) referenceAt(cmd *cobra.Command, arg string) (reference.Content, error) {
	if info, err := os.Stat(arg); err == nil {
		if info.IsDir() {
			return learnFrom(arg)
		}
		return referenceFile(arg)
	}
	return o.content(cmd, arg)
}

// content is that of NAME@VERSION, or of NAME's newest version.
func (o *options) content(cmd *cobra.Command, arg string) (reference.Content, error) {
	if name, _, _ := strings.Cut(arg, "@"); name == "" {
		return reference.Content{}, cli.Fail(cli.Usage, fmt.Errorf("%q is no NAME or NAME@VERSION of a reference set", arg))
	}
	var content []byte
	if _, err := o.eachReference(cmd, arg, paging{limit: 1}, func(r *v1.Reference) error {
		content = r.GetContent()
		return nil
	}); err != nil {
		return reference.Content{}, err
	}
	return reference.Parse(content)
}

func referenceMaintenanceCommand(o *options) *cobra.Command {
	var length days
	cmd := &cobra.Command{Use: "maintenance NAME --for DURATION", Short: "Let be for a while what a set's files don't allow", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		until := time.Now().Add(time.Duration(length))
		if _, err := client.MaintainReference(cmd.Context(), connect.NewRequest(&v1.MaintainReferenceRequest{Name: args[0], Until: timestamppb.New(until)})); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "files that %s doesn't allow are told and let be until %s; what isn't allowed then fails its host\n", args[0], until.UTC().Format(time.RFC3339))
		return nil
	}}
	cmd.Flags().Var(&length, "for", "how long, as 36h or 7d, a week at most; 0 ends it")
	_ = cmd.MarkFlagRequired("for")
	return cmd
}
