// Package metrics is what a broker tells Prometheus and load balancers. Its
// numbers come from the store when they are asked for, so that nothing has to
// be counted twice; no label carries a name that a host chose.
package metrics

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/countersign/countersign/broker/internal/ops/expiry"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A Source answers what /metrics and /readyz ask.
type Source struct {
	Counts func(context.Context) (Counts, error)
	Alarms func(context.Context) []string
	// Ready is nil while the broker can serve requests.
	Ready func(context.Context) error
	CRL   func() []byte // DER; nil while there is none
	// Space is of the store's disk, in bytes, and what it allows: "enough", "low" or "full".
	Space func() (level string, free, size uint64)
	// Ends are of what ends by itself.
	Ends func(context.Context) ([]expiry.End, error)
}

// Counts are what the store has.
type Counts struct {
	Hosts, Leases map[string]uint64 // by state
	Findings      map[string]uint64 // that are open, by severity
	Overdue       uint64            // leases
	OverBudget    int               // hosts that have used up what they may have written in an hour
	// OverBudgetHosts are some of them, by their ids.
	OverBudgetHosts []string
}

// Requests counts answers by procedure and outcome.
type Requests struct{ seconds *prometheus.HistogramVec }

// Observe counts one answer.
func (r *Requests) Observe(procedure, outcome string, took time.Duration) {
	r.seconds.WithLabelValues(procedure, outcome).Observe(took.Seconds())
}

type collector struct {
	source                                            Source
	hosts, leases, findings, overdue, alarms, expires *prometheus.Desc
	overBudget, overBudgetHost, free, size, space     *prometheus.Desc
}

func (c collector) Describe(out chan<- *prometheus.Desc) {
	out <- c.hosts
	out <- c.leases
	out <- c.findings
	out <- c.overdue
	out <- c.alarms
	out <- c.expires
	out <- c.overBudget
	out <- c.overBudgetHost
	out <- c.free
	out <- c.size
	out <- c.space
}

// scrapes is how many are answered at a time: each reads the store.
const scrapes = 4

// collectTime bounds one scrape's look into the store.
const collectTime = 5 * time.Second

func (c collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTime)
	defer cancel()
	counts, err := c.source.Counts(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(c.hosts, err)
		return
	}
	for _, m := range []struct {
		desc   *prometheus.Desc
		counts map[string]uint64
	}{{c.hosts, counts.Hosts}, {c.leases, counts.Leases}, {c.findings, counts.Findings}} {
		for word, n := range m.counts {
			out <- prometheus.MustNewConstMetric(m.desc, prometheus.GaugeValue, float64(n), word)
		}
	}
	out <- prometheus.MustNewConstMetric(c.overdue, prometheus.GaugeValue, float64(counts.Overdue))
	out <- prometheus.MustNewConstMetric(c.alarms, prometheus.GaugeValue, float64(len(c.source.Alarms(ctx))))
	out <- prometheus.MustNewConstMetric(c.overBudget, prometheus.GaugeValue, float64(counts.OverBudget))
	for _, id := range counts.OverBudgetHosts {
		out <- prometheus.MustNewConstMetric(c.overBudgetHost, prometheus.GaugeValue, 1, id)
	}
	c.collectSpace(out)
	c.collectEnds(ctx, out)
}

func (c collector) collectSpace(out chan<- prometheus.Metric) {
	level, free, size := c.source.Space()
	out <- prometheus.MustNewConstMetric(c.free, prometheus.GaugeValue, float64(free))
	out <- prometheus.MustNewConstMetric(c.size, prometheus.GaugeValue, float64(size))
	for _, l := range []string{"enough", "low", "full"} {
		is := 0.0
		if l == level {
			is = 1
		}
		out <- prometheus.MustNewConstMetric(c.space, prometheus.GaugeValue, is, l)
	}
}

func (c collector) collectEnds(ctx context.Context, out chan<- prometheus.Metric) {
	ends, err := c.source.Ends(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(c.expires, err)
		return
	}
	type labels struct{ what, name string }
	seen := map[labels]bool{} // two vendors' roots may have one name: the first ends first
	for _, e := range ends {
		// A vendor's name may hold any bytes; a label that is no UTF-8 would fail every scrape.
		if l := (labels{e.What, strings.ToValidUTF8(e.Name, "\uFFFD")}); !seen[l] {
			seen[l] = true
			out <- prometheus.MustNewConstMetric(c.expires, prometheus.GaugeValue, float64(e.At.Unix()), l.what, l.name)
		}
	}
}

// New makes the handler of /metrics, /healthz, /readyz and /crl.
func New(source Source) (http.Handler, *Requests) {
	registry := prometheus.NewRegistry()
	requests := &Requests{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "countersign_request_seconds", Help: "Time to answer, by procedure and outcome.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1, 5},
	}, []string{"procedure", "outcome"})}
	registry.MustRegister(requests.seconds, collector{source: source,
		hosts:          prometheus.NewDesc("countersign_hosts", "Hosts by state.", []string{"state"}, nil),
		leases:         prometheus.NewDesc("countersign_leases", "Leases whose end is not confirmed, by state.", []string{"state"}, nil),
		findings:       prometheus.NewDesc("countersign_findings_open", "Findings of the watch that nobody closed, by severity.", []string{"severity"}, nil),
		overdue:        prometheus.NewDesc("countersign_leases_overdue", "Leases that wait for the broker more than 10 s beyond their due time.", nil, nil),
		alarms:         prometheus.NewDesc("countersign_alarms", "Things that wait for an operator.", nil, nil),
		expires:        prometheus.NewDesc("countersign_expires_timestamp_seconds", "When something ends by itself, in Unix seconds.", []string{"what", "name"}, nil),
		overBudget:     prometheus.NewDesc("countersign_hosts_over_budget", "Hosts that have used up what they may have written in an hour.", nil, nil),
		overBudgetHost: prometheus.NewDesc("countersign_host_over_budget", "1 for each of the first of them, by the id that the broker gave it.", []string{"host"}, nil),
		free:           prometheus.NewDesc("countersign_disk_free_bytes", "What the store's disk has left.", nil, nil),
		size:           prometheus.NewDesc("countersign_disk_size_bytes", "The store's disk.", nil, nil),
		space:          prometheus.NewDesc("countersign_disk_level", "1 for what the disk's room allows: enough; low, which warns; full, which stops new leases.", []string{"level"}, nil),
	})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: scrapes}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := source.Ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ready\n"))
	})
	mux.HandleFunc("GET /crl", func(w http.ResponseWriter, _ *http.Request) {
		crl := source.CRL()
		if crl == nil {
			http.Error(w, "no CRL", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/pkix-crl")
		_, _ = w.Write(crl)
	})
	return mux, requests
}
