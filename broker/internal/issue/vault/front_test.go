package vault

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/countersign/countersign/broker/internal/config"
)

// A front stands before Vault and spoils what a test tells it to.
type front struct {
	addr string
	ca   string // file; holds Vault's CA, too, for redirects

	mu    sync.Mutex
	spoil func(w http.ResponseWriter, r *http.Request, forward http.Handler) bool
}

func newFront(t *testing.T) *front {
	t.Helper()
	target, err := url.Parse(testVault.Addr)
	if err != nil {
		t.Fatal(err)
	}
	pemCA, err := os.ReadFile(testVault.CACert)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pemCA)
	forward := httputil.NewSingleHostReverseProxy(target)
	forward.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	forward.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	f := &front{}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		spoil := f.spoil
		f.mu.Unlock()
		if spoil == nil || !spoil(w, r, forward) {
			forward.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	f.addr = server.URL
	f.ca = filepath.Join(t.TempDir(), "ca.pem")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), pemCA...)
	if err := os.WriteFile(f.ca, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *front) config(t *testing.T) config.Vault {
	c := tokenConfig(t, brokerToken(t, nil))
	c.Address, c.CAFile = f.addr, f.ca
	return c
}

func (f *front) set(spoil func(http.ResponseWriter, *http.Request, http.Handler) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spoil = spoil
}

// loseReply lets calls of a path reach Vault, and none of its answers come back.
func (f *front) loseReply(path string) {
	f.set(func(_ http.ResponseWriter, r *http.Request, forward http.Handler) bool {
		if !strings.HasPrefix(r.URL.Path, "/v1/"+path) {
			return false
		}
		forward.ServeHTTP(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler)
	})
}

// answer gives an answer of our own to calls of a path.
func (f *front) answer(path string, with http.HandlerFunc) {
	f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.HasPrefix(r.URL.Path, "/v1/"+path) {
			return false
		}
		with(w, r)
		return true
	})
}
