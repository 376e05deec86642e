package measured

import (
	"fmt"
	"testing"

	"github.com/countersign/countersign/broker/internal/appraise"
)

// What isn't used is forgotten first, and nothing grows beyond the bound.
func TestForgets(t *testing.T) {
	one := (&appraise.Known{}).Size()
	c := New(5 * one)
	for i := range 5 {
		c.Put(fmt.Sprint(i), &appraise.Known{})
	}
	c.Get("0")
	c.Put("5", &appraise.Known{})
	for host, want := range map[string]bool{"0": true, "1": false, "2": true, "5": true} {
		if got := c.Get(host) != nil; got != want {
			t.Errorf("host %s is known: %v", host, got)
		}
	}
	c.Put("5", &appraise.Known{})
	c.Forget("5")
	c.Forget("5")
	if c.Get("5") != nil || c.size != 4*one || c.order.Len() != 4 {
		t.Errorf("%d bytes of %d hosts", c.size, c.order.Len())
	}
}
