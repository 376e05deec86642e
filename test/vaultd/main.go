// Command vaultd is a development Vault for the tests and the demo: a real
// Vault core and its HTTP API, with only the engines this project meets (kv,
// database with PostgreSQL, pki, ssh, transit; approle, cert, jwt and token
// auth; file and socket audit), built in minutes from the Go module proxy where
// no vault or bao command is installed.
//
// It starts sealed, and is initialised and unsealed over the API as any Vault is.
// It locks no memory and has no hardening: keep nothing in it. Vault's licence
// (BUSL-1.1) allows development use; that is why this module stands apart from
// the product's.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	jwt "github.com/hashicorp/vault-plugin-auth-jwt"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/audit"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/database"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/ssh"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/plugins/database/postgresql"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

func main() {
	var o options
	flag.StringVar(&o.addr, "addr", "127.0.0.1:8200", "address to listen on")
	flag.StringVar(&o.storage, "storage", "inmem", "storage directory, or inmem")
	flag.StringVar(&o.tlsCert, "tls-cert", "", "listener's certificate (PEM)")
	flag.StringVar(&o.tlsKey, "tls-key", "", "listener's key (PEM)")
	flag.BoolVar(&o.plain, "plain", false, "serve HTTP without TLS")
	flag.Parse()
	log := hclog.New(&hclog.LoggerOptions{Name: "vaultd", Level: hclog.Info, Output: os.Stderr})
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, log); err != nil {
		log.Error("vaultd ends", "error", err)
		os.Exit(1)
	}
}

type options struct {
	addr, storage   string
	tlsCert, tlsKey string
	plain           bool
}

func run(ctx context.Context, o options, log hclog.Logger) error {
	if o.plain == (o.tlsCert != "" && o.tlsKey != "") {
		return errors.New("give either -plain or both -tls-cert and -tls-key")
	}
	storage, err := openStorage(o.storage, log)
	if err != nil {
		return fmt.Errorf("storage: %w", err)
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical:        storage,
		BuiltinRegistry: registry{},
		LogicalBackends: map[string]logical.Factory{"kv": kv.Factory},
		AuditBackends: map[string]audit.Factory{
			"file":   audit.NewFileBackend,
			"socket": audit.NewSocketBackend,
		},
		DisableMlock: true,
		Logger:       log,
	})
	if err != nil {
		return err
	}
	defer core.Shutdown()

	listener, err := net.Listen("tcp", o.addr)
	if err != nil {
		return err
	}
	if !o.plain {
		pair, err := tls.LoadX509KeyPair(o.tlsCert, o.tlsKey)
		if err != nil {
			return err
		}
		listener = tls.NewListener(listener, &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{pair},
			NextProtos:   []string{"h2", "http/1.1"},
			ClientAuth:   tls.RequestClientCert, // for cert auth, which verifies it
		})
	}
	server := &http.Server{
		Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{
			Core: core,
			ListenerConfig: &configutil.Listener{
				Type:               "tcp",
				Address:            o.addr,
				MaxRequestSize:     vaulthttp.DefaultMaxRequestSize,
				MaxRequestDuration: vault.DefaultMaxRequestDuration,
			},
		}),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       5 * time.Minute,
		ErrorLog:          log.StandardLogger(nil),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	log.Info("serving", "address", listener.Addr().String(), "tls", !o.plain)
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return server.Close()
	}
}

func openStorage(where string, log hclog.Logger) (physical.Backend, error) {
	if where == "inmem" {
		return inmem.NewInmem(nil, log)
	}
	return file.NewFileBackend(map[string]string{"path": where}, log)
}

// registry names the plugins that are built in. Vault looks up auth methods and
// secrets engines here as it does its database plugins.
type registry struct{}

var builtins = map[consts.PluginType]map[string]any{
	consts.PluginTypeCredential: {
		"approle": logical.Factory(approle.Factory),
		"cert":    logical.Factory(cert.Factory),
		"jwt":     logical.Factory(jwt.Factory),
	},
	consts.PluginTypeSecrets: {
		"kv":       logical.Factory(kv.Factory),
		"database": logical.Factory(database.Factory),
		"pki":      logical.Factory(pki.Factory),
		"ssh":      logical.Factory(ssh.Factory),
		"transit":  logical.Factory(transit.Factory),
	},
	consts.PluginTypeDatabase: {
		"postgresql-database-plugin": postgresql.New,
	},
}

// Get returns a database plugin's constructor, or a function that returns the
// factory of a backend, as Vault wants them.
func (registry) Get(name string, t consts.PluginType) (func() (any, error), bool) {
	switch f := builtins[t][name].(type) {
	case func() (any, error):
		return f, true
	case logical.Factory:
		return func() (any, error) { return f, nil }, true
	}
	return nil, false
}

func (registry) Contains(name string, t consts.PluginType) bool {
	return builtins[t][name] != nil
}

func (registry) Keys(t consts.PluginType) []string {
	var names []string
	for name := range builtins[t] {
		names = append(names, name)
	}
	return names
}

func (r registry) DeprecationStatus(name string, t consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, r.Contains(name, t)
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
