// Command countersign-agent is the hosts' program: it proves its host and its
// programs, and delivers what they earn.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/attestors/process/collect"
	"github.com/countersign/countersign/attestors/tpm"
	tpmcollect "github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/deliver/ways"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/hostagent/internal/program/kinds"
	"github.com/countersign/countersign/hostagent/internal/supervisor"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/hclread"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/internal/terminal"
)

// version is set by the linker.
var version = "devel"

// exitWait is an exit code beside those of package cli: an operator has to approve first.
const exitWait = 3

const defaultConfig = "/etc/countersign/agent.hcl"

func main() { cli.Main(run) }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o := &options{}
	root := &cobra.Command{Use: "countersign-agent", Short: "Proves this host and its programs, and delivers the credentials that they earn",
		Version: version}
	root.PersistentFlags().StringVarP(&o.config, "config", "c", defaultConfig, "the agent's config file")
	root.PersistentFlags().StringVarP(&o.output, "output", "o", "text", "output format: text or json")
	root.AddCommand(joinCommand(o), serveCommand(o), statusCommand(o), inspectCommand(o), readyCommand(o), doctorCommand(o), configCommand(o), ekCommand(o))
	cli.Prepare(root)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(terminal.Writer{W: stderr})
	root.PersistentPreRun = func(*cobra.Command, []string) {
		if o.output == "text" {
			root.SetOut(terminal.Writer{W: stdout})
		}
	}
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(terminal.Writer{W: stderr}, "countersign-agent:", err)
	return cli.Code(err)
}

type options struct{ config, output string }

// client opens the host's state and TPM for a config.
func client(c *config.Agent, log *slog.Logger, now func() time.Time) (*attest.Client, error) {
	device, err := tpmcollect.Open(c.TPM)
	if err != nil {
		return nil, err
	}
	alg := tpm.P256
	if c.Key == "rsa2048" {
		alg = tpm.RSA2048
	}
	return attest.Open(attest.Options{Device: device, Logs: attest.Logs(c.EventLog, c.IMAList), StateDir: c.StateDir, RunDir: c.RunDir, AK: alg, Log: log, Now: now, Wall: faults.Now,
		Peer: api.Peer{Addresses: c.Broker.Addresses, CASHA256: c.Broker.CASHA256},
		Facts: func() *v1.HostFacts {
			boot, err := collect.BootID()
			if err != nil {
				log.Error("boot id", "err", err)
			}
			hostname, _ := os.Hostname()
			return &v1.HostFacts{BootId: boot, Hostname: hostname, Os: runtime.GOOS, AgentVersion: version}
		}})
}

func joinCommand(o *options) *cobra.Command {
	var tokenFile string
	var acceptNewLog bool
	cmd := &cobra.Command{Use: "join", Short: "Ask the broker to admit this host", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(o.config)
		if err != nil {
			return err
		}
		token, err := readToken(tokenFile, cmd.InOrStdin())
		if err != nil {
			return err
		}
		cl, err := client(c, cli.Log(c.LogFormat, cmd.ErrOrStderr()), faults.Now)
		if err != nil {
			return err
		}
		r, err := cl.Join(cmd.Context(), token, acceptNewLog)
		if err != nil {
			return err
		}
		if o.output == "json" {
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]any{"host_id": r.HostID, "pending": r.Pending}); err != nil {
				return err
			}
		}
		if r.Pending {
			return cli.Fail(exitWait, fmt.Errorf("host %s waits for an operator: `countersign host approve %s` (or reenrol, if it was known), then join again", r.HostID, r.HostID))
		}
		if o.output == "text" {
			fmt.Fprintf(cmd.OutOrStdout(), "joined as host %s\n", r.HostID)
		}
		return nil
	}}
	cmd.Flags().BoolVar(&acceptNewLog, "accept-new-log", false, "accept that the broker's audit log is a new one, or began a new epoch, after you asked its administrators")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with a join token, - for standard input (a token in argv would be everybody's)")
	return cmd
}

func readToken(file string, stdin io.Reader) (string, error) {
	if file == "" {
		return "", nil
	}
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	var token string
	if _, err := fmt.Fscan(io.LimitReader(in, 256), &token); err != nil {
		return "", fmt.Errorf("join token: %w", err)
	}
	return token, nil
}

func serveCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "serve", Short: "Keep this host's credentials in force", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(o.config)
		if err != nil {
			return err
		}
		if err := secret.ProtectProcess(); err != nil {
			return err
		}
		log := cli.Log(c.LogFormat, cmd.ErrOrStderr())
		now, err := supervisor.Clock(c.RunDir, faults.Now())
		if err != nil {
			return err
		}
		cl, err := client(c, log, now)
		if err != nil {
			return err
		}
		defer cl.Close()
		finder := program.New(kinds.All()...)
		defer finder.Close()
		s, err := supervisor.New(c, cl, finder, ways.All, log, now, faults.Now)
		if err != nil {
			return err
		}
		return s.Run(cmd.Context())
	}}
}

func statusCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show the host's credentials, and which program would fail first without a broker", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(o.config)
		if err != nil {
			return err
		}
		var st supervisor.Status
		if err := supervisor.Ask(cmd.Context(), c.RunDir, "GET", "/status", &st); err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if o.output == "json" {
			return json.NewEncoder(w).Encode(st)
		}
		proven := "never"
		if !st.Proved.IsZero() {
			proven = st.Now.Sub(st.Proved).Round(time.Second).String() + " ago"
		}
		fmt.Fprintf(w, "host %s, proven %s\n", st.HostID, proven)
		if !st.CertificateEnds.IsZero() {
			fmt.Fprintf(w, "host certificate until %s, renewed before that\n", st.CertificateEnds.UTC().Format(time.RFC3339))
		}
		if st.Attention != "" {
			fmt.Fprintln(w, "ATTENTION:", st.Attention)
		}
		if st.Problem != "" {
			fmt.Fprintln(w, "PROBLEM:", st.Problem)
		}
		t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
		fmt.Fprintln(t, "CREDENTIAL\tSTATE\tEXPIRES\tPROBLEM")
		for _, cr := range st.Credentials {
			expires := "-"
			if !cr.Expires.IsZero() {
				expires = cr.Expires.UTC().Format(time.RFC3339)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", cr.Name, cr.State, expires, cr.Problem)
		}
		if err := t.Flush(); err != nil {
			return err
		}
		if st.FailsFirst != "" && st.Problem != "" {
			fmt.Fprintf(w, "if this goes on, the program of %s fails first, at %s\n", st.FailsFirst, st.FailsAt.UTC().Format(time.RFC3339))
		}
		return nil
	}}
}

func inspectCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "inspect PID", Short: "Print what the broker would be told of a process", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		pid, err := strconv.Atoi(args[0])
		if err != nil || pid <= 0 {
			return cli.Fail(cli.Usage, fmt.Errorf("%q is no pid", args[0]))
		}
		finder := program.New(kinds.All()...)
		defer finder.Close()
		p, err := finder.Find(cmd.Context(), config.Process{PID: pid}, "")
		if err != nil {
			return err
		}
		b, err := p.Encode()
		if err != nil {
			return err
		}
		if o.output == "json" {
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			return err
		}
		var indented map[string]any
		if err := json.Unmarshal(b, &indented); err != nil {
			return err
		}
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(indented)
	}}
}

func readyCommand(o *options) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{Use: "ready NAME", Short: "Wait until a starting unit's credential is delivered: for ExecStartPre=+", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		c, err := config.Load(o.config)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		return supervisor.Ask(ctx, c.RunDir, "POST", "/ready/"+args[0], nil)
	}}
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// checkTemplates reports every template that deliver could not fill in.
func checkTemplates(name string, c *config.Agent) error {
	var p hclread.Problems
	for _, cr := range c.Credentials {
		for _, f := range cr.Files {
			if err := deliver.Validate(f.Template); err != nil {
				p = append(p, hclread.Problem{File: name, Message: fmt.Sprintf("credential %q: file %s: %v", cr.Name, f.Path, err)})
			}
		}
	}
	return p.Or()
}

func configCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "The agent's config file"}
	cmd.AddCommand(&cobra.Command{Use: "check [FILE]", Short: "Report every mistake in the config file", Args: cli.AtMost(1), RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			o.config = args[0]
		}
		c, err := config.Load(o.config)
		if err == nil {
			err = checkTemplates(o.config, c)
		}
		var problems hclread.Problems
		if o.output == "json" && (err == nil || errors.As(err, &problems)) {
			answer := map[string]any{"valid": err == nil, "problems": problems}
			if c != nil && len(c.Warnings()) > 0 {
				answer["warnings"] = c.Warnings()
			}
			if encodeErr := json.NewEncoder(cmd.OutOrStdout()).Encode(answer); encodeErr != nil {
				return encodeErr
			}
		}
		if err != nil {
			return err
		}
		if o.output == "text" {
			for _, w := range c.Warnings() {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is valid\n", o.config)
		}
		return nil
	}})
	return cmd
}
