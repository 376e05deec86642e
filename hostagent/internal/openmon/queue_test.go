package openmon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// A call to the broker, by a test's clock.
type call struct {
	after time.Duration
	opens []attest.FileOpen
}

// told runs a queue within a bubble for a while, over a broker that answers.
func told(t *testing.T, enter func(q *queue), answer func(n int) error, d time.Duration) (calls []call) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	q := newQueue(slog.New(slog.DiscardHandler), time.Now)
	begin := time.Now()
	go enter(q)
	synctest.Wait() // for what is entered at once
	q.tell(ctx, func(_ context.Context, opens []attest.FileOpen) error {
		calls = append(calls, call{time.Since(begin), slices.Clone(opens)})
		return answer(len(calls))
	})
	return calls
}

func sight(q *queue, lease, exe string) { sightOf(q, "c", lease, exe) }

func sightOf(q *queue, credential, lease, exe string) {
	q.enter(&seen{kind{credential: credential, exe: exe}, attest.FileOpen{Lease: lease, Exe: exe}})
}

func fine(int) error { return nil }

func TestToldOnceAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := told(t, func(q *queue) {
			for range 2*360 - 1 {
				sight(q, "l", "/bin/cat")
				time.Sleep(10 * time.Second)
			}
		}, fine, 2*time.Hour-time.Second)
		if len(calls) != 2 || calls[0].after != 0 || calls[1].after != time.Hour || calls[0].opens[0].User != "root" {
			t.Errorf("%+v", calls)
		}
	})
}

// At most sixteen of one lease in a call, and a call every ten seconds.
func TestThePace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := told(t, func(q *queue) {
			for i := range 40 {
				sightOf(q, fmt.Sprint("c", i/14), fmt.Sprint("l", i%4), fmt.Sprint("/bin/", i))
			}
		}, fine, time.Hour)
		var sizes []int
		for i, c := range calls {
			sizes = append(sizes, len(c.opens))
			if c.after != time.Duration(i)*callEvery {
				t.Errorf("call %d after %v", i, c.after)
			}
			for _, o := range c.opens {
				if o.Lease != c.opens[0].Lease {
					t.Errorf("call %d is of %s and %s", i, o.Lease, c.opens[0].Lease)
				}
			}
		}
		if want := []int{4, 4, 3, 4, 4, 3, 3, 3, 3, 3, 3, 3}; !slices.Equal(sizes, want) {
			t.Errorf("%v, want %v", sizes, want)
		}
	})
}

// A fault loses nothing and is not pressed; what can't wait any more is what
// came last.
func TestTheBrokerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := told(t, func(q *queue) {
			for i := range 2 * maxKinds {
				sight(q, "l", fmt.Sprint("/bin/", i))
			}
		}, func(n int) error {
			if n < 4 {
				return errors.New("no broker")
			}
			return nil
		}, time.Hour)
		if len(calls) != 5 || calls[3].after != 3*retryAfter || len(calls[3].opens) != maxKinds || calls[3].opens[0].Exe != "/bin/0" ||
			calls[3].opens[maxKinds-1].Exe != fmt.Sprint("/bin/", maxKinds-1) {
			t.Fatalf("%+v", calls)
		}
		if o := calls[4].opens; len(o) != 1 || o[0] != (attest.FileOpen{Lease: "l", Exe: others, Time: o[0].Time}) {
			t.Errorf("%+v", o)
		}
	})
}

// A flood of one credential's kinds is told of as such, hour by hour, and keeps
// no other credential's out.
func TestAFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, since := 0, time.Now()
		calls := told(t, func(q *queue) {
			for range 3*3600 - 1 {
				for range 10 {
					sightOf(q, "flooded", "f", fmt.Sprint("/tmp/", n))
					n++
				}
				if time.Since(since) == 10*time.Minute {
					sightOf(q, "quiet", "q", "/bin/cat")
				}
				time.Sleep(time.Second)
			}
		}, fine, 3*time.Hour)
		of := map[string]int{}
		for _, c := range calls {
			for _, o := range c.opens {
				switch {
				case o.Lease == "q":
					of["quiet"]++
					if c.after > 10*time.Minute+callEvery {
						t.Errorf("told after %v", c.after)
					}
				case o.Exe == others:
					of["others"]++
				default:
					of["flooded"]++
				}
			}
		}
		if of["quiet"] != 1 || of["flooded"] != 3*maxKinds || of["others"] != 3 {
			t.Errorf("%v", of)
		}
	})
}

