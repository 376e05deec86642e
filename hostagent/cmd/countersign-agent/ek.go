package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/attestors/tpm"
	tpmcollect "github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/ekcert"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/cli"
)

// maxEKFile bounds a file that is imported.
const maxEKFile = 64 << 10

func ekCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "ek", Short: "Certificates of the TPM's endorsement keys",
		Long: `The certificate of an endorsement key (EK) names the maker of the TPM. The
broker gives a host with one the tier "certified", and a host without one "known".

Most TPMs hold their certificates themselves, and there is nothing to do. The
makers of some firmware TPMs (AMD, and Intel before the 11th generation) serve
them by URL instead. These commands show which keys have a certificate, and bring
in those that the TPM doesn't hold. Only "ek fetch" connects to anything.`}
	cmd.AddCommand(ekListCommand(o), ekFetchCommand(o), ekImportCommand(o))
	return cmd
}

// ekHost is what the ek commands work with.
type ekHost struct {
	stateDir     string
	manufacturer string
	eks          []tpm.EK // as the TPM has them
}

func openEKs(ctx context.Context, file string) (*ekHost, error) {
	c, err := config.Load(file)
	if err != nil {
		return nil, err
	}
	device, err := tpmcollect.Open(c.TPM)
	if err != nil {
		return nil, err
	}
	info, err := device.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w (`countersign-agent doctor` says more)", err)
	}
	eks, err := device.EKs(ctx)
	if err != nil {
		return nil, err
	}
	return &ekHost{c.StateDir, info.Manufacturer, eks}, nil
}

func ekListCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List the endorsement keys and where their certificates are", Args: cli.Exactly(0),
		Long: `List the TPM's endorsement keys. CERTIFICATE is "tpm" if the TPM holds the key's
certificate, "kept" if it was fetched or imported, or "none". If the TPM's maker
may serve it, the URL is shown. Nothing is fetched.`,
		Example: "  countersign-agent ek list\n  countersign-agent ek list -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := openEKs(cmd.Context(), o.config)
			if err != nil {
				return err
			}
			keys := ekcert.List(h.stateDir, h.manufacturer, h.eks)
			w := cmd.OutOrStdout()
			if o.output == "json" {
				return json.NewEncoder(w).Encode(map[string]any{"manufacturer": h.manufacturer, "keys": keys})
			}

			t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
			fmt.Fprintln(t, "EK HASH\tALGORITHM\tCERTIFICATE\tEXPIRES")
			for _, k := range keys {
				expires := "-"
				if !k.NotAfter.IsZero() {
					expires = k.NotAfter.UTC().Format(time.RFC3339)
				}
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", k.Hash, k.Algorithm, k.Source, expires)
			}
			if err := t.Flush(); err != nil {
				return err
			}
			for _, k := range keys {
				switch {
				case k.Problem != "":
					fmt.Fprintf(w, "PROBLEM: %s\n", k.Problem)
				case k.Source == ekcert.None && k.URL != "":
					fmt.Fprintf(w, "%s: `countersign-agent ek fetch` asks %s for it at %s\n", k.Algorithm, ekcert.Maker(h.manufacturer), k.URL)
				}
			}
			return nil
		}}
}

// An ekResult is what came of one key, or of one file.
type ekResult struct {
	Hash      string `json:"ek_hash,omitempty"`
	Algorithm string `json:"algorithm,omitempty"`
	From      string `json:"from"` // a URL or a file
	Result    string `json:"result"`
	File      string `json:"file,omitempty"`
	Replaced  string `json:"replaced,omitempty"`
	Issuer    string `json:"issuer,omitempty"`
	IssuerURL string `json:"issuer_url,omitempty"`
	Error     string `json:"error,omitempty"`
}

// Results of an ekResult.
const (
	ekKept      = "kept"       // it is new
	ekUnchanged = "unchanged"  // it was kept before
	ekNotServed = "not-served" // the maker has none
	ekFailed    = "failed"
)

func (r *ekResult) fail(result string, err error) {
	r.Result, r.Error = result, err.Error()
}

