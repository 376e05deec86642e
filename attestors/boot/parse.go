package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

var specID03 = []byte("Spec ID Event03\x00")

// errEnd is a field that reaches past the log's end.
var errEnd = errors.New("it reaches past the end of the log")

// Parse reads a log in the format that its first event tells: crypto-agile
// (TCG_PCR_EVENT2) behind a "Spec ID Event03" header, else SHA-1 only.
func Parse(b []byte) (*Log, error) {
	if len(b) > MaxLog {
		return nil, fmt.Errorf("the log has %d bytes: at most %d are read", len(b), MaxLog)
	}
	if len(b) == 0 {
		return nil, errors.New("the log is empty")
	}
	r := &reader{b: b}
	log := &Log{}
	first, err := r.sha1Event()
	if err != nil {
		return nil, fmt.Errorf("event 0 at byte 0: %w", err)
	}
	if first.Type == NoAction && bytes.HasPrefix(first.Data, specID03) {
		if log.SpecID, err = parseSpecID(first.Data); err != nil {
			return nil, fmt.Errorf("event 0, the log's header: %w", err)
		}
		log.SpecID.Register = first.PCR
		// Firmware of TDX VMs puts the header of a CC event log in register 1. It is
		// read so that Unsuited can name it; no TPM's log is like that.
		cc := first.PCR == 1 && slices.Equal(log.SpecID.Banks, []Bank{{sha384, 48}})
		if first.PCR != 0 && !cc || !zero(first.Digests[0].Value) {
			return nil, errors.New("event 0: a log's header stands in PCR 0 with a digest of zeros")
		}
	} else {
		log.Events = append(log.Events, first)
	}
	pad := padding(b)
	for n := 1; r.off < len(b); n++ {
		if r.off >= pad {
			log.Padding = b[r.off:]
			break
		}
		offset := r.off
		var e Event
		if log.SpecID != nil {
			e, err = r.agileEvent(log.SpecID.Banks)
		} else {
			e, err = r.sha1Event()
		}
		if err != nil {
			return nil, fmt.Errorf("event %d at byte %d: %w", n, offset, err)
		}
		e.Number, e.Offset = n, offset
		log.Events = append(log.Events, e)
	}
	return log, nil
}

// Encode writes the log as Parse read it.
func (l *Log) Encode() []byte {
	var b []byte
	if s := l.SpecID; s != nil {
		data := slices.Clone(specID03)
		data = binary.LittleEndian.AppendUint32(data, s.PlatformClass)
		data = append(data, s.Minor, s.Major, s.Errata, s.UintnSize)
		data = binary.LittleEndian.AppendUint32(data, uint32(len(s.Banks)))
		for _, bank := range s.Banks {
			data = binary.LittleEndian.AppendUint16(data, uint16(bank.Algorithm))
			data = binary.LittleEndian.AppendUint16(data, bank.Size)
		}
		data = append(data, byte(len(s.Vendor)))
		data = append(data, s.Vendor...)
		b = binary.LittleEndian.AppendUint32(b, s.Register)
		b = binary.LittleEndian.AppendUint32(b, uint32(NoAction))
		b = append(b, make([]byte, sizes[SHA1])...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
		b = append(b, data...)
	}
	for _, e := range l.Events {
		b = binary.LittleEndian.AppendUint32(b, e.PCR)
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
		if l.SpecID != nil {
			b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Digests)))
		}
		for _, d := range e.Digests {
			if l.SpecID != nil {
				b = binary.LittleEndian.AppendUint16(b, uint16(d.Algorithm))
			}
			b = append(b, d.Value...)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
	}
	return append(b, l.Padding...)
}

// maxBanks is more than any TPM has; it bounds the work for each event.
const maxBanks = 16

