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
		c.Put(fmt.Sprint(i), nil, &appraise.Known{})
	}
	c.Get("0")
	c.Put("5", nil, &appraise.Known{})
	for host, want := range map[string]bool{"0": true, "1": false, "2": true, "5": true} {
		if got := c.Get(host) != nil; got != want {
			t.Errorf("host %s is known: %v", host, got)
		}
	}
	c.Put("5", c.Get("5"), &appraise.Known{})
	c.Forget("5")
	c.Forget("5")
	if c.Get("5") != nil || c.size != 4*one || c.order.Len() != 4 {
		t.Errorf("%d bytes of %d hosts", c.size, c.order.Len())
	}
}

// What was forgotten while a request was under way stays forgotten, unless the
// request itself had sent all of it.
func TestForgottenMeanwhile(t *testing.T) {
	c := New(Most)
	c.Put("h", nil, &appraise.Known{})
	prior := c.Get("h")
	c.Forget("h")
	c.Put("h", prior, &appraise.Known{})
	if c.Get("h") != nil {
		t.Error("a request that went on from what was forgotten brought it back")
	}
	whole := &appraise.Known{}
	c.Put("h", nil, whole)
	if c.Get("h") != whole {
		t.Error("a request that went on from nothing is not remembered")
	}
}
