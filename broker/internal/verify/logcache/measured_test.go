package logcache

import (
	"fmt"
	"testing"

	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// What isn't used is forgotten first, and nothing grows beyond the bound.
func TestForgets(t *testing.T) {
	one := (&appraise.Known{}).Size()
	c := New(5 * one)
	for i := range 5 {
		c.Put(fmt.Sprint(i), 0, nil, &appraise.Known{})
	}
	c.Get("0", 0)
	c.Put("5", 0, nil, &appraise.Known{})
	for host, want := range map[string]bool{"0": true, "1": false, "2": true, "5": true} {
		if got := c.Get(host, 0) != nil; got != want {
			t.Errorf("host %s is known: %v", host, got)
		}
	}
	c.Put("5", 0, c.Get("5", 0), &appraise.Known{})
	c.Forget("5")
	c.Forget("5")
	if c.Get("5", 0) != nil || c.size != 4*one || c.order.Len() != 4 {
		t.Errorf("%d bytes of %d hosts", c.size, c.order.Len())
	}
}

// What was forgotten while a request was under way stays forgotten, unless the
// request itself had sent all of it.
func TestForgottenMeanwhile(t *testing.T) {
	c := New(Most)
	c.Put("h", 0, nil, &appraise.Known{})
	prior := c.Get("h", 0)
	c.Forget("h")
	c.Put("h", 0, prior, &appraise.Known{})
	if c.Get("h", 0) != nil {
		t.Error("a request that went on from what was forgotten brought it back")
	}
	whole := &appraise.Known{}
	c.Put("h", 0, nil, whole)
	if c.Get("h", 0) != whole {
		t.Error("a request that went on from nothing is not remembered")
	}
}

// What is known holds until the next step-up, though a request from before it ends later.
func TestStepUp(t *testing.T) {
	c := New(Most)
	old, late, whole := &appraise.Known{}, &appraise.Known{}, &appraise.Known{}
	c.Put("h", 0, nil, old)
	c.Put("h", 0, old, late)
	if c.Get("h", 1) != nil || c.Get("h", 0) != late {
		t.Error("what was known before a step-up is known after it")
	}
	c.Put("h", 1, nil, whole)
	c.Put("h", 0, late, old)
	c.Put("h", 0, nil, old)
	if c.Get("h", 1) != whole || c.Get("h", 0) != nil {
		t.Error("a request from before a step-up took the place of one from after it")
	}
}
