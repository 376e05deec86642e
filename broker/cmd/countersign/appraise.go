package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/ima"
	"github.com/countersign/countersign/broker/internal/verify/offline"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/cli"
)

// A recordFiles names where a record's parts are.
type recordFiles struct {
	dir, eventLog, userspace, ima, pcrs, quote, signature, ak string
}

func appraiseCommand(o *options) *cobra.Command {
	var files recordFiles
	var nonce, roots, set string
	cmd := &cobra.Command{
		Use:   "appraise --dir DIR | --event-log FILE --ima FILE --pcrs FILE …",
		Short: "Say what recorded evidence proves: quote, event log, IMA list, reference set",
		Long: `Appraises recorded evidence by the broker's own code, without a broker.

A folder may hold binary_bios_measurements, tpm2-measure.log, ima_binary_runtime_measurements or
ima_ascii_runtime_measurements, pcrs.txt (what tpm2_pcrread prints), quote.tpms_attest,
quote.tpmt_signature, ak.tpm2b_public or ak.pem, nonce.hex, ek.pem and ek_*_cert.der.
What isn't there is not checked.

Exit codes: 0 all that was given holds (pass), 1 something doesn't (fail), 2 the command line or a
file is wrong, 4 nothing failed, and something that was given or demanded isn't proven: the values of
the log's PCR 0 to 7 are not all there, a quote's AK is missing, there is nothing that --nonce or
--ek-roots could be checked with (not proven).`,
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			record, err := files.read()
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			opts := offline.Options{Now: time.Now(), Between: files.between()}
			if nonce != "" {
				if opts.Nonce, err = offline.ParseNonce(nonce); err != nil {
					return cli.Fail(cli.Usage, fmt.Errorf("--nonce: %w", err))
				}
			}
			if roots != "" {
				if opts.EKRoots, err = certificates(roots); err != nil {
					return cli.Fail(cli.Usage, err)
				}
			}
			if set != "" {
				content, err := referenceFile(set)
				if err != nil {
					return cli.Fail(cli.Usage, err)
				}
				opts.Reference = &content
			}
			report := offline.Appraise(record, opts)
			if err := o.print(cmd.OutOrStdout(), report, func(w io.Writer) { reportText(w, report) }); err != nil {
				return err
			}
			switch report.Verdict {
			case offline.Fail:
				return cli.Fail(cli.No, errors.New("the evidence does not hold"))
			case offline.NotProven:
				return cli.Fail(exitNotProven, errors.New("the evidence is not proven; the checks with the result not-checked name what is missing"))
			}
			return nil
		},
	}
	f := cmd.Flags()
	files.flags(cmd)
	f.StringVar(&nonce, "nonce", "", "hex of what the quote has to be bound to (default: nonce.hex in the folder)")
	f.StringVar(&roots, "ek-roots", "", "PEM certificates that EK certificates have to lead to")
	f.StringVar(&set, "reference", "", "reference set, as reference learn --dir and reference show --content write it")
	return cmd
}

func (r *recordFiles) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.dir, "dir", "", "folder with a record's files")
	f.StringVar(&r.eventLog, "event-log", "", "binary_bios_measurements")
	f.StringVar(&r.userspace, "userspace-log", "", "systemd's tpm2-measure.log")
	f.StringVar(&r.ima, "ima", "", "IMA list, binary or ASCII")
	f.StringVar(&r.pcrs, "pcrs", "", "what tpm2_pcrread prints")
	f.StringVar(&r.quote, "quote", "", "TPMS_ATTEST")
	f.StringVar(&r.signature, "signature", "", "TPMT_SIGNATURE")
	f.StringVar(&r.ak, "ak", "", "attestation key: TPM2B_PUBLIC, TPMT_PUBLIC or PEM")
	_ = cmd.MarkFlagDirname("dir")
}

// maxFile bounds what is read of one file.
const maxFile = 4*ima.MaxList + 1

