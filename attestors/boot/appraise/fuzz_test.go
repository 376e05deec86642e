package appraise

import (
	"testing"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// FuzzAppraise holds a log against the PCRs of a recorded boot, which it can't
// change, and against those that it claims itself.
func FuzzAppraise(f *testing.F) {
	log, pcrs := recorded(f, "clean")
	honest := accepted(f, log, pcrs)
	later := record(11, "phase", "enter-initrd")
	for _, fixture := range []string{"clean", "cmdline", "direct-kernel"} {
		other, _ := recorded(f, fixture)
		f.Add(other, []byte(later))
	}
	f.Fuzz(func(t *testing.T, log, later []byte) {
		facts, err := Appraise(log, later, pcrs)
		if err != nil && evidence.CheckOf(err) == "" {
			t.Fatalf("%v is no rejection", err)
		}
		if err == nil {
			// Root may leave out what stands in PCR 9 and up, and so lose facts, never change them.
			if wrong := falseFacts(honest, facts); wrong != nil {
				t.Fatalf("false facts %q of the same PCRs: %+v", wrong, facts)
			}
		}
		if parsed, err := boot.Parse(log); err == nil {
			if _, err := Appraise(log, later, recompute(parsed, nil)); err != nil && evidence.CheckOf(err) == "" {
				t.Fatalf("%v is no rejection", err)
			}
		}
	})
}
