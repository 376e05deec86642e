package inventory

// A Continuity says which answers a host's next proof may continue from. Each answer gives
// the host a number, and its next proof shows it; so of two machines that run with one
// TPM's state, a host and its copy, one soon shows a number that the other has left behind.
//
// A number that was given counts until a later proof of the host has shown another one: an
// answer may be lost on its way, and then the host shows the number before it again.
type Continuity struct {
	Shown int64 // by the last proof; 0: it showed none
	Left  int64 // numbers up to this one were left behind, but for Shown; 0: none were
	Given int64 // the highest
}

// Allows reports whether a proof may show n; 0 is none, as an agent shows that was made
// before this or has lost its run folder. A number that was never given is of a broker
// whose store is restored, and may be shown, too.
func (c Continuity) Allows(n int64) bool {
	return n == 0 || n > c.Left || n == c.Shown
}

// After returns what comes after a proof that shows n, which c allows: its Given is the
// number to answer with.
func (c Continuity) After(n int64) Continuity {
	switch {
	case n == 0:
		c.Left, c.Shown = c.Given, 0
	case n > c.Given:
		c.Left, c.Shown, c.Given = n, n, n
	case n > c.Left:
		c.Left, c.Shown = c.Given, n
	}
	c.Given++
	return c
}

// Anew returns what allows any number once: an operator has said which machine is the host.
func (c Continuity) Anew() Continuity { return Continuity{Given: c.Given} }
