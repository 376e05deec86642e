package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/replay"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/watch"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

func watchCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "watch", Short: "See where credentials are really used", PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
		// Most of what the watch holds is the ledger's index, which is no garbage:
		// waiting until there is as much again would double it.
		debug.SetGCPercent(20)
		return cmd.Root().PersistentPreRunE(cmd, args)
	}}
	cmd.AddCommand(watchServeCommand(), watchReplayCommand(o))
	return cmd
}

func watchServeCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Follow logs, find misuse of credentials, and respond",
		Args:  cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := watch.Load(file)
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			if err := secret.ProtectProcess(); err != nil {
				return err
			}
			b, log := c.Broker, cli.Log("text", cmd.ErrOrStderr())
			dial := func(ctx context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
				o := &options{socket: b.Socket, address: b.Address, caSHA256: b.CASHA256, cert: c.Certificate(), key: b.Key}
				return o.dial(ctx)
			}
			w, err := watch.Open(c, dial, log, faults.Now)
			if err != nil {
				return err
			}
			defer w.Close()
			go c.KeepCertificate(cmd.Context(), dial, log, faults.Now)
			return w.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&file, "config", "/etc/countersign/watch.hcl", "the watch's config file")
	return cmd
}

func watchReplayCommand(o *options) *cobra.Command {
	var file, configFile string
	var named []string
	cmd := &cobra.Command{
		Use:   "replay --ledger FILE --source KIND=FILE ...",
		Short: "Run the watch over recorded logs, and print what it finds",
		Long: `Holds recorded logs against the ledger that "countersign lease export" wrote, without a broker,
and prints a finding for each cause; with -o json a line each.

Kinds: ` + strings.Join(sightings.Kinds, ", ") + `. A FILE of - is standard input.
Accounts whose names Vault's database engine made for a role in the ledger are governed. A --config of the
watch's tells of others, of NATs and poolers, and of the log_line_prefix of its sensors.

Exit codes: 0 the logs were read, whatever was found, 1 a log or the ledger can't be read, 2 the command line is wrong.`,
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := &watch.Config{}
			if configFile != "" {
				var err error
				if c, err = watch.Load(configFile); err != nil {
					return cli.Fail(cli.Usage, err)
				}
			}
			sources, closeAll, err := openSources(named, c, cmd.InOrStdin())
			defer closeAll()
			if err != nil {
				return cli.Fail(cli.Usage, err)
			}
			index, closeLedger, err := openLedger(file)
			if err != nil {
				return err
			}
			defer closeLedger()
			book, err := replay.Run(index, c.World(), sources)
			if err != nil {
				return err
			}
			for _, s := range sources {
				if h := s.Reader.Health(); h.Unreadable > 0 {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: %d of %d lines can't be read; %s\n", s.Name, h.Unreadable, h.Lines, h.Sample)
				}
			}
			return printFindings(cmd.OutOrStdout(), o, book.Sorted())
		},
	}
	cmd.Flags().StringVar(&file, "ledger", "", "what was issued, as lease export writes it")
	cmd.Flags().StringVar(&configFile, "config", "", "a config file of watch serve")
	cmd.Flags().StringArrayVar(&named, "source", nil, "a log, as KIND=FILE; may be repeated")
	_ = cmd.MarkFlagRequired("ledger")
	_ = cmd.MarkFlagRequired("source")
	return cmd
}

func openLedger(name string) (*ledger.Index, func(), error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	closeFile := func() { _ = file.Close() }
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: entries are read from it as they are needed", name)
	}
	if err != nil {
		closeFile()
		return nil, nil, err
	}
	index := ledger.NewIndex(file)
	if err := index.Load(info.Size()); err != nil {
		closeFile()
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return index, closeFile, nil
}

// openSources opens the logs of KIND=FILE words. What it returns closes them, on
// an error too.
func openSources(named []string, c *watch.Config, stdin io.Reader) (sources []replay.Source, closeAll func(), err error) {
	var open []*os.File
	closeAll = func() {
		for _, f := range open {
			_ = f.Close()
		}
	}
	for _, word := range named {
		kind, name, ok := strings.Cut(word, "=")
		if !ok || name == "" {
			return nil, closeAll, fmt.Errorf("--source %s: want KIND=FILE", word)
		}
		reader, err := sightings.New(kind, name, sightings.Options{Now: time.Now, LogLinePrefix: c.LogLinePrefix(kind)})
		if err != nil {
			return nil, closeAll, fmt.Errorf("--source %s: %w", word, err)
		}
		s := replay.Source{Name: name, Kind: kind, Log: stdin, Reader: reader}
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return nil, closeAll, err
			}
			open = append(open, f)
			s.Log = f
		}
		sources = append(sources, s)
	}
	if len(sources) == 0 {
		return nil, closeAll, errors.New("no --source")
	}
	return sources, closeAll, nil
}

// printFindings prints a table, or a line of JSON for each.
func printFindings(w io.Writer, o *options, list []*finding.Finding) error {
	if o.output == "json" {
		e := json.NewEncoder(w)
		for _, f := range list {
			if err := e.Encode(f); err != nil {
				return err
			}
		}
		return nil
	}
	table(w, "SEVERITY DETECTOR LEASE ACCOUNT FIRST COUNT WHY", func(row func(...any)) {
		for _, f := range list {
			row(f.Severity, f.Detector, f.Lease, f.Account, f.First.UTC().Format(time.RFC3339), f.Count, f.Why)
		}
	})
	return nil
}
