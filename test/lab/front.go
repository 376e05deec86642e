package lab

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
)

// A Front stands before Vault and spoils what a test tells it to.
type Front struct {
	Addr   string
	CACert string // file; holds Vault's CA, too, for redirects

	server *httptest.Server
	mu     sync.Mutex
	spoil  Spoil
}

// A Spoil may answer a call in Vault's place; false lets it through. forward
// is the way to Vault.
type Spoil func(w http.ResponseWriter, r *http.Request, forward http.Handler) bool

// NewFront starts a front before v, whose CA's file it writes.
func NewFront(v *Vault, caFile string) (*Front, error) {
	target, err := url.Parse(v.Addr)
	if err != nil {
		return nil, err
	}
	pemCA, err := os.ReadFile(v.CACert)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pemCA)
	forward := httputil.NewSingleHostReverseProxy(target)
	forward.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	forward.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	f := &Front{CACert: caFile}
	f.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		spoil := f.spoil
		f.mu.Unlock()
		if spoil == nil || !spoil(w, r, forward) {
			forward.ServeHTTP(w, r)
		}
	}))
	f.Addr = f.server.URL
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.server.Certificate().Raw}), pemCA...)
	return f, os.WriteFile(caFile, both, 0o600)
}

// Close ends it.
func (f *Front) Close() { f.server.Close() }

// Set says what is spoilt from now on; nil: nothing.
func (f *Front) Set(spoil Spoil) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spoil = spoil
}

// LoseReply lets calls of a path reach Vault, and none of its answers come back.
// lost is closed with the first.
func (f *Front) LoseReply(path string) (lost <-chan struct{}) {
	first := make(chan struct{})
	told := sync.OnceFunc(func() { close(first) })
	f.Set(func(_ http.ResponseWriter, r *http.Request, forward http.Handler) bool {
		if !strings.HasPrefix(r.URL.Path, "/v1/"+path) {
			return false
		}
		forward.ServeHTTP(httptest.NewRecorder(), r)
		told()
		panic(http.ErrAbortHandler)
	})
	return first
}

// Answer gives an answer of the test's own to calls of a path.
func (f *Front) Answer(path string, with http.HandlerFunc) {
	f.Set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.HasPrefix(r.URL.Path, "/v1/"+path) {
			return false
		}
		with(w, r)
		return true
	})
}
