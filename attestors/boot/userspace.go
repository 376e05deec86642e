package boot

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// A Measurement is one record of the log that systemd keeps of what it measures
// after boot (/run/log/systemd/tpm2-measure.log). Text is proven only where the
// digest is its hash.
type Measurement struct {
	PCR    int
	SHA256 []byte
	Kind   string // "phase", "machine-id", …, as systemd names it
	Text   string
}

// record is the TCG's Canonical Event Log in JSON, as far as systemd writes it.
type record struct {
	PCR     *int    `json:"pcr"`
	NVIndex *uint32 `json:"nv_index"` // an NV index that is extended like a PCR
	Digests []struct {
		Algorithm string `json:"hashAlg"`
		Digest    string `json:"digest"`
	} `json:"digests"`
	ContentType string `json:"content_type"`
	Content     struct {
		EventType string `json:"eventType"`
		String    string `json:"string"`
	} `json:"content"`
}

// recordSeparator opens each record of a JSON text sequence (RFC 7464).
const recordSeparator = 0x1E

// ParseUserspace reads systemd's log: records that each begin with 0x1E and end
// with a line feed. Records that extend an NV index aren't about PCRs and are left
// out.
func ParseUserspace(b []byte) ([]Measurement, error) {
	if len(b) > MaxLog {
		return nil, fmt.Errorf("the log has %d bytes: at most %d are read", len(b), MaxLog)
	}
	if len(b) == 0 {
		return nil, nil
	}
	if b[0] != recordSeparator {
		return nil, errors.New("record 0 doesn't begin with a record separator (0x1E)")
	}
	var out []Measurement
	n := 0
	for text := range bytes.SplitSeq(b[1:], []byte{recordSeparator}) {
		m, err := parseRecord(text)
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", n, err)
		}
		if m != nil {
			out = append(out, *m)
		}
		n++
	}
	return out, nil
}

func parseRecord(text []byte) (*Measurement, error) {
	if !bytes.HasSuffix(text, []byte("\n")) {
		return nil, errors.New("it has no line feed at its end: it was cut")
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, err
	}
	if (r.PCR == nil) == (r.NVIndex == nil) {
		return nil, errors.New("it names neither a PCR nor an NV index, or both")
	}
	var sha256 []byte
	for _, d := range r.Digests {
		if d.Algorithm != "sha256" {
			continue
		}
		if sha256 != nil {
			return nil, errors.New("it has two SHA-256 digests")
		}
		var err error
		if sha256, err = hex.DecodeString(d.Digest); err != nil || len(sha256) != sizes[SHA256] {
			return nil, errors.New("its SHA-256 digest isn't 64 hex digits")
		}
	}
	if r.NVIndex != nil {
		return nil, nil
	}
	if *r.PCR < 0 || *r.PCR >= PCRCount {
		return nil, fmt.Errorf("its PCR is %d: a TPM has %d", *r.PCR, PCRCount)
	}
	if sha256 == nil {
		return nil, errors.New("it has no SHA-256 digest")
	}
	return &Measurement{PCR: *r.PCR, SHA256: sha256, Kind: r.Content.EventType, Text: r.Content.String}, nil
}
