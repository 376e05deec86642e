package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"
)

// A progress is one line on a terminal that says how far long work has come; elsewhere
// it is silent.
type progress struct {
	w     io.Writer // nil: nobody looks on
	next  time.Time
	shown bool
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return &progress{}
	}
	return &progress{w: w}
}

// show says that done of all are through, a few times a second.
func (p *progress) show(what string, done, all int64) {
	if p.w == nil {
		return
	}
	now := time.Now()
	if now.Before(p.next) {
		return
	}
	p.next, p.shown = now.Add(200*time.Millisecond), true
	fmt.Fprintf(p.w, "\r\x1b[K%s: %d of %d (%d %%)", what, done, all, 100*done/max(all, 1))
}

// waits says for how long the broker has been asked, for an answer that comes whole,
// until stop is called.
func (p *progress) waits(what string) (stop func()) {
	if p.w == nil {
		return func() {}
	}
	began, quit, done := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
				p.shown = true
				fmt.Fprintf(p.w, "\r\x1b[K%s: %.0f s", what, time.Since(began).Seconds())
			}
		}
	}()
	return func() { close(quit); <-done; p.end() }
}

// end clears the line.
func (p *progress) end() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
