package appraise_test

import (
	"math"
	"path/filepath"
	"testing"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

func TestCountersGoOneWay(t *testing.T) {
	seen := appraise.Counters{ResetCount: 10, RestartCount: 5, Clock: 1000, Safe: true}
	for _, c := range []struct {
		name   string
		now    appraise.Counters
		before bool
	}{
		{"the same", seen, false},
		{"later", appraise.Counters{ResetCount: 10, RestartCount: 5, Clock: 1001}, false},
		{"earlier", appraise.Counters{ResetCount: 10, RestartCount: 5, Clock: 999}, true},
		{"resumed", appraise.Counters{ResetCount: 10, RestartCount: 6, Clock: 0}, false},
		{"before it was resumed", appraise.Counters{ResetCount: 10, RestartCount: 4, Clock: 5000}, true},
		{"restarted", appraise.Counters{ResetCount: 11}, false},
		{"before it was restarted", appraise.Counters{ResetCount: 9, RestartCount: 9, Clock: 5000}, true},
	} {
		if got := c.now.Before(seen); got != c.before {
			t.Errorf("%s: Before is %v", c.name, got)
		}
		// The same under a constant that carries the counts over their end.
		shift := func(x appraise.Counters) appraise.Counters {
			x.ResetCount += math.MaxUint32 - 9
			x.RestartCount += math.MaxUint32 - 4
			return x
		}
		if got := shift(c.now).Before(shift(seen)); got != c.before {
			t.Errorf("%s, obfuscated: Before is %v", c.name, got)
		}
	}
}

// Power cycles and cuts count up; a TPM that goes back to a snapshot, and a
// recorded quote, are older than what was seen.
func TestCountersOfARealTPM(t *testing.T) {
	dir := t.TempDir()
	real := must[*lab.TPM](t)(lab.StartTPM(t.Context(), filepath.Join(dir, "tpm"), maker, lab.TPMOptions{}))
	defer real.Stop()
	device := must[*collect.Device](t)(collect.Open(real.Path()))
	blob := must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	ak := must[*appraise.AK](t)(appraise.ParseAK(blob.Public()))
	counters := func() appraise.Counters {
		t.Helper()
		quote := must[tpm.Quote](t)(device.Quote(t.Context(), blob, extra, []int{0}))
		return must[*appraise.Verified](t)(ak.VerifyQuote(quote, extra, []int{0})).Counters
	}
	forward := func(what string, seen appraise.Counters) appraise.Counters {
		t.Helper()
		now := counters()
		if now.Before(seen) {
			t.Errorf("%s: %+v is before %+v", what, now, seen)
		}
		if !seen.Before(now) && now != seen {
			t.Errorf("%s: a replay of %+v isn't before %+v", what, seen, now)
		}
		return now
	}
	seen := counters()
	seen = forward("at once", seen)
	if err := real.PowerCycle(t.Context()); err != nil {
		t.Fatal(err)
	}
	cycled := forward("after a restart", seen)
	if cycled.ResetCount-seen.ResetCount != 1 {
		t.Errorf("a restart took the reset count from %d to %d", seen.ResetCount, cycled.ResetCount)
	}
	snapshot := must[[]byte](t)(real.Snapshot())
	if err := real.PowerCut(t.Context()); err != nil {
		t.Fatal(err)
	}
	cut := forward("after a power cut", cycled)
	if cut.ResetCount-cycled.ResetCount != 1 {
		t.Errorf("a power cut took the reset count from %d to %d", cycled.ResetCount, cut.ResetCount)
	}
	if err := real.PowerCycle(t.Context()); err != nil {
		t.Fatal(err)
	}
	latest := forward("after another restart", cut)
	if err := real.Revert(t.Context(), snapshot); err != nil {
		t.Fatal(err)
	}
	if reverted := counters(); !reverted.Before(latest) {
		t.Errorf("a TPM that went back to a snapshot shows %+v, not before %+v", reverted, latest)
	}
}
