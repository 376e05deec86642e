package watch

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/countersign/countersign/compensating/sightings"
)

// A meter counts, for Prometheus. No label is anything that a log's line says.
type meter struct {
	registry   *prometheus.Registry
	sightings  *prometheus.CounterVec
	dropped    prometheus.Counter
	findings   *prometheus.GaugeVec
	lines      *prometheus.GaugeVec
	unreadable *prometheus.GaugeVec
	newest     *prometheus.GaugeVec
	synced     prometheus.Gauge
	held       prometheus.Gauge
	entries    prometheus.Gauge
	saved      prometheus.Gauge
}

func newMeter() *meter {
	m := &meter{
		registry:   prometheus.NewRegistry(),
		sightings:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "countersign_watch_sightings_total", Help: "Uses of accounts and credentials that were seen."}, []string{"kind"}),
		dropped:    prometheus.NewCounter(prometheus.CounterOpts{Name: "countersign_watch_sightings_dropped_total", Help: "Times that a log was lost before it was read: a file removed or truncated, a sender turned away. Each is a finding."}),
		findings:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "countersign_watch_findings", Help: "Findings that are remembered, open or closed."}, []string{"detector", "severity"}),
		lines:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "countersign_watch_sensor_lines", Help: "Lines that were read of a log."}, []string{"sensor"}),
		unreadable: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "countersign_watch_sensor_unreadable", Help: "Lines of a log that could not be read."}, []string{"sensor"}),
		newest:     prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "countersign_watch_sensor_newest_seconds", Help: "Time of a log's newest record, in Unix seconds."}, []string{"sensor"}),
		synced:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "countersign_watch_ledger_synced_seconds", Help: "What was issued before, in Unix seconds, is in the ledger."}),
		held:       prometheus.NewGauge(prometheus.GaugeOpts{Name: "countersign_watch_sightings_held", Help: "Sightings that wait for the ledger."}),
		entries:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "countersign_watch_ledger_entries", Help: "Entries of the ledger."}),
		saved:      prometheus.NewGauge(prometheus.GaugeOpts{Name: "countersign_watch_state_written_bytes", Help: "Bytes that were written to state.json since the start."}),
	}
	m.registry.MustRegister(m.sightings, m.dropped, m.findings, m.lines, m.unreadable, m.newest, m.synced, m.held, m.entries, m.saved)
	return m
}

func (m *meter) seen(s sightings.Sighting) { m.sightings.WithLabelValues(s.Kind.String()).Inc() }

func (m *meter) update(w *Watch) {
	m.findings.Reset()
	for _, r := range w.kept.Findings {
		m.findings.WithLabelValues(string(r.Finding.Detector), string(r.Finding.Severity)).Inc()
	}
	for _, s := range w.sensors {
		h := s.reader.Health()
		m.lines.WithLabelValues(s.Name).Set(float64(h.Lines))
		m.unreadable.WithLabelValues(s.Name).Set(float64(h.Unreadable))
		if !h.Last.IsZero() {
			m.newest.WithLabelValues(s.Name).Set(float64(h.Last.Unix()))
		}
	}
	if !w.synced.IsZero() {
		m.synced.Set(float64(w.synced.Unix()))
	}
	held := 0
	for _, q := range w.queues {
		held += len(q.list)
	}
	m.held.Set(float64(held))
	m.saved.Set(float64(w.disk.wrote))
	m.entries.Set(float64(w.index.Len()))
}

// serve answers on address until the function it returns is called.
func (m *meter) serve(address string) (func(), error) {
	if address == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			slog.Error("metrics", "err", err)
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), goodbye)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			_ = s.Close() // a scraper that doesn't read
		}
	}, nil
}
