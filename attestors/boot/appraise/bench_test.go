package appraise

import (
	"crypto/sha256"
	"slices"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
)

// long is a boot of 160 events: the recorded one, with a longer grub.cfg.
func long(b *testing.B) ([]byte, map[int]evidence.Digest) {
	log, pcrs := recorded(b, "clean")
	parsed := parse(b, log)
	exit := slices.Clone(parsed.Events[len(parsed.Events)-2:])
	events := parsed.Events[:len(parsed.Events)-2]
	for len(events) < 158 {
		events = append(events, grubCommand("set feature_platform_search_hint=xy", "grub_cmd: "))
	}
	parsed.Events = append(events, exit...)
	return parsed.Encode(), recompute(parsed, pcrs)
}

func BenchmarkAppraise(b *testing.B) {
	log, pcrs := long(b)
	if n := len(parse(b, log).Events); n != 160 {
		b.Fatalf("%d events", n)
	}
	accepted(b, log, pcrs)
	b.SetBytes(int64(len(log)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Appraise(log, nil, pcrs); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFloor is SHA-256 of the same bytes, and nothing else.
func BenchmarkFloor(b *testing.B) {
	log, _ := long(b)
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		sha256.Sum256(log)
	}
}
