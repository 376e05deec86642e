package boot

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const fixtures = "../../test/vectors/boots"

func recorded(t testing.TB, fixture string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(fixtures, fixture, "binary_bios_measurements"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRecordedLogs(t *testing.T) {
	for fixture, events := range map[string]int{"clean": 44, "cmdline": 44, "tampered": 44, "direct-kernel": 23} {
		b := recorded(t, fixture)
		log, err := Parse(b)
		if err != nil {
			t.Fatalf("%s: %v", fixture, err)
		}
		if len(log.Events) != events || len(log.Padding) != 0 {
			t.Errorf("%s: %d events, %d bytes of padding", fixture, len(log.Events), len(log.Padding))
		}
		if !slices.Equal(log.SpecID.Banks, []Bank{{SHA1, 20}, {SHA256, 32}}) {
			t.Errorf("%s: banks %v", fixture, log.SpecID.Banks)
		}
		for i, e := range log.Events {
			if e.Number != i+1 || binary.LittleEndian.Uint32(b[e.Offset:]) != e.PCR || len(e.Digest(SHA256)) != 32 || e.Digest(0x0C) != nil {
				t.Errorf("%s: %v at %d", fixture, &e, e.Offset)
			}
		}
		if !bytes.Equal(log.Encode(), b) {
			t.Errorf("%s: written otherwise than read", fixture)
		}
	}
	log, err := Parse(recorded(t, "clean"))
	if err != nil {
		t.Fatal(err)
	}
	if s := log.Events[23].String(); s != "event 24 (PCR 4, EV_EFI_BOOT_SERVICES_APPLICATION)" {
		t.Error(s)
	}
	if s := EventType(0x8401).String(); s != "type 0x00008401" {
		t.Error(s)
	}
}

// sha1Log is the clean boot's log as firmware writes it that knows SHA-1 alone.
func sha1Log(t testing.TB) []byte {
	t.Helper()
	log, err := Parse(recorded(t, "clean"))
	if err != nil {
		t.Fatal(err)
	}
	log.SpecID = nil
	for i := range log.Events {
		log.Events[i].Digests = log.Events[i].Digests[:1]
	}
	return log.Encode()
}

func TestSHA1Log(t *testing.T) {
	b := sha1Log(t)
	log, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if log.SpecID != nil || len(log.Events) != 44 || log.Events[0].Number != 0 || len(log.Events[43].Digest(SHA1)) != 20 || log.Events[43].Digest(SHA256) != nil {
		t.Errorf("%d events", len(log.Events))
	}
	if !bytes.Equal(log.Encode(), b) {
		t.Error("written otherwise than read")
	}
}

// Each case changes the clean boot's log in one place.
func TestStrict(t *testing.T) {
	le := binary.LittleEndian
	// The header's data begin at byte 32; the first event's digests at 69+12.
	const header, first = 32, 69
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		want   string
	}{
		{"empty", func([]byte) []byte { return nil }, "the log is empty"},
		{"too long", func(b []byte) []byte { return append(b, make([]byte, MaxLog)...) }, "at most 1048576 are read"},
		{"a header in PCR 1", func(b []byte) []byte { b[0] = 1; return b }, "a log's header stands in PCR 0"},
		{"a header with a digest", func(b []byte) []byte { b[8] = 1; return b }, "with a digest of zeros"},
		{"no algorithms", func(b []byte) []byte { le.PutUint32(b[header+24:], 0); return b }, "it announces 0 algorithms"},
		{"too many algorithms", func(b []byte) []byte { le.PutUint32(b[header+24:], 1<<31); return b }, "it announces 2147483648 algorithms"},
		{"more algorithms than there are", func(b []byte) []byte { le.PutUint32(b[header+24:], 4); return b }, "event 0, the log's header: "},
		{"a wrong size", func(b []byte) []byte { le.PutUint16(b[header+34:], 20); return b }, "algorithm 0x000b has digests of 32 bytes, not 20"},
		{"an unknown algorithm of no size", func(b []byte) []byte {
			le.PutUint16(b[header+32:], 0x99)
			le.PutUint16(b[header+34:], 0)
			return b
		}, "algorithm 0x0099 is announced with digests of 0 bytes"},
		{"an algorithm twice", func(b []byte) []byte {
			le.PutUint16(b[header+32:], 4)
			le.PutUint16(b[header+34:], 20)
			return b
		}, "algorithm 0x0004 is announced twice"},
		{"vendor bytes that aren't there", func(b []byte) []byte { b[header+36] = 1; return b }, "it reaches past the end"},
		{"bytes behind the header", func(b []byte) []byte {
			le.PutUint32(b[28:], 38)
			return slices.Insert(b, first, 0)
		}, "1 bytes follow its end"},
		{"no digests", func(b []byte) []byte { le.PutUint32(b[first+8:], 0); return b }, "event 1 at byte 69: it has 0 digests"},
		{"too many digests", func(b []byte) []byte { le.PutUint32(b[first+8:], 3); return b }, "it has 3 digests where the header announces 2"},
		{"an algorithm that wasn't announced", func(b []byte) []byte { le.PutUint16(b[first+12:], 0x0C); return b }, "it has a digest of algorithm 0x000c"},
		{"PCR 24", func(b []byte) []byte { le.PutUint32(b[first:], 24); return b }, "its PCR is 0x18: a TPM has 24"},
		{"no PCR", func(b []byte) []byte { le.PutUint32(b[first:], NoPCR); return b }, "its PCR is 0xffffffff"},
		{"data that aren't there", func(b []byte) []byte { le.PutUint32(b[first+12+22+34:], 1<<31); return b }, "event 1 at byte 69: it reaches past the end"},
		{"cut", func(b []byte) []byte { return b[:len(b)-1] }, "event 44 at byte "},
		{"padding of two kinds", func(b []byte) []byte { return append(b, 0, 0xff) }, "event 45 at byte 14763: it reaches past the end"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := recorded(t, "clean")
			if _, err := Parse(b); err != nil {
				t.Fatal(err)
			}
			if _, err := Parse(c.change(b)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}

	twice := recorded(t, "clean")
	log, _ := Parse(twice)
	e := &log.Events[0]
	e.Digests = []Digest{e.Digests[0], e.Digests[0]}
	if _, err := Parse(log.Encode()); err == nil || !strings.Contains(err.Error(), "two digests of algorithm 0x0004") {
		t.Error(err)
	}
}

// What is left of a log that was cut between events is still a log, and its
// padding is kept.
func TestPaddingIsKept(t *testing.T) {
	for _, b := range [][]byte{recorded(t, "clean"), sha1Log(t)} {
		for _, pad := range [][]byte{{0}, bytes.Repeat([]byte{0xff}, 100), make([]byte, 4096)} {
			padded := slices.Concat(b, pad)
			log, err := Parse(padded)
			if err != nil || len(log.Events) != 44 || len(log.Padding) != len(pad) || !bytes.Equal(log.Encode(), padded) {
				t.Errorf("%d bytes of %x: %v", len(pad), pad[0], err)
			}
		}
	}
}

// A log may be made of events that each begin as padding does, before a long tail
// that looks like it too. Were each held against the whole of the rest, a megabyte
// would take ten seconds, and these rounds longer than a test may.
func TestEventsLikePadding(t *testing.T) {
	blank := make([]byte, 32) // PCR 0, type 0, SHA-1 of zeros, no data
	last := slices.Concat(blank[:28], []byte{4, 0, 0, 0, 0, 0, 0, 1})
	b := append(bytes.Repeat(blank, MaxLog/len(blank)-2), last...)
	for range 60 {
		log, err := Parse(b)
		if err != nil || len(log.Events) != MaxLog/len(blank)-1 || log.Padding != nil {
			t.Fatalf("%v", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, fixture := range []string{"clean", "cmdline", "direct-kernel"} {
		f.Add(recorded(f, fixture))
	}
	f.Add(sha1Log(f))
	f.Add(append(recorded(f, "direct-kernel"), 0xff, 0xff))
	f.Fuzz(func(t *testing.T, b []byte) {
		log, err := Parse(b)
		if err != nil {
			return
		}
		if !bytes.Equal(log.Encode(), b) {
			t.Fatalf("written otherwise than read: %x", b)
		}
		for i := range log.Events {
			_ = log.Events[i].String()
		}
	})
}

func FuzzParseUserspace(f *testing.F) {
	f.Add([]byte("\x1e" + `{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"` + hex.EncodeToString(make([]byte, 32)) +
		`"}],"content_type":"systemd","content":{"eventType":"phase","string":"enter-initrd"}}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, err := ParseUserspace(b)
		if err != nil {
			return
		}
		for _, r := range records {
			if len(r.SHA256) != 32 || r.PCR < 0 || r.PCR >= PCRCount {
				t.Fatalf("%+v", r)
			}
		}
	})
}
