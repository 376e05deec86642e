package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/hostagent/internal/renew"
)

// Socket is where the agent with this run folder listens.
func Socket(runDir string) string { return filepath.Join(runDir, "agent.sock") }

// Status is what `countersign-agent status` shows.
type Status struct {
	Now         time.Time      `json:"now"` // by the clock of the times below
	HostID      string         `json:"host_id"`
	Proved      time.Time      `json:"proved,omitzero"`
	ProveBy     time.Time      `json:"prove_by,omitzero"`
	Problem     string         `json:"problem,omitempty"`
	Rejected    bool           `json:"rejected,omitempty"`
	Credentials []renew.Status `json:"credentials"`
	// CertificateEnds is when the host's certificate does, by the wall clock. The
	// agent renews it.
	CertificateEnds time.Time `json:"certificate_ends,omitzero"`
	// Attention is what ends and no program renews.
	Attention string `json:"attention,omitempty"`
	// FailsFirst is the credential that would expire first if no broker came
	// back, and FailsAt when.
	FailsFirst string    `json:"fails_first,omitempty"`
	FailsAt    time.Time `json:"fails_at,omitzero"`
}

func (s *Service) status() Status {
	st := Status{Now: s.now(), Credentials: []renew.Status{}}
	st.HostID = s.broker.Host()
	ends := s.broker.Ends()
	st.CertificateEnds, st.Attention = ends.Certificate, ends.Attention(s.wall())
	s.mu.Lock()
	st.Proved, st.ProveBy, st.Problem, st.Rejected = s.proved, s.proveBy, s.problem, s.rejected
	s.mu.Unlock()
	for _, r := range s.runners {
		c := r.Status()
		st.Credentials = append(st.Credentials, c)
		if c.Lease != "" && (st.FailsAt.IsZero() || c.Expires.Before(st.FailsAt)) {
			st.FailsFirst, st.FailsAt = c.Name, c.Expires
		}
	}
	return st
}

// listen makes the socket, in a folder that is root's alone.
func (s *Service) listen() (net.Listener, error) {
	path := Socket(s.cfg.RunDir)
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("another agent runs on %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}

func (s *Service) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.status())
	})
	mux.HandleFunc("POST /ready/{name}", func(w http.ResponseWriter, r *http.Request) {
		if err := s.ready(r.Context(), r.PathValue("name")); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (s *Service) ready(ctx context.Context, name string) error {
	for i, c := range s.cfg.Credentials {
		if c.Name == name {
			return s.runners[i].Ready(ctx)
		}
	}
	return fmt.Errorf("the config has no credential %q", name)
}

// Ask sends one request to the running agent.
func Ask(ctx context.Context, runDir, method, path string, into any) error {
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", Socket(runDir))
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("no agent answers on %s: is `countersign-agent serve` running, and this root? %w", Socket(runDir), err)
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode/100 != 2 {
		b := make([]byte, 4096)
		n, _ := res.Body.Read(b)
		return errors.New(string(b[:max(n-1, 0)]))
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(into)
}
