package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/terminal"
)

// defaultSocket is where a broker with the default state folder listens.
const defaultSocket = "/var/lib/countersign/operator.sock"

// options are the flags of every verb.
type options struct {
	output   string
	socket   string
	address  string
	caSHA256 string
	cert     string
	key      string
}

func (o *options) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVarP(&o.output, "output", "o", "text", "output format: text or json")
	f.StringVar(&o.socket, "socket", env("COUNTERSIGN_SOCKET", defaultSocket), "the broker's local socket, for root on its machine")
	f.StringVar(&o.address, "address", os.Getenv("COUNTERSIGN_ADDRESS"), "the broker's https://HOST:PORT; without it, the local socket")
	f.StringVar(&o.caSHA256, "ca-sha256", os.Getenv("COUNTERSIGN_CA_SHA256"), "SHA-256 of the broker's CA certificate, as broker init printed it")
	f.StringVar(&o.cert, "cert", os.Getenv("COUNTERSIGN_CERT"), "the operator's certificate file")
	f.StringVar(&o.key, "key", os.Getenv("COUNTERSIGN_KEY"), "the operator's key file")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if o.output != "text" && o.output != "json" {
			return cli.Fail(cli.Usage, fmt.Errorf("-o %s: text or json", o.output))
		}
		return nil
	}
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// client connects as the operator of --cert, or as root on the local socket, until
// the program ends.
func (o *options) client(ctx context.Context) (countersignv1connect.OperatorServiceClient, error) {
	client, _, err := o.dial(ctx)
	return client, err
}

// dial connects; the second result ends the connection.
func (o *options) dial(ctx context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
	if o.address == "" {
		if _, err := os.Stat(o.socket); err != nil {
			return nil, nil, cli.Fail(exitUnreach, fmt.Errorf("no broker at %s (%w): start it, or name its socket by --socket (operator.sock in its state_dir), or another broker by --address, --ca-sha256, --cert and --key", o.socket, err))
		}
		transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", o.socket)
		}}
		return countersignv1connect.NewOperatorServiceClient(&http.Client{Transport: transport}, "http://broker", connect.WithInterceptors(api.Codes())), transport.CloseIdleConnections, nil
	}
	if o.caSHA256 == "" {
		return nil, nil, cli.Fail(cli.Usage, errors.New("--address needs --ca-sha256, which broker init printed: without it anybody could be the broker"))
	}
	cert, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return nil, nil, cli.Fail(cli.Usage, fmt.Errorf("--address needs the operator's --cert and --key: %w", err))
	}
	s, err := api.Dial(ctx, api.Peer{Addresses: []string{o.address}, CASHA256: strings.ToLower(o.caSHA256), Certificate: &cert, Now: faults.Now})
	if err != nil {
		return nil, nil, cli.Fail(exitUnreach, err)
	}
	return s.Operators, func() { _ = s.Close() }, nil
}

// show prints an answer: as JSON, or as text by the given function.
func (o *options) show(w io.Writer, m proto.Message, text func(io.Writer)) error {
	if o.output == "json" {
		b, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(api.WithoutCodes(m))
		if err != nil {
			return err
		}
		return compactJSON(w, b)
	}
	text(terminal.Writer{W: w})
	return nil
}

// print writes what has no message of the wire contract, in the same two forms.
func (o *options) print(w io.Writer, v any, text func(io.Writer)) error {
	if o.output == "json" {
		return json.NewEncoder(w).Encode(v)
	}
	text(terminal.Writer{W: w})
	return nil
}

// compactJSON undoes protojson's deliberate instability of spacing.
func compactJSON(w io.Writer, b []byte) error {
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(v)
}

// table writes aligned columns.
func table(w io.Writer, header string, rows func(row func(cells ...any))) {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, strings.ReplaceAll(header, " ", "\t"))
	rows(func(cells ...any) {
		text := make([]string, len(cells))
		for i, c := range cells {
			text[i] = strings.ReplaceAll(terminal.Printable(fmt.Sprint(c)), "\t", " ")
			if text[i] == "" {
				text[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(text, "\t"))
	})
	_ = t.Flush()
}

// keyValues reads "k=v" arguments, and "k-" as names to drop.
func keyValues(args []string) (set map[string]string, drop []string, err error) {
	set = map[string]string{}
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		switch {
		case ok && k != "":
			set[k] = v
		case strings.HasSuffix(a, "-") && len(a) > 1:
			drop = append(drop, strings.TrimSuffix(a, "-"))
		default:
			return nil, nil, cli.Fail(cli.Usage, fmt.Errorf("%q is neither k=v nor k-", a))
		}
	}
	return set, drop, nil
}

// no is an answer that scripts see by its exit code.
func no(format string, args ...any) error { return cli.Fail(cli.No, fmt.Errorf(format, args...)) }
