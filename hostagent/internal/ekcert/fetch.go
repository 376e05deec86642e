package ekcert

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
)

const (
	// maxAnswer bounds an answer's body: a certificate in base64 and what is
	// around it.
	maxAnswer = 32 << 10
	// maxHeader bounds an answer's header.
	maxHeader = 32 << 10
	// maxRedirects bounds how often one request is sent elsewhere.
	maxRedirects = 3
	// fetchLimit bounds one fetch, and stepLimit each of its steps.
	fetchLimit = 30 * time.Second
	stepLimit  = 10 * time.Second
)

// ErrNotServed is returned when the maker's server has no certificate for a key.
var ErrNotServed = errors.New("the maker has no certificate for this key")

// A Client fetches certificates from makers' servers.
type Client struct {
	http *http.Client
}

// NewClient makes a client that goes through a proxy: the given URL, or if that
// is empty, the one in HTTPS_PROXY. It opens no connection. A proxy that can't be
// read is an error: without it, a request could leave by a way that nobody wants.
func NewClient(proxy string) (*Client, error) {
	choose := http.ProxyFromEnvironment
	if proxy != "" {
		u, err := parseProxy(proxy)
		if err != nil {
			return nil, fmt.Errorf("--proxy: %w", err)
		}
		choose = http.ProxyURL(u)
	} else if name, value := proxyInEnvironment(); value != "" {
		if !strings.Contains(value, "://") {
			value = "http://" + value
		}
		if _, err := parseProxy(value); err != nil {
			return nil, fmt.Errorf("%s in the environment: %w", name, err)
		}
	}

	dialer := &net.Dialer{Timeout: stepLimit}
	return &Client{&http.Client{
		Transport: &http.Transport{
			Proxy:                  choose,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    stepLimit,
			ResponseHeaderTimeout:  stepLimit,
			MaxResponseHeaderBytes: maxHeader,
			DisableKeepAlives:      true,
			DisableCompression:     true, // what is asked for plain can't grow here
		},
		CheckRedirect: checkRedirect,
		Timeout:       fetchLimit,
	}}, nil
}

// proxyInEnvironment is what net/http looks at for an https URL.
func proxyInEnvironment() (name, value string) {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		if value := os.Getenv(name); value != "" {
			return name, value
		}
	}
	return "", ""
}

// parseProxy reads a proxy's URL. Its errors don't repeat it: there may be a
// password in it.
func parseProxy(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) {
		return nil, errors.New("the proxy is not a URL like http://HOST:PORT (http, https and socks5 are known)")
	}
	return u, nil
}

// checkRedirect follows a maker's server to itself alone: the request names a key
// of this host, which is nobody else's business.
func checkRedirect(to *http.Request, via []*http.Request) error {
	switch {
	case to.URL.Scheme != "https":
		return fmt.Errorf("the server redirects to %q, which is not https", to.URL.Redacted())
	case to.URL.Host != via[0].URL.Host:
		return fmt.Errorf("the server redirects to another host, %q", to.URL.Host)
	case len(via) > maxRedirects:
		return fmt.Errorf("the server redirects more than %d times", maxRedirects)
	}
	return nil
}

// Fetch gets the certificate of an EK from address, which [URL] returned. The
// certificate is for that key. The error wraps [ErrNotServed] if the server knows
// none.
func (c *Client) Fetch(ctx context.Context, address string, ek tpm.EK) (*x509.Certificate, error) {
	const byHand = "get the certificate on another machine and run `countersign-agent ek import FILE`"

	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", address, err)
	}
	request.Header.Set("User-Agent", "") // the maker learns which key is asked for, and nothing else

	response, err := c.http.Do(request)
	if err != nil {
		var outer *url.Error
		if errors.As(err, &outer) {
			err = outer.Err // without method and URL, which stand before it
		}
		return nil, fmt.Errorf("fetch %s: %w (set HTTPS_PROXY or --proxy if this host needs a proxy; or %s)", address, err, byHand)
	}
	defer func() { _ = response.Body.Close() }()

	encoding := response.Header.Get("Content-Encoding")
	switch {
	case response.StatusCode == http.StatusNotFound || response.StatusCode == http.StatusGone:
		return nil, fmt.Errorf("fetch %s: %s: %w", address, status(response), ErrNotServed)
	case response.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("fetch %s: the server answers %s (try again later, or %s)", address, status(response), byHand)
	case encoding != "" && encoding != "identity":
		return nil, fmt.Errorf("fetch %s: the answer has the encoding %q, which was not asked for (%s)", address, encoding, byHand)
	}

	answer, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: read the answer: %w (try again)", address, err)
	}
	if len(answer) > maxAnswer {
		return nil, fmt.Errorf("fetch %s: the answer has more than %d bytes, which no certificate has (is it a proxy's page? %s)", address, maxAnswer, byHand)
	}
	cert, err := Parse(answer)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: the answer is no certificate: %w (is it a proxy's page? %s)", address, err, byHand)
	}
	if !tpm.Certifies(cert, ek.Public) {
		return nil, fmt.Errorf("fetch %s: the answer is a certificate for another key than EK %s (nothing was kept; ask the TPM's maker)", address, ek.Hash())
	}
	return cert, nil
}

// status is a response's code in the standard's words, not in the server's.
func status(r *http.Response) string {
	return fmt.Sprintf("%d %s", r.StatusCode, http.StatusText(r.StatusCode))
}
