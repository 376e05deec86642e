package appraise

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
)

// No input makes it panic; what is read is written again as it stood; an error
// is a rejection; and what is proven never exceeds what was sent.
func FuzzAppraise(f *testing.F) {
	files, _ := filepath.Glob(filepath.Join(boots, "*", "ima_binary_runtime_measurements"))
	if len(files) == 0 {
		f.Fatal("no boots in test/vectors")
	}
	for _, file := range files {
		list, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(list)
	}
	for _, size := range []int{20, 32, 48, 64} {
		h := newHost(f, 9, size, false)
		for _, m := range templates(size) {
			h.add(f, m)
		}
		f.Add(h.list)
	}
	_, pcrs := boot(f, "clean")
	f.Fuzz(func(t *testing.T, list []byte) {
		var again []byte
		r := ima.NewReader(list, 0)
		for r.More() {
			e, _, err := r.Next()
			if err != nil {
				break
			}
			again = e.Append(again)
		}
		if !bytes.Equal(again, list[:r.Offset()]) {
			t.Error("written again, it is another list")
		}
		result, err := Appraise(State{}, list, pcrs)
		if err != nil {
			if evidence.CheckOf(err) == "" {
				t.Errorf("no rejection: %v", err)
			}
			return
		}
		if result.State.Offset > len(list) {
			t.Errorf("proven %d of %d bytes", result.State.Offset, len(list))
		}
		for range result.Measurements() {
		}
	})
}

// The ASCII form's entries read as binary ones.
func FuzzFromASCII(f *testing.F) {
	files, _ := filepath.Glob(filepath.Join(boots, "*", "ima_ascii_runtime_measurements"))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("10 " + "0000000000000000000000000000000000000000 ima 0101010101010101010101010101010101010101 /bin/x\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := ima.FromASCII(text)
		if err != nil {
			return
		}
		for r := ima.NewReader(list, 0); r.More(); {
			if _, _, err := r.Next(); err != nil {
				return
			}
		}
	})
}

// long is a list of n entries and what it leads to.
func long(b testing.TB, n int) ([]byte, map[int]evidence.Digest) {
	h := newHost(b, 9, 20, false)
	for i := range n - 1 {
		h.add(b, measure{pcr: 10, template: "ima-sig", fields: [][]byte{digestNG("sha256", byte(i)), nameNG(fmt.Sprintf("/usr/lib/python3/dist-packages/some/module_%d.so", i)), nil}})
	}
	return h.list, h.pcrs
}

func BenchmarkAppraise(b *testing.B) {
	list, pcrs := long(b, 1000)
	b.SetBytes(int64(len(list)))
	b.ReportAllocs()
	for b.Loop() {
		r, err := Appraise(State{}, list, pcrs)
		if err != nil {
			b.Fatal(err)
		}
		for range r.Measurements() {
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/entry")
}

// The floor: bare SHA-256 of the same bytes.
func BenchmarkFloor(b *testing.B) {
	list, _ := long(b, 1000)
	b.SetBytes(int64(len(list)))
	for b.Loop() {
		evidence.Sum(list)
	}
}
