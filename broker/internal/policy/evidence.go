package policy

import (
	"fmt"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/internal/bounded"
)

const (
	maxSaw     = 1024 // bytes of what a selector saw, in a record
	maxWord    = 256  // of a host's word in a record
	maxUnusual = 8    // unusual things in a record
)

// Evidence identifies the program that was decided on, for the audit log; nil where
// only the host was proven. It is short, whatever the program is.
func (d Decision) Evidence() *event.Evidence {
	p := d.facts.Program
	if p == nil {
		return nil
	}
	encoded, err := p.Encode()
	if err != nil {
		return nil // it was parsed
	}
	main := p.Main()
	return &event.Evidence{
		SHA256: evidence.Sum(encoded), Size: len(encoded), Instance: bounded.Text(p.Instance().String(), maxWord),
		User: bounded.Text(p.User, maxWord), Unit: bounded.Text(p.Unit(), maxWord), Exe: bounded.Text(main.Path, maxWord), Digest: main.SHA256,
		Mappings: len(p.Mappings), Unusual: unusual(p),
	}
}

// unusual are the first things about a program that most programs don't have.
func unusual(p *process.Program) (list []string) {
	more := 0
	add := func(format string, args ...any) {
		if len(list) == maxUnusual {
			more++
			return
		}
		list = append(list, bounded.Text(fmt.Sprintf(format, args...), maxWord))
	}
	for _, e := range p.Executables[min(1, len(p.Executables)):] {
		add("%s: %s, sha256 %s", e.Role, e.Path, e.SHA256)
	}
	if p.Starting {
		add("the unit is starting")
	}
	for _, m := range p.Mappings {
		switch {
		case m.Path == process.Anonymous:
			add("executable memory without a file")
		case !ordinary(m, p.Main().Path) && m.Deleted:
			add("mapped: %s (deleted)", m.Path)
		case !ordinary(m, p.Main().Path):
			add("mapped: %s", m.Path)
		}
	}
	if more > 0 {
		list = append(list, fmt.Sprintf("and %d more", more))
	}
	return list
}
