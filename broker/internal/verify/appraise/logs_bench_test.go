package appraise

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"runtime"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
)

// measuredList is a list of n entries, as a machine with many packages has
// them, and what it leads to after each of the given numbers of entries.
func measuredList(n int, at ...int) (list []byte, offsets []int, pcrs []map[int]evidence.Digest) {
	values := map[int]evidence.Digest{}
	sum := sha256.New()
	for pcr := range 10 {
		d := evidence.Sum([]byte{byte(pcr)})
		values[pcr] = d
		sum.Write(d[:])
	}
	var ten evidence.Digest
	for i := range n {
		digest, name := sha256.Sum256([]byte{byte(i), byte(i >> 8), byte(i >> 16)}), fmt.Sprintf("/usr/lib/python3/dist-packages/some/module_%d.so", i)
		if i == 0 {
			digest, name = [32]byte(sum.Sum(nil)), "boot_aggregate"
		}
		e := ima.Entry{PCR: 10, Template: "ima-ng"}
		for _, field := range [][]byte{append([]byte("sha256:\x00"), digest[:]...), []byte(name + "\x00")} {
			e.Data = append(binary.LittleEndian.AppendUint32(e.Data, uint32(len(field))), field...)
		}
		short, with := sha1.Sum(e.Data), sha256.Sum256(e.Data)
		e.TemplateDigest = short[:]
		list = e.Append(list)
		ten = sha256.Sum256(append(ten[:], with[:]...))
		for _, point := range at {
			if i+1 == point {
				now := map[int]evidence.Digest{10: ten}
				for pcr, d := range values {
					now[pcr] = d
				}
				offsets, pcrs = append(offsets, len(list)), append(pcrs, now)
			}
		}
	}
	return list, offsets, pcrs
}

const many = 100_000

// A whole list of 100,000 entries, and the memory that it takes beside itself.
func BenchmarkLongList(b *testing.B) {
	list, _, pcrs := measuredList(many, many)
	logs := Logs{IMA: list, IMAPresent: true}
	var before, after runtime.MemStats
	var k *Known
	b.SetBytes(int64(len(list)))
	runtime.GC()
	runtime.ReadMemStats(&before)
	for b.Loop() {
		var err error
		if k, err = appraiseLogs(logs, bootID, reset, pcrs[0], nil); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-min(before.HeapAlloc, after.HeapAlloc))/(1<<20), "MiB-kept")
	if k.files.len() != many-1 {
		b.Fatal(k.files.len())
	}
}

// 1,000 entries more on top of them.
func BenchmarkDelta(b *testing.B) {
	list, offsets, pcrs := measuredList(many+1000, many, many+1000)
	k, err := appraiseLogs(Logs{IMA: list[:offsets[0]], IMAPresent: true}, bootID, reset, pcrs[0], nil)
	if err != nil {
		b.Fatal(err)
	}
	news := Logs{IMA: list[offsets[0]:], IMAOffset: offsets[0], IMAPresent: true}
	for b.Loop() {
		if _, err := appraiseLogs(news, bootID, reset, pcrs[1], k); err != nil {
			b.Fatal(err)
		}
	}
}

// The floors: bare SHA-256 of the same bytes.
func BenchmarkLongListFloor(b *testing.B) {
	list, _, _ := measuredList(many, many)
	for b.Loop() {
		evidence.Sum(list)
	}
}

func BenchmarkDeltaFloor(b *testing.B) {
	list, offsets, _ := measuredList(many+1000, many)
	for b.Loop() {
		evidence.Sum(list[offsets[0]:])
	}
}
