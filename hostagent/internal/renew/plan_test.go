package renew

import (
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

func TestPlan(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	unit := func(invocation string) *process.Program {
		return &process.Program{Boot: "b", PID: 9, Start: 9, Executables: process.OneFile("/x", evidence.Sum([]byte("x"))),
			Linux: &process.Linux{Unit: "x.service", Invocation: strings.Repeat(invocation, 32)}}
	}
	lease := func(edit func(*Lease)) *Lease {
		l := &Lease{ID: "l", Instance: unit("a").Instance().String(), Boot: "b", Unit: "x.service", SHA256: evidence.Sum([]byte("x")).String(),
			Expires: now.Add(time.Hour), Replace: now.Add(40 * time.Minute), Acked: true}
		if edit != nil {
			edit(l)
		}
		return l
	}
	other := unit("a")
	other.Executables[0].SHA256 = evidence.Sum([]byte("another program"))
	offered := lease(func(l *Lease) { l.AckBy = now.Add(2 * time.Minute) })
	for _, tt := range []struct {
		name  string
		o     Observed
		want  Kind
		until time.Duration // from now, 0: none
	}{
		{"nothing to do", Observed{}, Wait, 0},
		{"the program came", Observed{Program: unit("a")}, Obtain, 0},
		{"not again at once", Observed{Program: unit("a"), RetryAt: now.Add(time.Minute)}, Wait, time.Minute},
		{"in force", Observed{Program: unit("a"), Lease: lease(nil)}, Wait, 40 * time.Minute},
		{"due", Observed{Program: unit("a"), Lease: lease(func(l *Lease) { l.Replace = now })}, Obtain, 0},
		{"due, but the broker is away", Observed{Program: unit("a"), Lease: lease(func(l *Lease) { l.Replace = now }), RetryAt: now.Add(time.Minute), Offline: true}, Wait, time.Minute},
		{"expired", Observed{Program: unit("a"), Lease: lease(func(l *Lease) { l.Expires = now })}, Withdraw, 0},
		{"the program ended", Observed{Lease: lease(nil)}, Withdraw, 0},
		{"the program can't be seen", Observed{Unknown: true, Lease: lease(nil)}, Wait, time.Hour},
		{"unseen and expired", Observed{Unknown: true, Lease: lease(func(l *Lease) { l.Expires = now })}, Withdraw, 0},
		{"unseen, nothing held", Observed{Unknown: true}, Wait, 0},
		{"another invocation", Observed{Program: unit("b"), Lease: lease(nil)}, Withdraw, 0},
		{"hand-over: not come yet", Observed{Lease: lease(func(l *Lease) { l.Coming = true })}, Wait, 40 * time.Minute},
		{"hand-over: it came", Observed{Program: unit("b"), Lease: lease(func(l *Lease) { l.Coming = true })}, Wait, 40 * time.Minute},
		{"hand-over: it never came", Observed{Lease: lease(func(l *Lease) { l.Coming = true; l.Expires = now })}, Withdraw, 0},
		{"withheld while down", Observed{Withheld: lease(nil)}, Wait, time.Hour},
		{"withheld, the broker answers", Observed{Program: unit("b"), Withheld: lease(nil)}, Obtain, 0},
		{"withheld, the broker is away", Observed{Program: unit("b"), Withheld: lease(nil), Offline: true, RetryAt: now.Add(time.Minute)}, Adopt, 0},
		{"withheld, another program", Observed{Program: other, Withheld: lease(nil), Offline: true, RetryAt: now.Add(time.Minute)}, Wait, time.Minute},
		{"withheld and expired", Observed{Program: unit("b"), Withheld: lease(func(l *Lease) { l.Expires = now }), Offline: true}, Drop, 0},
		{"offered", Observed{Program: unit("a"), Offered: offered}, Wait, 2 * time.Minute},
		{"offered and read", Observed{Program: unit("a"), Offered: offered, Read: true}, Accept, 0},
		{"offered, and not read in time", Observed{Program: unit("a"), Offered: lease(func(l *Lease) { l.AckBy = now })}, Retract, 0},
		{"read at the last moment", Observed{Program: unit("a"), Offered: lease(func(l *Lease) { l.AckBy = now }), Read: true}, Accept, 0},
		{"offered, and the program ended", Observed{Offered: offered}, Retract, 0},
		{"offered, and the program can't be seen", Observed{Unknown: true, Offered: offered}, Wait, 2 * time.Minute},
		{"offered, and another came", Observed{Program: unit("b"), Offered: offered}, Retract, 0},
		{"offered beside one that is due", Observed{Program: unit("a"), Lease: lease(func(l *Lease) { l.Replace = now }), Offered: offered}, Wait, 2 * time.Minute},
		{"offered beside one that expires", Observed{Program: unit("a"), Lease: lease(func(l *Lease) { l.Expires = now }), Offered: offered}, Withdraw, 0},
		{"it comes again, and nothing is there to serve", Observed{Program: unit("a"), Lease: lease(nil), Asked: true}, Obtain, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.o.Now = now
			a := Plan(tt.o)
			if a.Kind != tt.want {
				t.Fatalf("action %d %q, want %d", a.Kind, a.Reason, tt.want)
			}
			if tt.want != Wait {
				return
			}
			if tt.until == 0 && !a.Until.IsZero() || tt.until != 0 && !a.Until.Equal(now.Add(tt.until)) {
				t.Errorf("waits until %v, want %v from now", a.Until, tt.until)
			}
		})
	}
}
