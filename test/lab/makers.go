package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/google/go-tpm/tpm2"
)

// Makers stands for the servers of TPM makers on the internet, and for the proxy
// that a host reaches them by.
type Makers struct {
	Proxy  string // http://127.0.0.1:PORT
	CAFile string // the CA of the servers' certificates

	server, proxy *httptest.Server
	hosts         []string

	mu       sync.Mutex // guards requests
	requests []string
}

// NewMakers starts a server that answers for hosts, with https://HOST/ as its
// address, and a proxy that reaches it. Close ends both.
func NewMakers(dir string, answer http.HandlerFunc, hosts ...string) (*Makers, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := writeServerCert(dir, hosts...); err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key"))
	if err != nil {
		return nil, err
	}

	m := &Makers{CAFile: filepath.Join(dir, "ca.pem"), hosts: hosts}
	m.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		m.requests = append(m.requests, "https://"+r.Host+r.URL.EscapedPath())
		m.mu.Unlock()
		answer(w, r)
	}))
	m.server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	m.server.StartTLS()
	m.proxy = httptest.NewServer(http.HandlerFunc(m.connect))
	m.Proxy = m.proxy.URL
	return m, nil
}

// connect is the proxy: it knows the makers' hosts and no others.
func (m *Makers) connect(w http.ResponseWriter, r *http.Request) {
	host, _, err := net.SplitHostPort(r.Host)
	if r.Method != http.MethodConnect || err != nil || !slices.Contains(m.hosts, host) {
		http.Error(w, "the proxy reaches the makers alone", http.StatusForbidden)
		return
	}
	to, err := (&net.Dialer{}).DialContext(r.Context(), "tcp", m.server.Listener.Addr().String())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer to.Close()
	from, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer from.Close()
	if _, err := io.WriteString(from, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}

	ended := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{to, from}, {from, to}} {
		go func() {
			_, _ = io.Copy(way[0], way[1])
			ended <- struct{}{}
		}()
	}
	<-ended
}

// Requests are the addresses that were asked for.
func (m *Makers) Requests() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.requests)
}

// Close ends server and proxy.
func (m *Makers) Close() {
	m.proxy.CloseClientConnections()
	m.proxy.Close()
	m.server.CloseClientConnections()
	m.server.Close()
}

// Disguise makes the TPM reachable at socket as one of another manufacturer: four
// bytes such as "INTC" or "AMD\x00". It ends with ctx.
func (t *TPM) Disguise(ctx context.Context, socket, manufacturer string) (path string, err error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return "", err
	}
	context.AfterFunc(ctx, func() { _ = listener.Close() })

	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go t.disguised(conn, manufacturer)
		}
	}()
	return "unix:" + socket, nil
}

func (t *TPM) disguised(conn net.Conn, manufacturer string) {
	defer conn.Close()
	command := make([]byte, 4096)
	for {
		n, err := conn.Read(command)
		if err != nil {
			return
		}
		response, err := t.Send(command[:n])
		if err != nil {
			return
		}
		setProperty(command[:n], response, manufacturer)
		if _, err := conn.Write(response); err != nil {
			return
		}
	}
}

// setProperty changes the manufacturer in the response to TPM2_GetCapability.
func setProperty(command, response []byte, manufacturer string) {
	if len(command) < 10 || tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) != tpm2.TPMCCGetCapability {
		return
	}
	tag := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMPTManufacturer))
	if i := bytes.Index(response, tag); i >= 0 && i+8 <= len(response) {
		copy(response[i+4:i+8], manufacturer)
	}
}