// read reads what is there; a file that was named has to be.
func (r recordFiles) read() (record offline.Record, err error) {
	var errs []error
	get := func(named string, names ...string) []byte {
		if named != "" {
			b, err := readBounded(named)
			if err != nil {
				errs = append(errs, err)
			}
			return b
		}
		if r.dir == "" {
			return nil
		}
		for _, name := range names {
			b, err := readBounded(filepath.Join(r.dir, name))
			if err == nil {
				return b
			}
			if !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		return nil
	}
	if r.dir != "" {
		if info, err := os.Stat(r.dir); err != nil {
			return record, err
		} else if !info.IsDir() {
			return record, fmt.Errorf("--dir: %s is no folder", r.dir)
		}
	}
	record = offline.Record{
		EventLog: get(r.eventLog, "binary_bios_measurements"), UserspaceLog: get(r.userspace, "tpm2-measure.log"),
		IMA:    get(r.ima, "ima_binary_runtime_measurements", "ima_ascii_runtime_measurements"),
		Attest: get(r.quote, "quote.tpms_attest"), Signature: get(r.signature, "quote.tpmt_signature"), AK: get(r.ak, "ak.tpm2b_public", "ak.pem"),
		PCRs: get(r.pcrs, "pcrs.txt"), Nonce: get("", "nonce.hex"),
	}
	if r.dir != "" {
		record.EKCertificates, err = ekCertificates(r.dir, get("", "ek.pem"))
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return record, err
	}
	if record.EventLog == nil && record.IMA == nil && record.Attest == nil && record.PCRs == nil && len(record.EKCertificates) == 0 {
		return record, errors.New("no evidence was given: --dir names a folder with it, or --event-log, --ima, --pcrs, --quote single files")
	}
	return record, nil
}

// between are certificates that lie with a record, or in a folder ca beside it,
// and may lead to a root. What can't be read leads nowhere.
func (r recordFiles) between() (list []*x509.Certificate) {
	if r.dir == "" {
		return nil
	}
	for _, pattern := range []string{filepath.Join(r.dir, "*.pem"), filepath.Join(r.dir, "..", "ca", "*.pem")} {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			if found, err := certificates(name); err == nil {
				list = append(list, found...)
			}
		}
	}
	return list
}

// ekCertificates are a folder's; a key that stands beside them has to be that of
// the certificate of its kind.
func ekCertificates(dir string, keyPEM []byte) (list []offline.EKCertificate, err error) {
	var key []byte
	if block, _ := pem.Decode(keyPEM); block != nil {
		key = block.Bytes
	}
	names, err := filepath.Glob(filepath.Join(dir, "ek_*_cert.der"))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		der, err := readBounded(name)
		if err != nil {
			return nil, err
		}
		c := offline.EKCertificate{Name: filepath.Base(name), DER: der}
		if strings.Contains(c.Name, "rsa") { // ek.pem is of the RSA one, which every TPM has
			c.Key = key
		}
		list = append(list, c)
	}
	return list, nil
}

func readBounded(name string) ([]byte, error) { return bounded.ReadFile(name, maxFile-1) }

func certificates(file string) (list []*x509.Certificate, err error) {
	b, err := readBounded(file)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		list = append(list, cert)
	}
	if len(list) == 0 || len(bytes.TrimSpace(b)) > 0 {
		return nil, fmt.Errorf("%s: no certificates in PEM, or something else beside them", file)
	}
	return list, nil
}

func referenceFile(file string) (reference.Content, error) {
	b, err := readBounded(file)
	if err != nil {
		return reference.Content{}, err
	}
	c, err := reference.Parse(b)
	if err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func reportText(w io.Writer, r offline.Report) {
	table(w, "CHECK RESULT DETAIL", func(row func(...any)) {
		for _, c := range r.Checks {
			row(c.Name, c.Result, c.Detail)
		}
	})
	f := r.Facts
	pcrText(w, f.PCRs)
	fmt.Fprintln(w)
	if f.SecureBoot != nil {
		fmt.Fprintf(w, "secure boot: %v %s\n", *f.SecureBoot, f.SecureBootMode)
	}
	if f.KernelCommandLine != nil {
		fmt.Fprintf(w, "kernel command line: %s\n", *f.KernelCommandLine)
	}
	for _, c := range f.Components {
		fmt.Fprintf(w, "booted: PCR %2d %-12s %s\n", c.PCR, c.Kind, c.SHA256)
	}
	if f.IMA != nil {
		fmt.Fprintf(w, "ima: %d of %d entries proven, %d violations\n", f.IMA.Proven, f.IMA.Entries, f.IMA.Violations)
	}
	fmt.Fprintf(w, "verdict: %s\n", r.Verdict)
}

// pcrText lists what is known of each PCR, and the first event that limits it.
func pcrText(w io.Writer, list []boot.PCR) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintln(w)
	table(w, "PCR EVENTS PROVEN UNDERSTOOD FACTS LIMIT", func(row func(...any)) {
		for _, p := range list {
			limit := "-"
			if p.Limit != nil {
				limit = p.Limit.String()
				if p.NotUnderstood > 1 {
					limit = fmt.Sprintf("%s, and %d more", limit, p.NotUnderstood-1)
				}
			}
			facts := strings.Join(p.Facts, ",")
			if facts == "" {
				facts = "-"
			}
			row(p.Index, p.Events, p.Proven, p.Understood, facts, limit)
		}
	})
}
