package appraise

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
)

var (
	bankLine  = regexp.MustCompile(`^ *([a-z0-9_]+) *:$`)
	valueLine = regexp.MustCompile(`^ *([0-9]{1,2}) *: *0x([0-9A-Fa-f]+)$`)
)

// ParsePCRRead reads what tpm2_pcrread prints, and returns its SHA-256 bank. Of
// other banks nothing is read. The error tells of lines that couldn't be read;
// the values of the others come with it, for who has a quote to hold them
// against.
func ParsePCRRead(text string) (map[int]evidence.Digest, error) {
	if len(text) > 64<<10 {
		return nil, fmt.Errorf("%d bytes; tpm2_pcrread prints some 3000", len(text))
	}
	pcrs := map[int]evidence.Digest{}
	twice := map[int]bool{}
	var errs []error
	bank := ""
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimRight(line, " \r")
		if m := bankLine.FindStringSubmatch(line); m != nil {
			bank = m[1]
			continue
		}
		if line == "" || bank != "sha256" {
			continue
		}
		m := valueLine.FindStringSubmatch(line)
		if m == nil {
			errs = append(errs, fmt.Errorf("line %d is no value, as `0 : 0x…`", n+1))
			continue
		}
		pcr, err := strconv.Atoi(m[1])
		if err != nil || pcr > 23 {
			errs = append(errs, fmt.Errorf("line %d: PCR %s", n+1, m[1]))
			continue
		}
		value, err := evidence.ParseDigest(strings.ToLower(m[2]))
		_, known := pcrs[pcr]
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("line %d: %w", n+1, err))
		case known || twice[pcr]:
			errs = append(errs, fmt.Errorf("line %d: PCR %d a second time", n+1, pcr))
			twice[pcr] = true
			delete(pcrs, pcr)
		default:
			pcrs[pcr] = value
		}
	}
	if len(pcrs) == 0 {
		errs = append(errs, errors.New("no values of the sha256 bank"))
	}
	return pcrs, errors.Join(errs...)
}
