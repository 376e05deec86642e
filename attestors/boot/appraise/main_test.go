package appraise

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
	tpm "github.com/countersign/countersign/attestors/tpm/appraise"
)

const fixtures = "../../../test/vectors/boots"

func read(t testing.TB, fixture, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(fixtures, fixture, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// recorded is a boot's log with the SHA-256 PCRs 0 to 15, which are what hosts
// quote.
func recorded(t testing.TB, fixture string) (log []byte, pcrs map[int]evidence.Digest) {
	t.Helper()
	pcrs, err := tpm.ParsePCRRead(string(read(t, fixture, "pcrs.txt")))
	maps.DeleteFunc(pcrs, func(pcr int, _ evidence.Digest) bool { return pcr > 15 })
	if err != nil || len(pcrs) != 16 {
		t.Fatalf("%s: %d SHA-256 PCRs: %v", fixture, len(pcrs), err)
	}
	return read(t, fixture, "binary_bios_measurements"), pcrs
}

// accepted appraises a twin that must hold before a test changes it.
func accepted(t testing.TB, log []byte, pcrs map[int]evidence.Digest) Facts {
	t.Helper()
	facts, err := Appraise(log, nil, pcrs)
	if err != nil {
		t.Fatalf("the unchanged log was refused: %v", err)
	}
	return facts
}

func rejected(t testing.TB, err error, check evidence.Check, detail string) {
	t.Helper()
	var r *evidence.Rejected
	if !errors.As(err, &r) {
		t.Fatalf("got %v, want a rejection by %s", err, check)
	}
	if r.Check != check || !strings.Contains(r.Detail, detail) {
		t.Fatalf("got %v\nwant %s with %q", err, check, detail)
	}
}

// recompute is what the PCRs would be if the log were true, as for a machine that
// really booted so, with what the log doesn't speak of left as it is in base.
func recompute(log *boot.Log, base map[int]evidence.Digest) map[int]evidence.Digest {
	pcrs := map[int]evidence.Digest{}
	for _, e := range log.Events {
		if e.Type == boot.NoAction {
			if rest, ok := bytes.CutPrefix(e.Data, startupLocality); ok && len(rest) == 1 {
				var first evidence.Digest
				first[31] = rest[0]
				pcrs[0] = first
			}
			continue
		}
		if d := e.Digest(boot.SHA256); d != nil {
			pcrs[int(e.PCR)] = extend(pcrs[int(e.PCR)], evidence.Digest(d))
		}
	}
	out := maps.Clone(base)
	if out == nil {
		out = map[int]evidence.Digest{}
	}
	maps.Copy(out, pcrs)
	return out
}

func parse(t testing.TB, log []byte) *boot.Log {
	t.Helper()
	parsed, err := boot.Parse(log)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// event makes one with digests for SHA-1 (zeros) and SHA-256.
func event(pcr uint32, kind boot.EventType, measured, data []byte) boot.Event {
	d := evidence.Sum(measured)
	return boot.Event{PCR: pcr, Type: kind, Data: data, Digests: []boot.Digest{
		{Algorithm: boot.SHA1, Value: make([]byte, 20)}, {Algorithm: boot.SHA256, Value: d[:]},
	}}
}

func grubCommand(text, prefix string) boot.Event {
	return event(8, boot.IPL, []byte(text), []byte(prefix+text+"\x00"))
}

func utf16Bytes(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