// keep keeps cert for ek.
func (r *ekResult) keep(dir string, ek tpm.EK, cert *x509.Certificate) {
	kept, err := ekcert.Keep(dir, ek, cert)
	if err != nil {
		r.fail(ekFailed, err)
		return
	}
	r.Result, r.File, r.Replaced, r.Issuer = ekKept, kept.File, kept.Replaced, cert.Issuer.String()
	if kept.Unchanged {
		r.Result = ekUnchanged
	}
	if len(cert.IssuingCertificateURL) > 0 {
		r.IssuerURL = cert.IssuingCertificateURL[0]
	}
}

func (r *ekResult) print(w io.Writer) {
	switch r.Result {
	case ekKept, ekUnchanged:
		fmt.Fprintf(w, "  %s as %s\n  issuer: %q\n", r.Result, r.File, r.Issuer)
		if r.IssuerURL != "" {
			fmt.Fprintf(w, "  the issuer's own certificate: %q\n", r.IssuerURL)
		}
		if r.Replaced != "" {
			fmt.Fprintf(w, "  it replaces another certificate, which is now %s\n", r.Replaced)
		}
	default:
		fmt.Fprintf(w, "  %s: %s\n", r.Result, r.Error)
	}
}

// ekNext is what to do when a certificate is kept.
const ekNext = "Next: `countersign-agent join`, also if this host has joined before. The broker makes the tier certified if its ek_roots hold the issuer and the maker's root."

// report prints results as JSON, or what to do next, and counts them.
func (o *options) report(w io.Writer, results []*ekResult) (count map[string]int, err error) {
	count = map[string]int{}
	for _, r := range results {
		count[r.Result]++
	}

	if o.output == "json" {
		err = json.NewEncoder(w).Encode(map[string]any{"results": results})
	} else if count[ekKept]+count[ekUnchanged] > 0 {
		_, err = fmt.Fprintln(w, ekNext)
	}
	return count, err
}

func ekFetchCommand(o *options) *cobra.Command {
	var proxy string
	cmd := &cobra.Command{Use: "fetch", Short: "Fetch missing certificates of endorsement keys from the TPM's maker", Args: cli.Exactly(0),
		Long: `Ask the TPM's maker, by HTTPS, for the certificate of each endorsement key that has
none, and keep what is for these keys. The URL contains a hash of the public key;
nothing else about this host is sent. Nothing is ever fetched but by this command.

The proxy is the one in HTTPS_PROXY (see also NO_PROXY), unless --proxy names
another. If this host may not connect at all, "ek list" prints the URLs: download
them on another machine, and bring the files in by "ek import".

Exit code 1 means that a fetch failed, or that the maker has no certificate for any
of the keys.`,
		Example: "  countersign-agent ek fetch\n  countersign-agent ek fetch --proxy http://proxy.example.com:3128",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := ekcert.NewClient(proxy)
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			h, err := openEKs(cmd.Context(), o.config)
			if err != nil {
				return err
			}
			text := cmd.OutOrStdout()
			if o.output == "json" {
				text = io.Discard
			}

			results, err := h.fetch(cmd.Context(), client, text, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			count, err := o.report(cmd.OutOrStdout(), results)
			switch {
			case err != nil:
				return err
			case count[ekFailed] > 0:
				return fmt.Errorf("fetching failed for %d of %d endorsement keys", count[ekFailed], len(results))
			case count[ekNotServed] > 0 && count[ekKept] == 0 && !h.certified():
				return errors.New("the maker has no certificate for any of the endorsement keys, as for a TPM whose seed was changed " +
					"(register the host by `countersign host add NAME --ek-hash` instead)")
			}
			return nil
		}}
	cmd.Flags().StringVar(&proxy, "proxy", "", "proxy to use, as http://HOST:PORT (a password in argv would be everybody's: set HTTPS_PROXY instead)")
	return cmd
}

