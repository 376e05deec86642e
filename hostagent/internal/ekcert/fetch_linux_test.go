package ekcert

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// client is a client as a host has it, behind the lab's proxy; it trusts the
// lab's servers.
func client(t *testing.T, m *lab.Makers) *Client {
	t.Helper()
	c := check.Must(NewClient(m.Proxy))(t)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(check.Must(os.ReadFile(m.CAFile))(t))
	c.http.Transport.(*http.Transport).TLSClientConfig.RootCAs = roots
	return c
}

func startMakers(t *testing.T, answer http.HandlerFunc) *lab.Makers {
	t.Helper()
	m := check.Must(lab.NewMakers(t.TempDir(), answer, "ekop.intel.com", "ftpm.amd.com", "elsewhere.example"))(t)
	t.Cleanup(m.Close)
	return m
}

// The makers' servers know the keys of their own TPMs, by the URLs that they are
// asked for.
func TestFetch(t *testing.T) {
	ca := newCA(t)
	answers := map[string]string{}
	m := startMakers(t, func(w http.ResponseWriter, r *http.Request) {
		if agent := r.Header.Get("User-Agent"); agent != "" || r.URL.RawQuery != "" || r.ContentLength > 0 || len(r.Cookies()) > 0 {
			t.Errorf("more than the key's hash is sent: %v", r)
		}
		answer, ok := answers["https://"+r.Host+r.URL.EscapedPath()]
		if !ok {
			http.Error(w, "Certificate not found", http.StatusNotFound)
			return
		}
		fmt.Fprint(w, answer)
	})
	c := client(t, m)

	for _, kind := range []tpm.KeyAlgorithm{tpm.RSA2048, tpm.P256, tpm.P384} {
		for manufacturer, encode := range map[string]func([]byte) string{
			"INTC": intelJSON,
			"AMD":  func(der []byte) string { return string(der) },
		} {
			ek, cert := certified(t, ca, kind)
			address := check.Must(URL(manufacturer, ek))(t)
			if _, err := c.Fetch(t.Context(), address, ek); !errors.Is(err, ErrNotServed) || !strings.Contains(err.Error(), "404 Not Found") {
				t.Errorf("%s, %s, a key that is not served: %v", manufacturer, kind, err)
			}
			answers[address] = encode(cert.Raw)
			if got, err := c.Fetch(t.Context(), address, ek); err != nil || !got.Equal(cert) {
				t.Errorf("%s, %s: %v", manufacturer, kind, err)
			}
		}
	}
}

// Fetch returns the certificate of this key, or an error with the next step.
func TestFetchHostileAnswers(t *testing.T) {
	ca := newCA(t)
	ek, cert := certified(t, ca, tpm.P256)
	_, other := certified(t, ca, tpm.P256)
	endless := func(w http.ResponseWriter) {
		for page := bytes.Repeat([]byte("A"), 1<<16); ; {
			if _, err := w.Write(page); err != nil {
				return
			}
		}
	}
	redirect := func(to string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/moved" {
				_, _ = w.Write(cert.Raw)
				return
			}
			http.Redirect(w, r, to, http.StatusFound)
		}
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = z.Write(make([]byte, 10<<20))
	_ = z.Close()

	for name, tt := range map[string]struct {
		answer  http.HandlerFunc
		problem string
	}{
		"an endless body": {func(w http.ResponseWriter, _ *http.Request) { endless(w) }, "more than 32768 bytes"},
		"an endless error": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
			endless(w)
		}, "503 Service Unavailable (try again later"},
		"an endless header": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("A", 1<<20)) }, "header"},
		"HTML":              {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>Please log in</html>") }, "is it a proxy's page?"},
		"nothing":           {func(http.ResponseWriter, *http.Request) {}, "empty"},
		"no content":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, "204 No Content"},
		"forbidden":         {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, "403 Forbidden"},
		"gone":              {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusGone) }, ErrNotServed.Error()},
		"a gzip bomb": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb.Bytes())
		}, `encoding "gzip"`},
		"a gzip bomb without a header": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bomb.Bytes()) }, "neither DER"},
		"another key's certificate":    {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(other.Raw) }, "a certificate for another key than EK " + ek.Hash().String()},
		"garbage behind it": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(append(cert.Raw[:len(cert.Raw):len(cert.Raw)], 'x'))
		}, "trailing data"},
		"a body that breaks off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "5000")
			_, _ = w.Write(cert.Raw[:100])
		}, "read the answer"},
		"a connection that breaks off": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "ek import FILE"},
		"a redirect to http":           {redirect("http://ekop.intel.com/moved"), "is not https"},
		"a redirect to another host":   {redirect("https://elsewhere.example/moved"), `another host, "elsewhere.example"`},
		"a redirect to a file":         {redirect("file:///etc/passwd"), "is not https"},
		"a redirect without an end":    {redirect("/round"), "more than 3 times"},
		"a redirect to nowhere":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusFound) }, "302"},
		"a redirect to itself":         {redirect("/moved"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := client(t, startMakers(t, tt.answer))
			got, err := c.Fetch(check.Within(t, 20*time.Second), check.Must(URL("INTC", ek))(t), ek)
			if tt.problem == "" && (err != nil || !got.Equal(cert)) {
				t.Error(err)
			}
			if tt.problem != "" && (got != nil || err == nil || !strings.Contains(err.Error(), tt.problem)) {
				t.Errorf("%v, want an error with %q", err, tt.problem)
			}
		})
	}
}

