package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/verify/packages"
	"github.com/countersign/countersign/internal/cli"
)

func releaseCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "release", Short: "What builds announce: files that hosts may show from now on"}
	cmd.AddCommand(releaseAddCommand(o), releaseListCommand(o))
	return cmd
}

func releaseAddCommand(o *options) *cobra.Command {
	var fromPackages []string
	var manifest string
	overlap := days(defaultOverlap)
	cmd := &cobra.Command{Use: "add NAME --from-package FILE | --manifest FILE", Short: "Expect the files of packages, or of a list, as the next version of a release", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		if (len(fromPackages) == 0) == (manifest == "") {
			return cli.Fail(cli.Usage, errors.New("name the files by --from-package FILE, as often as there are packages, or by --manifest FILE"))
		}
		files, source, err := announced(fromPackages, manifest)
		if err != nil {
			return err
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		until := time.Now().Add(time.Duration(overlap))
		req := &v1.AddReleaseRequest{Name: args[0], OlderUntil: timestamppb.New(until), Source: source}
		for _, f := range files {
			req.Files = append(req.Files, &v1.ReleaseFile{Path: f.Path, Digest: f.Digest})
		}
		r, err := client.AddRelease(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			added := r.Msg.GetRelease()
			fmt.Fprintf(w, "%s version %d: %d files expected, older versions until %s\n", added.GetName(), added.GetVersion(), added.GetFiles(), until.UTC().Format(time.RFC3339))
		})
	}}
	cmd.Flags().StringArrayVar(&fromPackages, "from-package", nil, "a .deb or .rpm whose files to expect; may be given several times")
	cmd.Flags().StringVar(&manifest, "manifest", "", "a list of files, as sha256sum prints it, or as JSON of path and digest")
	cmd.Flags().Var(&overlap, "overlap", "how long older versions stay expected, as 36h or 14d")
	return cmd
}

// announced reads all files that a release is made of. Packages for two
// architectures may have other digests for the same path: each is expected.
func announced(fromPackages []string, manifest string) (files []packages.File, source string, err error) {
	names := fromPackages
	if manifest != "" {
		names = []string{manifest}
	}
	var sources []string
	seen := map[packages.File]bool{}
	for _, name := range names {
		list, err := announcedBy(name, manifest != "")
		if err != nil {
			return nil, "", err
		}
		for _, f := range list {
			if !seen[f] {
				seen[f] = true
				files = append(files, f)
			}
		}
		sources = append(sources, filepath.Base(name))
	}
	if len(files) == 0 {
		return nil, "", no("%s: no regular file to expect", strings.Join(names, ", "))
	}
	return files, strings.Join(sources, ", "), nil
}

func announcedBy(name string, manifest bool) (list []packages.File, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, cli.Fail(cli.Usage, err)
	}
	defer func() { _ = f.Close() }()
	if manifest {
		list, err = packages.ReadManifest(f)
	} else {
		var info os.FileInfo
		if info, err = f.Stat(); err != nil {
			return nil, cli.Fail(cli.Usage, err)
		}
		list, err = packages.Read(f, info.Size())
	}
	if err != nil {
		return nil, no("%s: %v", name, err)
	}
	return list, nil
}

func releaseListCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "list [NAME]", Short: "List the versions of a release, or of all", Args: cli.AtMost(1), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ListReleases(cmd.Context(), connect.NewRequest(&v1.ListReleasesRequest{Name: strings.Join(args, "")}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			table(w, "NAME VERSION FILES ADDED UNTIL SOURCE", func(row func(...any)) {
				for _, one := range r.Msg.GetReleases() {
					row(one.GetName(), one.GetVersion(), one.GetFiles(), stampText(one.GetAdded()), stampText(one.GetUntil()), one.GetSource())
				}
			})
		})
	}}
}

// days is a flag's duration that may be written as whole days, too.
type days time.Duration

const day = 24 * time.Hour

func (d *days) Type() string { return "duration" }

func (d *days) String() string {
	if t := time.Duration(*d); t != 0 && t%day == 0 {
		return fmt.Sprintf("%dd", t/day)
	}
	return time.Duration(*d).String()
}

// maxDays keeps what is added to a time within what times can be.
const maxDays = 3650

func (d *days) Set(text string) error {
	t, err := time.ParseDuration(text)
	if number, found := strings.CutSuffix(text, "d"); found {
		var n uint64
		n, err = strconv.ParseUint(number, 10, 16)
		t = time.Duration(n) * day
	}
	if err != nil || t < 0 || t > maxDays*day {
		return fmt.Errorf("a duration is written as 36h or 14d, and is at most %dd", maxDays)
	}
	*d = days(t)
	return nil
}