func parseSpecID(data []byte) (*SpecID, error) {
	r := &reader{b: data, off: len(specID03)}
	s := &SpecID{PlatformClass: r.u32(), Minor: r.u8(), Major: r.u8(), Errata: r.u8(), UintnSize: r.u8()}
	count := r.u32()
	if r.err == nil && (count == 0 || count > maxBanks) {
		return nil, fmt.Errorf("it announces %d algorithms: 1 to %d are possible", count, maxBanks)
	}
	for i := uint32(0); i < count && r.err == nil; i++ {
		bank := Bank{Algorithm: Algorithm(r.u16()), Size: r.u16()}
		known, ok := sizes[bank.Algorithm]
		switch {
		case r.err != nil:
		case ok && int(bank.Size) != known:
			return nil, fmt.Errorf("algorithm 0x%04x has digests of %d bytes, not %d", uint16(bank.Algorithm), known, bank.Size)
		case bank.Size == 0 || bank.Size > maxDigest:
			return nil, fmt.Errorf("algorithm 0x%04x is announced with digests of %d bytes", uint16(bank.Algorithm), bank.Size)
		case slices.ContainsFunc(s.Banks, func(b Bank) bool { return b.Algorithm == bank.Algorithm }):
			return nil, fmt.Errorf("algorithm 0x%04x is announced twice", uint16(bank.Algorithm))
		}
		s.Banks = append(s.Banks, bank)
	}
	s.Vendor = r.take(uint32(r.u8()))
	if r.err != nil {
		return nil, r.err
	}
	if r.off != len(data) {
		return nil, fmt.Errorf("%d bytes follow its end", len(data)-r.off)
	}
	return s, nil
}

// A reader takes little-endian fields off a slice. Its first error stays, and
// what is read after it is zero.
type reader struct {
	b   []byte
	off int
	err error
}

func (r *reader) take(n uint32) []byte {
	if r.err == nil && uint64(n) > uint64(len(r.b)-r.off) {
		r.err = errEnd
	}
	if r.err != nil {
		return nil
	}
	field := r.b[r.off : r.off+int(n) : r.off+int(n)]
	r.off += int(n)
	return field
}

func (r *reader) u8() byte {
	if f := r.take(1); f != nil {
		return f[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if f := r.take(2); f != nil {
		return binary.LittleEndian.Uint16(f)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if f := r.take(4); f != nil {
		return binary.LittleEndian.Uint32(f)
	}
	return 0
}

func (r *reader) sha1Event() (Event, error) {
	e := Event{PCR: r.u32(), Type: EventType(r.u32())}
	e.Digests = []Digest{{SHA1, r.take(uint32(sizes[SHA1]))}}
	e.Data = r.take(r.u32())
	return e, r.check(&e)
}

func (r *reader) agileEvent(banks []Bank) (Event, error) {
	e := Event{PCR: r.u32(), Type: EventType(r.u32())}
	count := r.u32()
	if r.err == nil && (count == 0 || count > uint32(len(banks))) {
		return e, fmt.Errorf("it has %d digests where the header announces %d algorithms", count, len(banks))
	}
	if r.err == nil {
		e.Digests = make([]Digest, 0, count)
	}
	for range count {
		if r.err != nil {
			break
		}
		alg := Algorithm(r.u16())
		i := slices.IndexFunc(banks, func(b Bank) bool { return b.Algorithm == alg })
		if r.err == nil && i < 0 {
			return e, fmt.Errorf("it has a digest of algorithm 0x%04x, which the header doesn't announce", uint16(alg))
		}
		if r.err == nil && e.Digest(alg) != nil {
			return e, fmt.Errorf("it has two digests of algorithm 0x%04x", uint16(alg))
		}
		if r.err == nil {
			e.Digests = append(e.Digests, Digest{alg, r.take(uint32(banks[i].Size))})
		}
	}
	e.Data = r.take(r.u32())
	return e, r.check(&e)
}

// check holds an event's PCR against what a TPM has.
func (r *reader) check(e *Event) error {
	if r.err != nil {
		return r.err
	}
	if e.PCR >= PCRCount && (e.PCR != NoPCR || e.Type != NoAction) {
		return fmt.Errorf("its PCR is 0x%x: a TPM has %d", e.PCR, PCRCount)
	}
	return nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// padding is from where on a log holds nothing but what firmware fills a table
// with. An event of a crypto-agile log doesn't look like it: it has at least one
// digest, and PCR 0xFFFFFFFF only with type EV_NO_ACTION. It is found once: a log
// may be made of events that each begin as padding does.
func padding(b []byte) int {
	return min(len(bytes.TrimRight(b, "\x00")), len(bytes.TrimRight(b, "\xff")))
}
