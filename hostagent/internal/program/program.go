// Package program finds the program that a credential is for, and notices when it starts
// and ends. The kinds of programs are packages below this folder; package kinds lists them.
//
// A kind must report only facts that a program can't choose itself. This package makes no
// decisions.
package program

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/process/collect"
	"github.com/countersign/countersign/hostagent/internal/config"
)

// ErrNotRunning is wrapped by errors for a program that isn't running.
var ErrNotRunning = errors.New("the program does not run")

// A Kind finds programs of one kind. It is safe for concurrent use.
type Kind interface {
	// Describes reports whether p describes a program of this kind.
	Describes(p config.Process) bool
	// Find returns the evidence of the program that p describes; ErrNotRunning
	// while there is none. Of several it is the instance named held, if that is
	// one of them.
	Find(ctx context.Context, p config.Process, held string) (process.Program, error)
	// Watch sends when Find may answer differently, until ctx ends.
	Watch(ctx context.Context, p config.Process) <-chan struct{}
	// Close releases the resources of Find and Watch.
	Close()
}

// A Starter is a Kind whose programs can wait for their credential before they
// run.
type Starter interface {
	// Starting returns the evidence of a unit that waits.
	Starting(ctx context.Context, unit string) (process.Program, error)
}

// A Finder finds programs of some kinds. It is safe for concurrent use.
type Finder struct {
	kinds []Kind

	mu    sync.Mutex
	looks map[config.Process]chan struct{} // guarded by mu; held by who looks
}

// New makes a Finder. The first of kinds that is described is asked.
func New(kinds ...Kind) *Finder {
	return &Finder{kinds: kinds, looks: map[config.Process]chan struct{}{}}
}

// Close closes all kinds.
func (f *Finder) Close() {
	for _, k := range f.kinds {
		k.Close()
	}
}

func (f *Finder) kind(p config.Process) (Kind, error) {
	for _, k := range f.kinds {
		if k.Describes(p) {
			return k, nil
		}
	}
	return nil, errors.New("programs of this description are not found on this system yet")
}

// Find is [Kind].Find of the kind that p describes. It returns when ctx ends.
func (f *Finder) Find(ctx context.Context, p config.Process, held string) (process.Program, error) {
	k, err := f.kind(p)
	if err != nil {
		return process.Program{}, err
	}
	return f.look(ctx, p, func() (process.Program, error) { return k.Find(ctx, p, held) })
}

// Starting is [Starter].Starting of the kind that finds units.
func (f *Finder) Starting(ctx context.Context, unit string) (process.Program, error) {
	p := config.Process{Unit: unit}
	k, err := f.kind(p)
	if err != nil {
		return process.Program{}, err
	}
	s, ok := k.(Starter)
	if !ok {
		return process.Program{}, fmt.Errorf("unit %s can't wait for its credential on this system", unit)
	}
	return f.look(ctx, p, func() (process.Program, error) { return s.Starting(ctx, unit) })
}

// Watch is [Kind].Watch of the kind that p describes.
func (f *Finder) Watch(ctx context.Context, p config.Process) <-chan struct{} {
	k, err := f.kind(p)
	if err != nil {
		return nil
	}
	return k.Watch(ctx, p)
}

// Process returns the evidence of one process, without its unit; ErrNotRunning
// where there is none. It is for kinds whose programs are processes.
func Process(pid int) (process.Program, error) {
	p, err := collect.Process(pid)
	if errors.Is(err, collect.ErrGone) {
		err = fmt.Errorf("%w: %w", ErrNotRunning, err)
	}
	return p, err
}

// look returns when ctx ends, even if the kernel doesn't: a user can make a file system
// hang. While a call hangs, no other is made for the same program.
func (f *Finder) look(ctx context.Context, p config.Process, see func() (process.Program, error)) (process.Program, error) {
	f.mu.Lock()
	turn := f.looks[p]
	if turn == nil {
		turn = make(chan struct{}, 1)
		f.looks[p] = turn
	}
	f.mu.Unlock()

	err := errors.New("an earlier look at the program hangs")
	select {
	case <-ctx.Done():
		return process.Program{}, errors.Join(err, ctx.Err())
	case turn <- struct{}{}:
	}

	type seen struct {
		program process.Program
		err     error
	}
	done := make(chan seen, 1)
	go func() {
		defer func() { <-turn }()
		p, err := see()
		done <- seen{p, err}
	}()

	select {
	case <-ctx.Done():
		return process.Program{}, fmt.Errorf("the look at the program takes too long: does a file system hang? %w", ctx.Err())
	case s := <-done:
		return s.program, s.err
	}
}
