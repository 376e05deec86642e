package boot

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Unsuited returns why no quote of SHA-256 PCRs can prove the log: none of the
// events that extend a register has a SHA-256 digest. It returns nil for every
// other log, and for one without such events.
func (l *Log) Unsuited() error {
	var found []Algorithm
	ccRegisters := true // whether all events are in the registers of a CC event log
	for i := range l.Events {
		e := &l.Events[i]
		if e.Type == NoAction {
			continue
		}
		if e.Digest(SHA256) != nil {
			return nil
		}

		for _, d := range e.Digests {
			if !slices.Contains(found, d.Algorithm) {
				found = append(found, d.Algorithm)
			}
		}
		// Index 0 of a CC event log is the TD's initial memory (MRTD), which no event
		// extends; 1 to 4 are RTMR0 to RTMR3. A TPM's log has events in PCR 0.
		ccRegisters = ccRegisters && e.PCR >= 1 && e.PCR <= 4
	}

	switch {
	case len(found) == 0:
		return nil
	case ccRegisters && slices.Equal(found, []Algorithm{sha384}):
		return errors.New("a confidential VM's event log (CC measurement registers, as Intel TDX's RTMRs), proven by a TD quote and not by a TPM: give the VM a vTPM and use its log")
	}

	slices.Sort(found)
	names := make([]string, 0, len(found))
	for _, alg := range found {
		names = append(names, alg.String())
	}
	return fmt.Errorf("the log has no SHA-256 digests, only %s: activate the TPM's SHA-256 PCR bank in the firmware's settings", strings.Join(names, ", "))
}
