package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	fleetSize = 200
	idleTime  = 20 * time.Second
	loadTime  = 10 * time.Second
	rate      = 100 // requests a second
)

// newBroker starts a broker that issues certificates, of the given program; empty: the one
// that was built here.
func newBroker(ctx context.Context, dir, scopes, program string) (*lab.Broker, *lab.TPMCA, error) {
	ca, err := lab.NewTPMCA(filepath.Join(dir, "tpmca"))
	if err != nil {
		return nil, nil, err
	}
	roots := filepath.Join(dir, "ek-roots.pem")
	root, intermediate := ca.PEM()
	if err := os.WriteFile(roots, append(root, intermediate...), 0o644); err != nil {
		return nil, nil, err
	}
	b, err := lab.NewBroker(ctx, filepath.Join(dir, "broker"), lab.BrokerOptions{Program: program, EKRoots: []string{roots}, CA: `crl_every = "1h"`})
	if err != nil {
		return nil, nil, err
	}
	if err := b.Start(ctx); err != nil {
		return nil, nil, err
	}
	if err := b.ApplyScopes(ctx, scopes); err != nil {
		return nil, nil, errors.Join(err, b.Stop())
	}
	return b, ca, nil
}

// brokers measures whole requests: certificates, of which nothing is made
// outside of the broker, for hosts whose keys are in software.
func brokers(ctx context.Context, dir string) (rows []Row, err error) {
	b, ca, err := newBroker(ctx, filepath.Join(dir, "requests"), fleet.Scope, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Stop()) }()
	say("a broker without hosts")
	empty, err := idleness(ctx, b)
	if err != nil {
		return nil, err
	}
	if empty.commits == 0 {
		return nil, errors.New("the broker's own timer commits every few seconds, and nothing of it was seen")
	}
	say(fmt.Sprintf("%d hosts join", fleetSize))
	hosts, err := fleet.Join(ctx, b, ca, fleetSize)
	if err != nil {
		return nil, err
	}
	if err := fleet.Each(hosts, func(h *fleet.Host) error { return h.Connect(ctx) }); err != nil {
		return nil, err
	}
	defer func() {
		for _, h := range hosts {
			_ = h.Session.Close()
		}
	}()
	say("requests, one at a time")
	alone, err := oneByOne(ctx, b, hosts[0])
	if err != nil {
		return nil, err
	}
	rows = append(rows, alone...)
	say(fmt.Sprintf("%d requests a second", rate))
	paced, err := atRate(ctx, b, hosts)
	if err != nil {
		return nil, err
	}
	rows = append(rows, paced...)
	say("as many requests as can be")
	most, err := asManyAsCanBe(ctx, b, hosts)
	if err != nil {
		return nil, err
	}
	memory, _, err := fleet.Memory(b.PID())
	if err != nil {
		return nil, err
	}
	rows = append(append(rows, most...), Row{Name: "broker: resident memory after that", Value: float64(memory) / 1024, Unit: "MiB"})
	say("hosts that wait for their next proof")
	if err := pause(ctx, 2*time.Second); err != nil {
		return nil, err
	}
	full, err := idleness(ctx, b)
	if err != nil {
		return nil, err
	}
	perHost := float64((full.cpu - empty.cpu).Microseconds()) / idleTime.Seconds() / fleetSize
	return append(rows,
		Row{Name: fmt.Sprintf("broker: commits while %d hosts idle for %v, beyond an empty broker's", fleetSize, idleTime), Value: float64(full.commits - empty.commits), Unit: "commits",
			Raw: []float64{float64(empty.commits), float64(full.commits)}, Note: "one commit more or less is the phase of the broker's own timer"}.within(1),
		Row{Name: "broker: processor time for an idle, connected host", Value: perHost, Unit: "µs/s", Raw: []float64{empty.cpu.Seconds(), full.cpu.Seconds()},
			Note: "raw: seconds used by the empty and by the full broker; the connections' keep-alive is in it"}.aim("0")), nil
}

type idle struct {
	cpu     time.Duration
	commits int
}

func wal(b *lab.Broker) string { return filepath.Join(b.State(), "store.db-wal") }

// idleness is what a broker does while nobody asks it for anything.
func idleness(ctx context.Context, b *lab.Broker) (idle, error) {
	cpu, err := fleet.CPU(b.PID())
	if err != nil {
		return idle{}, err
	}
	before, err := readWAL(wal(b))
	if err != nil {
		return idle{}, err
	}
	if err := pause(ctx, idleTime); err != nil {
		return idle{}, err
	}
	after, err := readWAL(wal(b))
	if err != nil {
		return idle{}, err
	}
	now, err := fleet.CPU(b.PID())
	if err != nil {
		return idle{}, err
	}
	if after.round != before.round { // it began anew at the first commit
		before.commits = 0
	}
	return idle{cpu: now - cpu, commits: after.commits - before.commits}, nil
}

// issue times one request from being sent to being answered; what the host
// does before and after it is not in it.
func issue(ctx context.Context, h *fleet.Host) (time.Duration, error) {
	order, delivery, err := h.Order(ctx)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	r, err := h.Session.Hosts.Issue(ctx, connect.NewRequest(order))
	took := time.Since(start)
	if err != nil {
		return took, err
	}
	return took, h.Delivered(ctx, r.Msg, delivery)
}

