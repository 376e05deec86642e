package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/broker/internal/verify/vendors"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/cli"
)

// defaultEKRoots is the file that the example config names as ek_roots.
const defaultEKRoots = "/etc/countersign/ek-roots.pem"

func ekRootsCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "ek-roots", Short: "Import and check TPM vendors' certificates"}
	cmd.AddCommand(ekRootsImportCommand(o), ekRootsCheckCommand(o))
	return cmd
}

func ekRootsImportCommand(o *options) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "import FILE...",
		Short: "Add TPM vendors' certificates to the file that ek_roots names",
		Long: `Adds the roots and intermediates of TPM vendors to a PEM file, which ek_roots in the broker's
config then names. A host whose EK certificate leads to one of them is of tier "certified".

FILE holds certificates in PEM, DER or PKCS#7, or is Microsoft's TrustedTpm.cab
(https://go.microsoft.com/fwlink/?linkid=2097925), whose signature is checked. Certificates that
can't be used are left out, with the reason. What the file holds already stays as it is.

The broker reads the file when it starts. Exit code 1: nothing that was given can be used.`,
		Example: `  countersign ek-roots import TrustedTpm.cab
  countersign ek-roots import --out ./ek-roots.pem infineon-root.crt vendors.p7b`,
		Args: cli.AtLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var items []vendors.Item
			for _, file := range args {
				data, err := bounded.ReadFile(file, vendors.MaxInput)
				if err != nil {
					return cli.Fail(cli.Usage, err)
				}
				found, err := vendors.Read(file, data, time.Now())
				if err != nil {
					return err
				}
				items = append(items, found...)
			}
			usable := slices.ContainsFunc(items, func(i vendors.Item) bool { return i.LeftOut == "" })
			added, err := vendors.Merge(out, items)
			if err != nil {
				return err
			}

			answer := struct {
				Out   string         `json:"out"`
				Added int            `json:"added"`
				Items []vendors.Item `json:"items"`
			}{out, added, items}
			if err := o.print(cmd.OutOrStdout(), answer, func(w io.Writer) { importText(w, out, added, items) }); err != nil {
				return err
			}
			if !usable {
				return no("none of the %d items can be used", len(items))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&out, "out", defaultEKRoots, "the PEM file to add to")
	return cmd
}

// importText prints a block for each vendor, in the order in which they came.
func importText(w io.Writer, out string, added int, items []vendors.Item) {
	var names []string
	of := map[string][]vendors.Item{}
	for _, item := range items {
		if _, ok := of[item.Vendor]; !ok {
			names = append(names, item.Vendor)
		}
		of[item.Vendor] = append(of[item.Vendor], item)
	}

	for _, name := range names {
		taken, left := 0, 0
		for _, item := range of[name] {
			if item.LeftOut == "" {
				taken++
			} else {
				left++
			}
		}
		shown := name
		if shown == "" {
			shown = "(no vendor)"
		}
		fmt.Fprintf(w, "%s: %d taken, %d left out\n", shown, taken, left)
		for _, item := range of[name] {
			if item.LeftOut != "" {
				fmt.Fprintf(w, "  %s: %s\n", item.Source, item.LeftOut)
			}
		}
	}
	fmt.Fprintf(w, "%d certificates added to %s\n", added, out)
	if added > 0 {
		fmt.Fprintf(w, "next: name it in the broker's config, ek_roots = [%q], and restart the broker\n", out)
	}
}

func ekRootsCheckCommand(o *options) *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use:   "check EKCERT [ISSUERS…]",
		Short: "Build the chain of an EK certificate and name what is missing",
		Long: `Builds the chain from an EK certificate (DER or PEM) to a root, by the broker's own code. Where an
issuer is missing it is named, with the URL at which the certificate says the issuer's own is.
ISSUERS are files (PEM or DER) of certificates that the TPM holds beside that of its key, as
"tpm2_nvread 0x1c00100" prints them: the agent sends them when it joins.

Exit codes: 0 a host with this certificate is certified, 1 it isn't, 2 a file is wrong.`,
		Example: `  countersign ek-roots check ek.der
  countersign ek-roots check ek.der issuers.der
  countersign ek-roots check ek.pem --ek-roots ./ek-roots.pem -o json`,
		Args: cli.AtLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := readBounded(args[0])
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			set, err := vendors.Load(files)
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("%w (`countersign ek-roots import` makes it)", err)
			}
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			for _, name := range args[1:] {
				issuers, err := readIssuers(name)
				if err != nil {
					return cli.Fail(cli.Usage, err)
				}
				set = set.With(issuers)
			}
			chain, err := set.Check(data, time.Now())
			if err != nil {
				return cli.Fail(cli.Usage, fmt.Errorf("%s: %w", args[0], err))
			}
			if err := o.print(cmd.OutOrStdout(), chain, func(w io.Writer) { chainText(w, chain) }); err != nil {
				return err
			}
			if chain.Verdict != vendors.Certified {
				return no("%s: %s", args[0], chain.Reason)
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVar(&files, "ek-roots", []string{defaultEKRoots}, "PEM files, as ek_roots names them")
	return cmd
}

func readIssuers(name string) ([]*x509.Certificate, error) {
	data, err := readBounded(name)
	if err != nil {
		return nil, err
	}
	issuers, err := vendors.Issuers(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return issuers, nil
}

func chainText(w io.Writer, chain vendors.Chain) {
	for i, link := range chain.Links {
		fmt.Fprintf(w, "%d. %s\n   issued by %s, valid until %s\n", i+1, subject(link.Subject), link.Issuer, link.NotAfter.Format(time.RFC3339))
	}
	if chain.Missing != "" {
		fmt.Fprintf(w, "missing: %s\n", chain.Missing)
		for _, url := range chain.IssuerAt {
			fmt.Fprintf(w, "  its certificate is at %s; fetch it, and `countersign ek-roots import` it\n", url)
		}
		if len(chain.IssuerAt) == 0 {
			fmt.Fprintln(w, "  the certificate names no URL of it; ask the vendor")
		}
	}
	fmt.Fprintln(w, chain.Verdict)
}

// subject names a certificate; those of EKs often have an empty one.
func subject(name string) string {
	if name == "" {
		return "(no subject: the TPM is named in the alternative name)"
	}
	return name
}
