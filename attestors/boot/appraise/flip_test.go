package appraise

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// sample is the part of the places that a short run tries: one in so many. It is prime,
// so that it meets each bit of bytes and each field of equal records.
const sample = 23

// everywhere calls f for 0 to n-1 from as many goroutines as there are cores; in a short
// run for a sample of them, where there are many.
func everywhere(n int, f func(i int)) {
	if testing.Short() && n > 1000 {
		all := f
		f = func(i int) {
			if i%sample == 0 {
				all(i)
			}
		}
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// Every bit of a log, turned over, is refused or makes no false fact: what is proven
// stays as it was, or is absent.
// Those of SHA-256 digests of what extends a PCR are all refused.
func TestEveryBitOfALog(t *testing.T) {
	for _, fixture := range []string{"clean", "direct-kernel"} {
		t.Run(fixture, func(t *testing.T) {
			log, pcrs := recorded(t, fixture)
			honest := accepted(t, log, pcrs)
			digest := make([]bool, len(log))
			for _, e := range parse(t, log).Events {
				if e.Type == boot.NoAction {
					continue
				}
				// PCR, type, count, SHA-1 with its name, and SHA-256's name stand before it.
				start := e.Offset + 4 + 4 + 4 + 2 + 20 + 2
				if !slices.Equal(log[start:start+32], e.Digest(boot.SHA256)) {
					t.Fatal("the test's offsets are wrong")
				}
				for i := start; i < start+32; i++ {
					digest[i] = true
				}
			}
			var refused atomic.Int64
			everywhere(8*len(log), func(bit int) {
				changed := slices.Clone(log)
				changed[bit/8] ^= 1 << (bit % 8)
				facts, err := Appraise(changed, nil, pcrs)
				switch {
				case err != nil && evidence.CheckOf(err) == "":
					t.Errorf("bit %d: %v isn't a rejection", bit, err)
				case err != nil:
					refused.Add(1)
				case digest[bit/8]:
					t.Errorf("bit %d of a digest may be turned over", bit)
				default:
					if wrong := falseFacts(honest, facts); wrong != nil {
						t.Errorf("bit %d (byte %d): false facts %q", bit, bit/8, wrong)
					}
				}
			})
			t.Logf("%d of %d were refused", refused.Load(), 8*len(log))
		})
	}
}

func TestEveryTruncation(t *testing.T) {
	for _, fixture := range []string{"clean", "direct-kernel"} {
		log, pcrs := recorded(t, fixture)
		accepted(t, log, pcrs)
		everywhere(len(log), func(n int) {
			if _, err := Appraise(log[:n], nil, pcrs); evidence.CheckOf(err) == "" {
				t.Errorf("%s: the first %d of %d bytes gave %v", fixture, n, len(log), err)
			}
		})
	}
}

func TestEveryBitOfThePCRs(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	honest := accepted(t, log, pcrs)
	for _, pcr := range honest.PCRsReplayed {
		everywhere(256, func(bit int) {
			changed := map[int]evidence.Digest{}
			for p, v := range pcrs {
				if p == pcr {
					v[bit/8] ^= 1 << (bit % 8)
				}
				changed[p] = v
			}
			if _, err := Appraise(log, nil, changed); evidence.CheckOf(err) != CheckReplay {
				t.Errorf("PCR %d bit %d: %v", pcr, bit, err)
			}
		})
	}
}

// An event taken out, doubled, or put in at any place is refused, and so are two
// neighbours of one PCR in the other order.
func TestEveryEvent(t *testing.T) {
	for _, fixture := range []string{"clean", "direct-kernel"} {
		log, pcrs := recorded(t, fixture)
		accepted(t, log, pcrs)
		refuse := func(what string, i int, events []boot.Event) {
			changed := parse(t, log)
			changed.Events = events
			if facts, err := Appraise(changed.Encode(), nil, pcrs); evidence.CheckOf(err) == "" {
				t.Errorf("%s: event %d %s: %v, unexplained %v", fixture, i, what, err, facts.PCRsUnexplained)
			}
		}
		events := parse(t, log).Events
		alone := map[uint32]int{}
		for _, e := range events {
			alone[e.PCR]++
		}
		for i, e := range events {
			if e.PCR < firmwarePCRs || alone[e.PCR] > 1 {
				refuse("left out", e.Number, slices.Delete(slices.Clone(events), i, i+1))
			}
			refuse("doubled", e.Number, slices.Insert(slices.Clone(events), i, e))
			for pcr := range uint32(boot.PCRCount) {
				if pcr == pcrIMA || pcr >= 16 { // IMA replays its own; the rest isn't quoted
					continue
				}
				added := event(pcr, boot.IPL, []byte("x"), []byte("x"))
				refuse("has one put before it", e.Number, slices.Insert(slices.Clone(events), i, added))
			}
			if i+1 < len(events) && events[i+1].PCR == e.PCR && !slices.Equal(e.Digest(boot.SHA256), events[i+1].Digest(boot.SHA256)) {
				swapped := slices.Clone(events)
				swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
				refuse("swapped with the next", e.Number, swapped)
			}
		}
		// One event that is all its PCR has may be left out: the PCR is then unexplained.
		for i, e := range events {
			if e.PCR >= firmwarePCRs && alone[e.PCR] == 1 {
				changed := parse(t, log)
				changed.Events = slices.Delete(slices.Clone(events), i, i+1)
				facts := accepted(t, changed.Encode(), pcrs)
				if !slices.Equal(facts.PCRsUnexplained, []int{int(e.PCR)}) {
					t.Errorf("%s without event %d: unexplained %v", fixture, e.Number, facts.PCRsUnexplained)
				}
			}
		}
	}
}