// A server that says nothing doesn't hold the command up.
func TestFetchEnds(t *testing.T) {
	ek, _ := certified(t, newCA(t), tpm.P256)
	m := startMakers(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c := client(t, m)
	c.http.Transport.(*http.Transport).ResponseHeaderTimeout = 50 * time.Millisecond
	if _, err := c.Fetch(t.Context(), check.Must(URL("AMD", ek))(t), ek); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Fetch(ctx, check.Must(URL("AMD", ek))(t), ek); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Only servers that the host's CAs vouch for are asked, and by the proxy alone.
func TestFetchTrust(t *testing.T) {
	ek, cert := certified(t, newCA(t), tpm.P256)
	m := startMakers(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(cert.Raw) })

	stranger := check.Must(NewClient(m.Proxy))(t) // knows the system's CAs alone
	if _, err := stranger.Fetch(t.Context(), check.Must(URL("AMD", ek))(t), ek); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a server of an unknown CA: %v", err)
	}
	if len(m.Requests()) > 0 {
		t.Errorf("a server of an unknown CA was asked: %v", m.Requests())
	}

	c := client(t, m)
	if min := c.http.Transport.(*http.Transport).TLSClientConfig.MinVersion; min != tls.VersionTLS12 {
		t.Errorf("TLS from %#x on", min)
	}
	if _, err := c.Fetch(t.Context(), "https://unknown.example/x", ek); err == nil || !strings.Contains(err.Error(), "Forbidden") {
		t.Errorf("a proxy that refuses: %v", err)
	}
}

func TestProxy(t *testing.T) {
	for proxy, good := range map[string]bool{
		"": true, "http://proxy.example:3128": true, "https://proxy.example": true, "socks5://proxy.example:1080": true,
		"proxy.example:3128": false, "ftp://proxy.example": false, "http://": false, "http://user:secret@%zz": false,
	} {
		_, err := NewClient(proxy)
		if (err == nil) != good {
			t.Errorf("%q: %v", proxy, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("a password is shown: %v", err)
		}
	}

	// Fetch doesn't show the proxy's password when it can't reach the proxy.
	ek, _ := certified(t, newCA(t), tpm.P256)
	c := check.Must(NewClient("http://user:secret@127.0.0.1:1"))(t)
	if _, err := c.Fetch(t.Context(), check.Must(URL("AMD", ek))(t), ek); err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "--proxy") {
		t.Error(err)
	}
}

// A proxy in the environment that can't be read is no reason to go without one.
func TestProxyInEnvironment(t *testing.T) {
	for value, good := range map[string]bool{
		"":                                  true,
		"proxy.example.com:3128":            true,
		"http://user:p%40ss@proxy:3128":     true,
		"socks5://proxy:1080":               true,
		"http://user:sec%ret@proxy:3128":    false,
		"ftp://user:secret@proxy":           false,
		"http://":                           false,
		"http://user:secret@proxy:port/%zz": false,
	} {
		t.Setenv("HTTPS_PROXY", value)
		if _, err := NewClient(""); (err == nil) != good || err != nil && strings.Contains(err.Error(), "sec") {
			t.Errorf("%q: %v", value, err)
		}
	}
}
