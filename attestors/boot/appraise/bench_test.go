package appraise

import (
	"crypto/sha256"
	"slices"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
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

// largest is the largest log of a real machine beside the repository, or else the
// one of the benchmark above.
func largest(b *testing.B) ([]byte, map[int]evidence.Digest) {
	log, pcrs := long(b)
	size := 0
	for _, m := range machines(b, "logs") {
		if len(m.log) > size {
			size, log, pcrs = len(m.log), m.log, m.pcrs
		}
	}
	return log, pcrs
}

func BenchmarkLargest(b *testing.B) {
	log, pcrs := largest(b)
	appraiseOften(b, log, pcrs)
}

func BenchmarkReplay(b *testing.B) {
	log, pcrs := largest(b)
	replayOften(b, log, pcrs)
}

// BenchmarkKernels appraises a log that names as many kernels as fit.
func BenchmarkKernels(b *testing.B) {
	log, pcrs := manyKernels(b)
	appraiseOften(b, log, pcrs)
}

func BenchmarkKernelsReplay(b *testing.B) {
	log, pcrs := manyKernels(b)
	replayOften(b, log, pcrs)
}

func appraiseOften(b *testing.B, log []byte, pcrs map[int]evidence.Digest) {
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if _, err := Appraise(log, nil, pcrs); err != nil {
			b.Fatal(err)
		}
	}
}

// replayOften does what an appraisal can't do without: it parses the log, sorts its
// measurements by PCR and replays them.
func replayOften(b *testing.B, log []byte, pcrs map[int]evidence.Digest) {
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		parsed, err := boot.Parse(log)
		if err != nil {
			b.Fatal(err)
		}
		l, facts := &bootLog{}, Facts{}
		if err := l.sort(parsed); err != nil {
			b.Fatal(err)
		}
		if err := l.replay(nil, pcrs, &facts); err != nil {
			b.Fatal(err)
		}
	}
}
