package program

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// A look that hangs ends for who asked, keeps its place, and is no other's.
func TestALookThatHangs(t *testing.T) {
	f := New()
	free := make(chan struct{})
	looks := 0
	see := func() (process.Program, error) { looks++; <-free; return process.Program{PID: 7}, nil }
	hung, fine := config.Process{Exe: "/a"}, config.Process{Exe: "/b"}
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := f.look(ctx, hung, see); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("it hangs: %v", err)
		}
		cancel()
	}
	if p, err := f.look(t.Context(), fine, func() (process.Program, error) { return process.Program{PID: 8}, nil }); err != nil || p.PID != 8 {
		t.Errorf("another: %v, %v", p.PID, err)
	}
	close(free)
	if p, err := f.look(t.Context(), hung, see); err != nil || p.PID != 7 || looks != 2 {
		t.Errorf("it doesn't hang any more: %v, %v, %d looks", p.PID, err, looks)
	}
}