// However much waits of one credential, or isn't taken, the next call is another's.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := told(t, func(q *queue) {
			for i := range 100 {
				sightOf(q, "flooded", fmt.Sprint("f", i), fmt.Sprint("/bin/", i))
			}
			sightOf(q, "quiet", "q", "/bin/cat")
		}, func(n int) error {
			if n == 1 {
				return errors.New("not this one")
			}
			return nil
		}, time.Hour)
		if len(calls) < 2 || calls[0].opens[0].Lease != "f0" || calls[1].opens[0].Lease != "q" {
			t.Errorf("%+v", calls)
		}
	})
}

// What is of a lease that is over is told of the next one.
func TestALeaseThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := told(t, func(q *queue) {
			sight(q, "old", "/bin/cat")
			time.Sleep(time.Minute)
			sight(q, "new", "/bin/cat")
		}, func(n int) error {
			if n == 1 {
				return &api.Error{Outcome: api.Fault, Check: api.CheckGone, Message: "over"}
			}
			return nil
		}, time.Hour)
		if len(calls) != 2 || calls[1].opens[0].Lease != "new" {
			t.Errorf("%+v", calls)
		}
	})
}

// What is remembered and what waits is bounded, also when hours go by without a broker.
func TestTheMemoryIsBounded(t *testing.T) {
	now := time.Now()
	q := newQueue(slog.New(slog.DiscardHandler), func() time.Time { return now })
	for hour := range 3 {
		for i := range 1000 {
			sight(q, "l", fmt.Sprint("/bin/", hour, i))
		}
		if l := q.line("c"); len(l.told) > maxKinds+1 || len(l.pending) != maxKinds+1 || len(q.lines) != 1 {
			t.Errorf("hour %d: %d are remembered, %d wait", hour, len(l.told), len(l.pending))
		}
		now = now.Add(again)
	}
}

func TestOwns(t *testing.T) {
	line := func(exes ...string) (v visitor) {
		for i, e := range exes {
			v.line = append(v.line, relative{100 + i, e})
		}
		return v
	}
	in := func(unit string) visitor { v := line("/bin/cat", "/bin/sh"); v.unit = unit; return v }
	at := func(pid int) *process.Program { return &process.Program{PID: pid} }
	for name, tt := range map[string]struct {
		process config.Process
		program *process.Program
		visitor visitor
		want    bool
	}{
		"the unit":                         {config.Process{Unit: "a.service"}, nil, in("a.service"), true},
		"another unit":                     {config.Process{Unit: "a.service"}, nil, in("b.service"), false},
		"no unit":                          {config.Process{Unit: "a.service"}, nil, in(""), false},
		"outside the unit, by its process": {config.Process{Unit: "a.service"}, at(101), in("b.service"), false},
		"the executable":                   {config.Process{Exe: "/bin/d"}, nil, line("/bin/d"), true},
		"its child":                        {config.Process{Exe: "/bin/d"}, nil, line("/bin/cat", "/bin/sh", "/bin/d"), true},
		"its parent":                       {config.Process{Exe: "/bin/d"}, nil, line("/bin/sh"), false},
		"what has no executable":           {config.Process{PIDFile: "/run/d"}, nil, line(""), false},
		"the attested":                     {config.Process{PIDFile: "/run/d"}, at(100), line("/bin/d"), true},
		"the attested's child":             {config.Process{PIDFile: "/run/d"}, at(101), line("/bin/cat", "/bin/d"), true},
		"another than the attested":        {config.Process{PIDFile: "/run/d"}, at(102), line("/bin/cat", "/bin/d"), false},
		"the agent's command":              {config.Process{Unit: "a.service"}, nil, visitor{line: []relative{{5, "/bin/cat"}, {9, "/usr/bin/countersign-agent"}}}, true},
		"nobody":                           {config.Process{Exe: "/bin/d"}, at(0), nobody, false},
	} {
		if got := owns(tt.process, tt.program, 9, tt.visitor); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{"": "", "/bin/ü": "/bin/ü", "\xff\n": "\uFFFD\n", strings.Repeat("ü", 300) + "x": strings.Repeat("ü", 256),
		"x" + strings.Repeat("ü", 300): "x" + strings.Repeat("ü", 255) + "\uFFFD"} {
		if got := text(in); got != want || !utf8.ValidString(got) {
			t.Errorf("%q: %q", in, got)
		}
	}
}