// oneByOne compares a lone request with what it can't do without, and counts
// its commits.
func oneByOne(ctx context.Context, b *lab.Broker, h *fleet.Host) ([]Row, error) {
	const requests = 150
	f, err := newFloor(b.State())
	if err != nil {
		return nil, err
	}
	defer f.close()
	var took, floors, commits []float64
	for range requests {
		order, delivery, err := h.Order(ctx)
		if err != nil {
			return nil, err
		}
		before, err := readWAL(wal(b))
		if err != nil {
			return nil, err
		}
		start := time.Now()
		r, err := h.Session.Hosts.Issue(ctx, connect.NewRequest(order))
		took = append(took, milliseconds(time.Since(start)))
		if err != nil {
			return nil, err
		}
		after, err := readWAL(wal(b))
		if err != nil {
			return nil, err
		}
		if after.round == before.round {
			commits = append(commits, float64(after.commits-before.commits))
		}
		if err := h.Delivered(ctx, r.Msg, delivery); err != nil {
			return nil, err
		}
		d, err := f.once()
		if err != nil {
			return nil, err
		}
		floors = append(floors, milliseconds(d))
	}
	count := Row{Name: "a request: commits before its answer", Value: median(commits), Unit: "commits", Raw: commits,
		Note: "counted in SQLite's write-ahead log; the median, since the broker's own timer commits too"}.within(2)
	if count.Value < 2 {
		return nil, fmt.Errorf("%v commits before an answer: either it isn't durable, or they aren't seen", count.Value)
	}
	return []Row{count,
		fastest(Row{Name: "a request alone, durable, as the host sees it: fastest", Unit: "ms"}, took, floorNames, floors, floorTimes),
		{Name: "a request alone: median", Value: median(took), Unit: "ms"},
	}, nil
}

// atRate sends requests at their time, whatever became of those before.
func atRate(ctx context.Context, b *lab.Broker, hosts []*fleet.Host) ([]Row, error) {
	free := make(chan *fleet.Host, len(hosts))
	for _, h := range hosts {
		free <- h
	}
	before, err := answers(ctx, b)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var took []float64
	var failed error
	var group sync.WaitGroup
	start := time.Now()
	for i := range int(loadTime.Seconds() * rate) {
		if err := pause(ctx, time.Until(start.Add(time.Duration(i)*time.Second/rate))); err != nil {
			return nil, err
		}
		h := <-free
		group.Go(func() {
			d, err := issue(ctx, h)
			free <- h
			mu.Lock()
			defer mu.Unlock()
			took, failed = append(took, milliseconds(d)), errors.Join(failed, err)
		})
	}
	sent := time.Since(start)
	group.Wait()
	if failed != nil {
		return nil, failed
	}
	after, err := answers(ctx, b)
	if err != nil {
		return nil, err
	}
	raw := slices.Clone(took)
	slices.Sort(took)
	name := fmt.Sprintf("a request, %d/s of them", rate)
	return []Row{
		{Name: name + ": median", Value: took[len(took)/2], Unit: "ms"},
		Row{Name: name + ": p99", Value: took[len(took)*99/100], Unit: "ms", Raw: raw, Note: fmt.Sprintf("as the host sees it, over loopback; %.1f/s were sent", float64(len(took))/sent.Seconds())}.aim("≤ 10 ms"),
		Row{Name: name + ": answered by the broker within 10 ms", Value: 100 * (after.fast - before.fast) / (after.all - before.all), Unit: "%",
			Note: "by the broker's own countersign_request_seconds"}.aim("≥ 99 %"),
	}, nil
}

// busy is how many hosts ask at once, for as much as a broker bears.
const busy = 64

// asManyAsCanBe has hosts ask again as soon as they were answered.
func asManyAsCanBe(ctx context.Context, b *lab.Broker, hosts []*fleet.Host) ([]Row, error) {
	start := time.Now()
	count, used, err := renewals(ctx, b, hosts[:busy], loadTime)
	if err != nil {
		return nil, err
	}
	return []Row{
		Row{Name: fmt.Sprintf("certificates that replace one, asked for by %d hosts at once", busy), Value: float64(count) / time.Since(start).Seconds(), Unit: "1/s",
			Note: "challenged, quoted, issued, acknowledged, the old one retired"}.aim("≥ 300/s"),
		{Name: "broker: processor time for each of them", Value: milliseconds(used) / float64(count), Unit: "ms"},
	}, nil
}

// renewals has hosts replace their certificates for a time, each again as soon as it was
// answered. It returns how many they got, and the processor time that the broker used.
func renewals(ctx context.Context, b *lab.Broker, hosts []*fleet.Host, most time.Duration) (count int, used time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	before, err := fleet.CPU(b.PID())
	if err != nil {
		return 0, 0, err
	}

	var mu sync.Mutex
	var failed error
	var group sync.WaitGroup
	start := time.Now()
	for _, h := range hosts {
		group.Go(func() {
			for time.Since(start) < most {
				_, err := issue(ctx, h)
				mu.Lock()
				count++
				failed = errors.Join(failed, err)
				mu.Unlock()
				if err != nil {
					cancel()
					return
				}
			}
		})
	}
	group.Wait()

	after, err := fleet.CPU(b.PID())
	return count, after - before, errors.Join(failed, err)
}

func milliseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
