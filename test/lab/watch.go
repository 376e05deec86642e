package lab

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A Watch is `countersign watch serve` beside a broker, as root on its socket.
type Watch struct {
	Dir     string
	Metrics string // HOST:PORT
	bin     string
	process *process
}

// StartWatch writes a config with these sensors and whatever else is given, and
// starts it.
func StartWatch(dir string, b *Broker, config string) (*Watch, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	metrics, err := freeAddr()
	if err != nil {
		return nil, err
	}
	w := &Watch{Dir: dir, Metrics: metrics, bin: b.bin}
	text := fmt.Sprintf("state_dir = %q\nmetrics_listen = %q\nbroker {\n  socket = %q\n}\n%s", filepath.Join(dir, "state"), metrics, filepath.Join(b.State(), "operator.sock"), config)
	if err := os.WriteFile(w.Config(), []byte(text), 0o600); err != nil {
		return nil, err
	}
	return w, w.Start()
}

// Config is the watch's config file.
func (w *Watch) Config() string { return filepath.Join(w.Dir, "watch.hcl") }

// Log is the file with the watch's log.
func (w *Watch) Log() string { return filepath.Join(w.Dir, "watch.log") }

// Metric is the value of a series, as Prometheus would name it.
func (w *Watch) Metric(ctx context.Context, series string) (float64, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", w.Metrics, series)
}

// Start runs it.
func (w *Watch) Start() (err error) {
	w.process, err = startProcess(exec.Command(w.bin, "watch", "serve", "--config", w.Config()), w.Log(), syscall.SIGKILL)
	return err
}

// Stop ends it in order.
func (w *Watch) Stop() error { return w.process.stop(syscall.SIGTERM) }

// Kill ends it by SIGKILL.
func (w *Watch) Kill() error { return w.process.stop(syscall.SIGKILL) }
