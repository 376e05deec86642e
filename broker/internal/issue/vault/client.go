package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

const (
	callTimeout  = 15 * time.Second
	maxResponse  = 4 << 20
	maxMessage   = 300
	correlation  = "X-Correlation-Id"
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 2 * time.Second
)

// A caller makes single calls. It follows Vault's redirects with their method,
// waits out rate limits, and repeats nothing else: only who asked knows whether
// that is safe.
type caller struct {
	api       *api.Client
	transport *http.Transport
}

// newCaller takes nothing from the environment of Vault's command line: what a
// service does stands in its config alone.
func newCaller(address, namespace string, transport *http.Transport) (*caller, error) {
	c, err := api.NewClient(&api.Config{
		Address: address,
		HttpClient: &http.Client{
			Transport:     bounded{transport},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		CheckRetry: func(context.Context, *http.Response, error) (bool, error) { return false, nil },
	})
	if err != nil {
		return nil, err
	}
	c.SetHeaders(http.Header{"X-Vault-Request": {"true"}})
	c.SetNamespace(namespace)
	c.ClearToken()
	c.SetWrappingLookupFunc(func(string, string) string { return "" })
	return &caller{api: c, transport: transport}, nil
}

// tlsConfig trusts the CA in a file, or the system's without one.
func tlsConfig(caFile string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", caFile)
	}
	return c, nil
}

func newTransport(c *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       c,
		TLSHandshakeTimeout:   5 * time.Second,
		ResponseHeaderTimeout: callTimeout,
		MaxIdleConnsPerHost:   32,
		MaxConnsPerHost:       64,
		IdleConnTimeout:       90 * time.Second,
		ForceAttemptHTTP2:     true,
	}
}

// bounded cuts what a peer may make us read.
type bounded struct{ next http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{&limitedReader{resp.Body, maxResponse}, resp.Body}
	}
	return resp, err
}

// A limitedReader fails, unlike io.LimitReader, where there is more.
type limitedReader struct {
	r    io.Reader
	left int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("the answer is larger than %d bytes", maxResponse)
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// A call is one request.
type call struct {
	read    bool // a GET; else a PUT of body
	path    string
	body    map[string]any
	token   string
	request string // correlation id
	secret  bool   // request or answer may hold a secret: of Vault's own words only known ones are kept
}

func (c call) capability() string {
	if c.read {
		return "read"
	}
	return "update"
}

// do makes a call. A nil Secret with a nil error is an answer without content,
// or nothing at the path of a read.
func (c *caller) do(ctx context.Context, one call) (*api.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client := c.api.WithRequestCallbacks(func(r *api.Request) {
		r.ClientToken = one.token
		if one.request != "" {
			r.Headers.Set(correlation, one.request)
		}
	})
	for wait := firstBackoff; ; wait = min(2*wait, lastBackoff) {
		var secret *api.Secret
		var err error
		if one.read {
			secret, err = client.Logical().ReadWithContext(ctx, one.path)
		} else {
			secret, err = client.Logical().WriteWithContext(ctx, one.path, one.body)
		}
		if err == nil {
			return secret, nil
		}
		failed := failure(one, err)
		if failed.status != http.StatusTooManyRequests || !sleep(ctx, wait/2+rand.N(wait)) {
			return nil, failed
		}
	}
}

// sleep says whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// A failed is a call that Vault did not do, or not as far as we know.
type failed struct {
	call    string
	status  int // zero: no answer
	message string
	cause   error // where there was no answer
}

func (f *failed) Unwrap() error { return f.cause }

func (f *failed) Error() string {
	what := ""
	switch f.status {
	case 0:
		return fmt.Sprintf("Vault gave no answer to %s: %s", f.call, f.message)
	case http.StatusTooManyRequests:
		what = ": its rate limit is used up"
	case http.StatusServiceUnavailable:
		what = ": it is sealed or in standby"
	}
	if f.message != "" {
		what += ": " + f.message
	}
	return fmt.Sprintf("Vault answered %d to %s%s", f.status, f.call, what)
}

// phrases are what of Vault's words may be repeated where others of them could
// hold a secret: plugins quote the statements that failed.
var phrases = []string{
	"permission denied", "invalid token", "sealed", "unknown role", "no such host", "connection refused", "too many clients",
	"too many connections", "remaining connection slots are reserved", "failed to connect", "i/o timeout", "context deadline exceeded",
	"invalid role or secret ID", "invalid secret id", "invalid role ID", "invalid certificate", "failed to match all constraints",
	"no handler for route", "unsupported operation", "not an allowed role", "request path could not be", "common name", "ttl",
}

func failure(one call, err error) *failed {
	f := &failed{call: one.capability() + " " + one.path}
	var answered *api.ResponseError
	if !errors.As(err, &answered) {
		f.cause, f.message = err, short(err.Error())
		if one.secret {
			f.cause, f.message = nil, unanswered(err)
		}
		return f
	}
	f.status = answered.StatusCode
	words := strings.Join(answered.Errors, "; ")
	if answered.RawError {
		words = "" // a proxy's page
	}
	if !one.secret {
		f.message = short(words)
		return f
	}
	var known []string
	for _, p := range phrases {
		if strings.Contains(words, p) {
			known = append(known, p)
		}
	}
	f.message = strings.Join(known, ", ")
	if known == nil && words != "" {
		f.message = "Vault's own log says why"
	}
	return f
}

// unanswered repeats of an error only what can't quote an answer, as decoders do.
func unanswered(err error) string {
	var timeout interface{ Timeout() bool }
	var network *net.OpError
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	case errors.As(err, &network):
		return short(network.Error())
	case errors.As(err, &certificate):
		return short(certificate.Error())
	}
	return "the connection broke, or what came is no answer of Vault's"
}

// short is one bounded line.
func short(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}

func status(err error) int {
	var f *failed
	if errors.As(err, &f) {
		return f.status
	}
	return 0
}

// unknown says whether Vault itself answered that it knows no such lease or
// accessor. A 404 of a proxy is no such answer.
func unknown(err error) bool {
	var f *failed
	if !errors.As(err, &f) || f.status < 400 || f.status > 404 {
		return false
	}
	for _, words := range []string{"invalid accessor", "invalid lease", "lease not found"} {
		if strings.Contains(f.message, words) {
			return true
		}
	}
	return false
}
