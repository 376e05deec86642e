package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"github.com/hashicorp/vault/api"
	"github.com/spf13/cobra"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/cli"
)

// vaultTarget is a Vault as its own users name it.
type vaultTarget struct{ address, ca, namespace string }

func vaultCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "vault", Short: "What the scopes need of Vault: print it, check it, apply it"}
	var to vaultTarget
	withTarget := func(c *cobra.Command) *cobra.Command {
		f := c.Flags()
		f.StringVar(&to.address, "vault-addr", os.Getenv("VAULT_ADDR"), "Vault's https://HOST:PORT ($VAULT_ADDR)")
		f.StringVar(&to.ca, "vault-ca", os.Getenv("VAULT_CACERT"), "file with the CA of Vault's certificate ($VAULT_CACERT)")
		f.StringVar(&to.namespace, "vault-namespace", os.Getenv("VAULT_NAMESPACE"), "Vault's namespace ($VAULT_NAMESPACE)")
		return c
	}
	cmd.AddCommand(
		&cobra.Command{Use: "policy DIR", Short: "Print the smallest policies and token roles for a folder of scopes", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
			needs, err := vaultNeeds(args[0])
			if err != nil {
				return err
			}
			return printNeeds(cmd, o, needs)
		}},
		withTarget(&cobra.Command{Use: "verify DIR", Short: "Hold a Vault against the scopes; missing and excess rights fail", Args: cli.Exactly(1),
			Long: "Holds a Vault against what the scopes in DIR need, with the operator's token in VAULT_TOKEN.\nOne line for each finding; exit code 1 where there are any.",
			RunE: func(cmd *cobra.Command, args []string) error {
				needs, client, err := to.open(args[0])
				if err != nil {
					return err
				}
				return verifyVault(cmd, o, client, needs, nil)
			}}),
		withTarget(&cobra.Command{Use: "setup DIR", Short: "Apply policies and token roles with the operator's token", Args: cli.Exactly(1),
			Long: "Writes what `countersign vault policy` prints and turns on " + "X-Correlation-Id in Vault's audit log, with the operator's token in\n" +
				"VAULT_TOKEN; then verifies. It deletes nothing and touches no secrets engine.\n\n" +
				"The broker's login is yours to make: a token, an AppRole or a TLS certificate role with the policy " + vault.BrokerPolicy + " alone, as\n\n" +
				"  vault write auth/approle/role/countersign token_policies=" + vault.BrokerPolicy + " token_no_default_policy=true token_ttl=1h",
			RunE: func(cmd *cobra.Command, args []string) error {
				needs, client, err := to.open(args[0])
				if err != nil {
					return err
				}
				changed, err := vault.Setup(cmd.Context(), client, needs)
				if o.output == "text" || err != nil {
					for _, line := range changed {
						fmt.Fprintln(cmd.OutOrStdout(), line)
					}
				}
				if err != nil {
					return cli.Fail(exitUnreach, err)
				}
				return verifyVault(cmd, o, client, needs, changed)
			}}),
		withTarget(&cobra.Command{Use: "orphans", Short: "List tokens whose lease the broker doesn't know, by accessor", Args: cli.Exactly(0),
			Long: "Lists what Vault has of the token roles countersign-* and the broker's journal hasn't, as after a restore,\n" +
				"with the operator's token in VAULT_TOKEN. vault token revoke -accessor ends one.",
			RunE: func(cmd *cobra.Command, _ []string) error { return vaultOrphans(cmd, o, to) }}),
	)
	return cmd
}

// vaultOrphans lists tokens whose lease the broker doesn't know: what was
// issued after the backup that a store was restored from, and that no host
// has spoken for since.
func vaultOrphans(cmd *cobra.Command, o *options, to vaultTarget) error {
	client, err := to.client()
	if err != nil {
		return err
	}
	tokens, err := vault.Tokens(cmd.Context(), client)
	if err != nil {
		return cli.Fail(exitUnreach, err)
	}
	known := map[string]bool{}
	if _, err := eachLease(cmd.Context(), o, &v1.ListLeasesRequest{}, paging{}, func(l *v1.Lease) error {
		known[l.GetId()] = true
		return nil
	}); err != nil {
		return err
	}
	orphans := slices.DeleteFunc(tokens, func(t vault.Token) bool { return known[t.Lease] })
	if o.output == "json" {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]any{"orphans": append([]vault.Token{}, orphans...)})
	}
	table(cmd.OutOrStdout(), "ACCESSOR LEASE HOST SCOPE SECONDS", func(row func(...any)) {
		for _, t := range orphans {
			row(t.Accessor, t.Lease, t.Host, t.Scope, t.TTL)
		}
	})
	return nil
}

func vaultNeeds(dir string) (vault.Needs, error) {
	files, err := policy.LoadDir(dir)
	if err != nil {
		return vault.Needs{}, cli.Fail(cli.Usage, err)
	}
	set, err := issuers.Parse(files)
	if err != nil {
		return vault.Needs{}, no("%w", err)
	}
	return vault.Requirements(set), nil
}

func (t vaultTarget) open(dir string) (vault.Needs, *api.Client, error) {
	needs, err := vaultNeeds(dir)
	if err != nil {
		return needs, nil, err
	}
	client, err := t.client()
	return needs, client, err
}

func (t vaultTarget) client() (*api.Client, error) {
	token := os.Getenv("VAULT_TOKEN")
	if t.address == "" || token == "" {
		return nil, cli.Fail(cli.Usage, fmt.Errorf("--vault-addr or VAULT_ADDR says where Vault is, and VAULT_TOKEN holds the operator's token"))
	}
	client, err := vault.Client(t.address, t.ca, t.namespace, token)
	if err != nil {
		return nil, cli.Fail(cli.Usage, err)
	}
	return client, nil
}

// verifyVault prints the findings, and beside them in JSON what was changed
// before.
func verifyVault(cmd *cobra.Command, o *options, client *api.Client, needs vault.Needs, changed []string) error {
	findings, err := vault.Verify(cmd.Context(), client, needs)
	if err != nil {
		return cli.Fail(exitUnreach, err)
	}
	out := cmd.OutOrStdout()
	if o.output == "json" {
		report := map[string]any{"findings": append([]vault.Finding{}, findings...)}
		if changed != nil {
			report["changed"] = changed
		}
		if err := json.NewEncoder(out).Encode(report); err != nil {
			return err
		}
	} else {
		for _, f := range findings {
			fmt.Fprintln(out, f)
		}
	}
	if len(findings) > 0 {
		return no("Vault is not as the scopes need it: %d findings", len(findings))
	}
	if o.output == "text" {
		fmt.Fprintf(out, "Vault is as %d scopes need it, and no more\n", len(needs.Scopes))
	}
	return nil
}

func printNeeds(cmd *cobra.Command, o *options, needs vault.Needs) error {
	out := cmd.OutOrStdout()
	if o.output == "json" {
		return json.NewEncoder(out).Encode(needs)
	}
	fmt.Fprintf(out, "# policy %s\n%s", needs.Broker.Name, needs.Broker.HCL())
	for _, s := range needs.Scopes {
		fmt.Fprintf(out, "\n# policy %s\n%s\n# %s\n", s.Policy.Name, s.Policy.HCL(), s.Role.Command())
	}
	return nil
}
