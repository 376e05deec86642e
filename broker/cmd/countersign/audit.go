package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/internal/checkpoint"
	"github.com/countersign/countersign/internal/cli"
)

func auditCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read and verify the audit log"}
	cmd.AddCommand(auditTailCommand(o), auditExportCommand(o), auditReceiptCommand(o), auditCheckCommand(), auditVerifyCommand(o))
	return cmd
}

func streamAudit(cmd *cobra.Command, o *options, from uint64, follow bool, each func(*v1.AuditRecord) error) error {
	client, err := o.client(cmd.Context())
	if err != nil {
		return err
	}
	stream, err := client.ReadAudit(cmd.Context(), connect.NewRequest(&v1.ReadAuditRequest{From: from, Follow: follow}))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	for stream.Receive() {
		if err := each(stream.Msg()); err != nil {
			return err
		}
	}
	if cmd.Context().Err() != nil {
		return nil // interrupted
	}
	return stream.Err()
}

func auditTailCommand(o *options) *cobra.Command {
	var follow bool
	var lines int64
	cmd := &cobra.Command{Use: "tail", Short: "Show the newest records", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		head, err := client.AuditCheckpoint(cmd.Context(), connect.NewRequest(&v1.AuditCheckpointRequest{}))
		if err != nil {
			return err
		}
		c, err := openCheckpoint(head.Msg)
		if err != nil {
			return err
		}
		return streamAudit(cmd, o, uint64(max(c.Size-lines, 0)), follow, func(r *v1.AuditRecord) error {
			if o.output == "json" {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", r.GetJson())
				return err
			}
			rec, err := event.Parse(r.GetJson())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d %s %s %s host=%s scope=%s lease=%s %s\n", rec.Index, rec.Time.Format("2006-01-02T15:04:05.000Z"), rec.Kind, rec.Actor,
				rec.Host, rec.Scope, rec.Lease, summary(rec))
			return err
		})
	}}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new records")
	cmd.Flags().Int64VarP(&lines, "lines", "n", 20, "how many records")
	return cmd
}

// summary is of a record's event what fits on a line.
func summary(r event.Record) string {
	e, err := r.Event()
	if err != nil {
		return "not understood: " + strconv.Quote(err.Error())
	}
	if why := event.Why(e); why != "" {
		return strconv.Quote(why)
	}
	return ""
}

func openCheckpoint(m *v1.AuditCheckpointResponse) (checkpoint.Checkpoint, error) {
	v, err := note.NewVerifier(m.GetVerifierKey())
	if err != nil {
		return checkpoint.Checkpoint{}, err
	}
	return checkpoint.Open(m.GetCheckpoint(), v)
}

func auditExportCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "export", Short: "Write the whole log as JSON lines, one record each, exactly as it is hashed", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		return streamAudit(cmd, o, 0, false, func(r *v1.AuditRecord) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", r.GetJson())
			return err
		})
	}}
}

// A receipt proves one record without the broker.
type receipt struct {
	Record     string   `json:"record"` // base64 of the record as it is hashed
	Checkpoint string   `json:"checkpoint"`
	Proof      [][]byte `json:"proof"`
	Key        string   `json:"key"` // compare it with the broker's audit.pub
}

func auditReceiptCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "receipt INDEX", Short: "Write a proof that a record is in the log", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		index, err := strconv.ParseUint(args[0], 10, 63)
		if err != nil {
			return cli.Fail(cli.Usage, fmt.Errorf("%q is no record's index", args[0]))
		}
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		r, err := client.AuditReceipt(cmd.Context(), connect.NewRequest(&v1.AuditReceiptRequest{Index: index}))
		if err != nil {
			return err
		}
		head, err := client.AuditCheckpoint(cmd.Context(), connect.NewRequest(&v1.AuditCheckpointRequest{}))
		if err != nil {
			return err
		}
		return json.NewEncoder(cmd.OutOrStdout()).Encode(receipt{
			Record: base64.StdEncoding.EncodeToString(r.Msg.GetRecord()), Checkpoint: string(r.Msg.GetCheckpoint()), Proof: r.Msg.GetProof(), Key: head.Msg.GetVerifierKey(),
		})
	}}
}

func auditCheckCommand() *cobra.Command {
	var keyFile string
	cmd := &cobra.Command{Use: "check RECEIPT", Short: "Check a receipt, without the broker", Args: cli.Exactly(1), RunE: func(cmd *cobra.Command, args []string) error {
		b, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		var r receipt
		if err := json.Unmarshal(b, &r); err != nil {
			return no("%s is no receipt: %v", args[0], err)
		}
		believed := "the key in the receipt; --key-file holds it against the broker's"
		if keyFile != "" {
			believed = keyFile
			key, err := os.ReadFile(keyFile)
			if err != nil {
				return err
			}
			r.Key = string(bytes.TrimSpace(key))
		}
		v, err := note.NewVerifier(r.Key)
		if err != nil {
			return no("the key: %v", err)
		}
		record, err := base64.StdEncoding.DecodeString(r.Record)
		if err != nil {
			return no("%s is no receipt: %v", args[0], err)
		}
		rec, err := audit.CheckReceipt(v, record, []byte(r.Checkpoint), r.Proof)
		if err != nil {
			return no("%v", err)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "record %d (%s at %s) is in the log of %s, by %s\n", rec.Index, rec.Kind, rec.Time.Format(time.RFC3339), v.Name(), believed)
		return nil
	}}
	cmd.Flags().StringVar(&keyFile, "key-file", "", "the broker's audit.pub, got another way than with the receipt")
	return cmd
}

// auditVerifyCommand hashes every record again and holds the root against the
// signed head.
func auditVerifyCommand(o *options) *cobra.Command {
	return &cobra.Command{Use: "verify", Short: "Hash the whole log again and hold it against its signed head", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		client, err := o.client(cmd.Context())
		if err != nil {
			return err
		}
		m, err := client.AuditCheckpoint(cmd.Context(), connect.NewRequest(&v1.AuditCheckpointRequest{}))
		if err != nil {
			return err
		}
		head, err := openCheckpoint(m.Msg)
		if err != nil {
			return no("%v", err)
		}
		enough := errors.New("enough")
		var tree audit.Tree
		p := newProgress(cmd.ErrOrStderr())
		err = streamAudit(cmd, o, 0, false, func(r *v1.AuditRecord) error {
			if tree.Size() == head.Size {
				return enough // came after the head
			}
			tree.Append(r.GetJson())
			p.show("records", tree.Size(), head.Size)
			return nil
		})
		p.end()
		if err != nil && !errors.Is(err, enough) {
			return err
		}
		if tree.Size() != head.Size {
			return no("the signed head speaks of %d records, the log has %d", head.Size, tree.Size())
		}
		root, err := tree.Root()
		if err != nil {
			return err
		}
		if root != head.Root {
			return no("the records hash to %s, the signed head says %s: the log was changed", root, head.Root)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%d records of epoch %d match the signed head %s\n", head.Size, head.Epoch, root)
		return nil
	}}
}