// fetch asks for the certificate of each key that has none, and keeps it.
func (h *ekHost) fetch(ctx context.Context, client *ekcert.Client, text, warnings io.Writer) ([]*ekResult, error) {
	eks, problems := ekcert.Complete(h.stateDir, h.eks)
	for _, problem := range problems {
		fmt.Fprintln(warnings, "warning:", problem)
	}

	results := []*ekResult{}
	for _, ek := range eks {
		if len(ek.Certificate) > 0 {
			continue
		}
		address, err := ekcert.URL(h.manufacturer, ek)
		if err != nil && h.certified() {
			continue // one is enough
		}
		if err != nil {
			return nil, fmt.Errorf("%w (if you have a certificate in a file: `countersign-agent ek import FILE`)", err)
		}

		fmt.Fprintf(text, "%s EK %s: asking %s\n", algorithm(ek), ek.Hash(), address)
		r := &ekResult{Hash: ek.Hash().String(), Algorithm: algorithm(ek), From: address}
		cert, err := client.Fetch(ctx, address, ek)
		switch {
		case errors.Is(err, ekcert.ErrNotServed):
			r.fail(ekNotServed, err)
		case err != nil:
			r.fail(ekFailed, err)
		default:
			r.keep(h.stateDir, ek, cert)
		}
		r.print(text)
		results = append(results, r)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}

	if len(results) == 0 {
		fmt.Fprintln(text, "nothing to fetch: `countersign-agent ek list` shows the certificates that there are")
	}
	return results, nil
}

// certified reports whether one of the keys has a certificate, be it in the TPM
// or kept.
func (h *ekHost) certified() bool {
	eks, _ := ekcert.Complete(h.stateDir, h.eks)
	return len(eks) > 0 && len(eks[0].Certificate) > 0
}

// algorithm names the kind of an EK that collect found.
func algorithm(ek tpm.EK) string {
	key, err := x509.ParsePKIXPublicKey(ek.Public)
	if err != nil {
		return ""
	}
	alg, _ := tpm.AlgorithmOf(key)
	return string(alg)
}

func ekImportCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "import FILE...", Short: "Import certificates of endorsement keys from files",
		Long: `Keep the certificate in each FILE, if it is for an endorsement key of this TPM.
A file is DER, PEM, or the JSON that Intel's service answers; "-" is standard input.
For the broker it makes no difference where a certificate came from.

To take a certificate back, remove its file from the agent's state folder.`,
		Example: "  countersign-agent ek import ek.der\n  curl -s \"$URL\" | ssh host countersign-agent ek import -",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cli.Fail(cli.Usage, fmt.Errorf("usage: %s", cmd.UseLine()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := openEKs(cmd.Context(), o.config)
			if err != nil {
				return err
			}

			results := []*ekResult{}
			for _, path := range args {
				r := &ekResult{From: path}
				results = append(results, r)
				if err := h.importFile(r, path, cmd.InOrStdin()); err != nil {
					r.fail(ekFailed, fmt.Errorf("import %s: %w", path, err))
				}
				if o.output == "text" {
					fmt.Fprintf(cmd.OutOrStdout(), "%s:\n", path)
					r.print(cmd.OutOrStdout())
				}
			}
			count, err := o.report(cmd.OutOrStdout(), results)
			if err == nil && count[ekFailed] > 0 {
				err = fmt.Errorf("%d of %d files were not imported", count[ekFailed], len(args))
			}
			return err
		}}
}

func (h *ekHost) importFile(r *ekResult, path string, stdin io.Reader) error {
	content, err := readEKFile(path, stdin)
	if err != nil {
		return err
	}
	cert, err := ekcert.Parse(content)
	if err != nil {
		return fmt.Errorf("it is no certificate: %w", err)
	}
	ek, ok := ekcert.Match(cert, h.eks)
	if !ok {
		return fmt.Errorf("the certificate is for none of this TPM's %d endorsement keys (`countersign-agent ek list` shows them; is the file another host's?)", len(h.eks))
	}

	r.Hash, r.Algorithm = ek.Hash().String(), algorithm(ek)
	r.keep(h.stateDir, ek, cert)
	return nil
}

func readEKFile(path string, stdin io.Reader) ([]byte, error) {
	if path != "-" {
		return bounded.ReadFile(path, maxEKFile)
	}
	b, err := io.ReadAll(io.LimitReader(stdin, maxEKFile+1))
	if err == nil && len(b) > maxEKFile {
		err = fmt.Errorf("it has more than %d bytes", maxEKFile)
	}
	return b, err
}
