package space

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestGauge(t *testing.T) {
	const mib, gib = uint64(1 << 20), uint64(1 << 30)
	for _, tt := range []struct {
		free, size uint64
		want       Level
		alarm      string
	}{
		{50 * mib, 100 * mib, Enough, ""},
		{20 * mib, 100 * mib, Enough, ""},
		{20*mib - 1, 100 * mib, Low, "below 10 MiB the broker issues nothing new"},
		{10 * mib, 100 * mib, Low, "10 of 100 MiB"},
		{10*mib - 1, 100 * mib, Full, "issues nothing new until"},
		{0, 100 * mib, Full, "0 of 100 MiB"},
		{3 * gib, 4000 * gib, Enough, ""},
		{2*gib - 1, 4000 * gib, Low, "below 512 MiB"},
		{512*mib - 1, 4000 * gib, Full, ""},
	} {
		g := &Gauge{Dir: "/state", Log: slog.New(slog.DiscardHandler), Measure: func(string) (uint64, uint64, error) { return tt.free, tt.size, nil }}
		g.Look()
		level, free, size := g.Now()
		if level != tt.want || free != tt.free || size != tt.size {
			t.Errorf("%d of %d: %s, %d of %d", tt.free, tt.size, level, free, size)
		}
		if err := g.New(); (err != nil) != (tt.want == Full) || err != nil && !errors.Is(err, ErrFull) {
			t.Errorf("%d of %d: something new: %v", tt.free, tt.size, err)
		}
		if alarms := strings.Join(g.Alarms(), ""); !strings.Contains(alarms, tt.alarm) || (alarms == "") != (tt.want == Enough) {
			t.Errorf("%d of %d: %q", tt.free, tt.size, alarms)
		}
	}
}

// A disk that can't be measured is an alarm, and stops nothing; the real one can.
func TestMeasuring(t *testing.T) {
	g := &Gauge{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	g.Look()
	if _, free, size := g.Now(); size == 0 || free > size || len(g.Alarms()) > 1 {
		t.Errorf("%d of %d: %v", free, size, g.Alarms())
	}
	g.Dir += "/nowhere"
	g.Look()
	if alarms := g.Alarms(); len(alarms) != 1 || !strings.Contains(alarms[0], "can't be measured") {
		t.Errorf("%v", alarms)
	}
}
