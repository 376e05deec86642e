package inventory

import (
	"math/rand/v2"
	"testing"
)

// An agent keeps the number of the last answer that arrived.
type agent struct{ last int64 }

// prove shows the agent's number; lost says that the answer doesn't arrive.
func (a *agent) prove(c *Continuity, lost bool) (allowed bool) {
	if !c.Allows(a.last) {
		return false
	}
	*c = c.After(a.last)
	if !lost {
		a.last = c.Given
	}
	return true
}

// An honest agent is never refused, whatever answers are lost, however often its run folder
// is, and whatever the broker forgets by a restore.
func TestOneAgentIsOne(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		var c, backup Continuity
		a := &agent{}
		for step := range 300 {
			switch r.IntN(12) {
			case 0:
				a.last = 0
			case 1:
				backup = c
			case 2:
				c = backup
			}
			if !a.prove(&c, r.IntN(3) == 0) {
				t.Fatalf("seed %d, step %d: %d is refused at %+v", seed, step, a.last, c)
			}
		}
	}
}

// Two agents that went apart are found, as soon as each has been answered twice, even where
// one of them always says that it has no number.
func TestTwoAgentsAreFound(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		c := Continuity{}
		one := &agent{}
		for range 1 + r.IntN(5) {
			one.prove(&c, false)
		}
		two := &agent{one.last}
		silent := seed%4 == 0
		found, answered := false, [2]int{}
		for step := 0; step < 100 && !found; step++ {
			i := r.IntN(2)
			if i == 1 && silent {
				two.last = 0
			}
			lost := r.IntN(5) == 0
			found = !([]*agent{one, two}[i]).prove(&c, lost)
			if !lost {
				answered[i]++
			}
			if !found && !silent && answered[0] > 4 && answered[1] > 4 && step > 30 {
				t.Fatalf("seed %d: answered %v times, and not found: %+v", seed, answered, c)
			}
		}
		if !found {
			t.Errorf("seed %d: not found", seed)
		}
	}

	// By turns, it is the third proof of two.
	c := Continuity{}
	one := &agent{}
	one.prove(&c, false)
	two := &agent{one.last}
	for i, a := range []*agent{one, two, one, two} {
		if allowed := a.prove(&c, false); allowed != (i < 3) {
			t.Errorf("proof %d of two: %v", i, allowed)
		}
	}
	// An operator has said which one it is.
	c = c.Anew()
	for i, a := range []*agent{two, two, one} {
		if allowed := a.prove(&c, false); allowed != (i < 2) {
			t.Errorf("proof %d after an operator's word: %v", i, allowed)
		}
	}
}
