package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	stretches   = 8 // of each broker
	stretchTime = 2 * time.Second
	// cryptoTimes bounds a certificate by its bare crypto. It is near where it stands.
	cryptoTimes = 14
)

// A workload is a broker and its hosts, and what each stretch of its work took for one certificate.
type workload struct {
	broker *lab.Broker
	hosts  []*fleet.Host
	took   []float64 // ms
	count  int
}

// certificates measures the broker's processor time for one certificate, beside the bare
// crypto of one and, where another build is named, beside that: the stretches alternate,
// so that whatever else the machine does falls on all.
func certificates(ctx context.Context, dir string) (rows []Row, err error) {
	programs := []string{""}
	if against.program != "" {
		programs = append(programs, against.program)
	}
	all := make([]*workload, len(programs))
	for i, program := range programs {
		say(fmt.Sprintf("%d hosts join broker %d of %d", busy, i+1, len(programs)))
		if all[i], err = newWorkload(ctx, filepath.Join(dir, fmt.Sprintf("certificates-%d", i)), program); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, all[i].close()) }()
	}
	bare, err := newLeastCrypto()
	if err != nil {
		return nil, err
	}

	say("certificates, by turns")
	var floors []float64
	for i := range stretches {
		for j := range all {
			m := all[(i+j)%len(all)]
			if err := m.stretch(ctx); err != nil {
				return nil, err
			}
		}
		d, err := bare.once(all[0].count, busy)
		if err != nil {
			return nil, err
		}
		floors = append(floors, milliseconds(d))
	}

	row := Row{Name: "broker: processor time for one certificate", Unit: "ms", Value: median(all[0].took), Raw: all[0].took,
		Floor: bareNames, FloorValue: median(floors), FloorRaw: floors,
		Note: "challenged, issued, acknowledged, the old one retired; the medians of stretches in turn"}
	row.Ratio = row.Value / row.FloorValue
	rows = append(rows, row.atMost(cryptoTimes, "floor"))
	if len(all) > 1 {
		other := row
		other.Name, other.Floor, other.FloorValue, other.FloorRaw = row.Name+", and the other build's", "the other build", median(all[1].took), all[1].took
		other.Ratio = other.Value / other.FloorValue
		rows = append(rows, other.atMost(against.most, "the other build"))
	}
	return rows, nil
}

func newWorkload(ctx context.Context, dir, program string) (*workload, error) {
	b, ca, err := newBroker(ctx, dir, fleet.Scope, program)
	if err != nil {
		return nil, err
	}
	m := &workload{broker: b}
	if m.hosts, err = fleet.Join(ctx, b, ca, busy); err == nil {
		err = fleet.Each(m.hosts, func(h *fleet.Host) error { return h.Connect(ctx) })
	}
	if err == nil {
		err = fleet.Each(m.hosts, func(h *fleet.Host) error { return h.Obtain(ctx) })
	}
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

func (m *workload) close() error {
	for _, h := range m.hosts {
		if h.Session != nil {
			_ = h.Session.Close()
		}
	}
	return m.broker.Stop()
}

func (m *workload) stretch(ctx context.Context) error {
	count, used, err := renewals(ctx, m.broker, m.hosts, stretchTime)
	if err != nil {
		return err
	}
	m.count += count
	m.took = append(m.took, milliseconds(used)/float64(count))
	return nil
}
