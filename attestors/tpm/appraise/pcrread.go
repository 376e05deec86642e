package appraise

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
)

var (
	bankLine  = regexp.MustCompile(`^ *(sha[0-9_]+) *:$`)
	valueLine = regexp.MustCompile(`^ *([0-9]{1,2}) *: *0x([0-9A-Fa-f]+)$`)
)

// ParsePCRRead reads what tpm2_pcrread prints, and returns its SHA-256 bank;
// other banks are passed over.
func ParsePCRRead(text string) (map[int]evidence.Digest, error) {
	if len(text) > 64<<10 {
		return nil, fmt.Errorf("%d bytes; tpm2_pcrread prints some 3000", len(text))
	}
	pcrs := map[int]evidence.Digest{}
	bank := ""
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimRight(line, " \r")
		if line == "" {
			continue
		}
		if m := bankLine.FindStringSubmatch(line); m != nil {
			bank = m[1]
			continue
		}
		m := valueLine.FindStringSubmatch(line)
		if m == nil || bank == "" {
			return nil, fmt.Errorf("line %d is neither a bank, as `sha256:`, nor a value, as `0 : 0x…`, in a bank", n+1)
		}
		if bank != "sha256" {
			continue
		}
		pcr, err := strconv.Atoi(m[1])
		if err != nil || pcr > 23 {
			return nil, fmt.Errorf("line %d: PCR %s", n+1, m[1])
		}
		if _, twice := pcrs[pcr]; twice {
			return nil, fmt.Errorf("line %d: PCR %d a second time", n+1, pcr)
		}
		if pcrs[pcr], err = evidence.ParseDigest(strings.ToLower(m[2])); err != nil {
			return nil, fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	if len(pcrs) == 0 {
		return nil, fmt.Errorf("no values of the sha256 bank")
	}
	return pcrs, nil
}
