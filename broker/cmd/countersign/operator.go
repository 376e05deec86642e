package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
)

func operatorCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "operator", Short: "Operators and their certificates"}
	var role, out string
	var ttl time.Duration
	add := &cobra.Command{Use: "add NAME", Short: "Make a key and a certificate for an operator: OUT.key and OUT.crt", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		if out == "" {
			out = args[0]
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: args[0]}}, key)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		// The key is on disk before anybody is told to trust it.
		if err := writeNew(out+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
			return err
		}
		r, err := client.AddOperator(cmd.Context(), connect.NewRequest(&v1.AddOperatorRequest{Name: args[0], Role: role, Csr: csr, Expires: timestamppb.New(faults.Now().Add(ttl))}))
		if err != nil {
			_ = os.Remove(out + ".key")
			return err
		}
		var chain []byte
		for _, c := range r.Msg.GetCertificate() {
			chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
		}
		if err := writeNew(out+".crt", chain, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s.key and %s.crt are written; from another machine:\n  countersign --address https://BROKER:PORT --ca-sha256 SHA256 --cert %s.crt --key %s.key status\n", out, out, out, out)
		return nil
	}}
	add.Flags().StringVar(&role, "role", "viewer", "viewer, responder, operator or admin")
	add.Flags().StringVar(&out, "out", "", "file name without ending (default NAME)")
	add.Flags().DurationVar(&ttl, "ttl", 90*24*time.Hour, "how long the certificate lives, a year at most")
	_ = add.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"viewer", "responder", "operator", "admin"}, cobra.ShellCompDirectiveNoFileComp))
	list := &cobra.Command{Use: "list", Short: "List operators and when their certificates end", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.ListOperators(cmd.Context(), connect.NewRequest(&v1.ListOperatorsRequest{}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			table(w, "NAME ROLE CREATED EXPIRES KEY", func(row func(...any)) {
				for _, op := range r.Msg.GetOperators() {
					row(op.GetName(), op.GetRole(), stampText(op.GetCreated()), stampText(op.GetExpires()), op.GetKeySha256()[:min(16, len(op.GetKeySha256()))])
				}
			})
		})
	}}
	remove := &cobra.Command{Use: "remove NAME", Short: "Revoke an operator certificate immediately", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		_, err = client.RemoveOperator(cmd.Context(), connect.NewRequest(&v1.RemoveOperatorRequest{Name: args[0]}))
		return err
	}}
	cmd.AddCommand(add, list, remove)
	return cmd
}

func writeNew(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

func joinTokenCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "join-token", Short: "One-use tokens that admit a host"}
	var name, reference string
	var ttl time.Duration
	create := &cobra.Command{Use: "create [k=v ...]", Short: "Make a token; the labels become the host's", RunE: func(cmd *cobra.Command, args []string) error {
		labels, _, err := keyValues(args)
		if err != nil {
			return err
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.CreateJoinToken(cmd.Context(), connect.NewRequest(&v1.CreateJoinTokenRequest{
			Name: name, Labels: labels, Reference: reference, Expires: timestamppb.New(faults.Now().Add(ttl))}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) { fmt.Fprintln(w, r.Msg.GetToken()) })
	}}
	create.Flags().StringVar(&name, "name", "", "the host's name (default: what it calls itself)")
	create.Flags().StringVar(&reference, "reference", "", "reference set that its PCRs must match")
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token is good, 30 days at most")
	cmd.AddCommand(create)
	return cmd
}

func statusCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show the broker, its hosts and leases in numbers", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.GetStatus(cmd.Context(), connect.NewRequest(&v1.GetStatusRequest{}))
		if err != nil {
			return err
		}
		return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
			m := r.Msg
			fmt.Fprintf(w, "broker %s, version %s, epoch %d\npolicy version %d\nvault: %s\n", m.GetBrokerId(), m.GetVersion(), m.GetEpoch(), m.GetPolicyVersion(), m.GetVault())
			fmt.Fprintf(w, "hosts: %s\nleases: %s\nopen findings: %s\n", countsText(m.GetHosts()), countsText(m.GetLeases()), countsText(m.GetFindings()))
			for _, a := range m.GetAlarms() {
				fmt.Fprintln(w, "ALARM:", a)
			}
		})
	}}
}
