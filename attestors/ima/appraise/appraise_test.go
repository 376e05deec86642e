package appraise

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	tpm "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/test/check"
)

const boots = "../../../test/vectors/boots"

// boot is a measured boot's list and the PCRs of its quote.
func boot(t testing.TB, name string) ([]byte, map[int]evidence.Digest) {
	t.Helper()
	list, err := os.ReadFile(filepath.Join(boots, name, "ima_binary_runtime_measurements"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(boots, name, "pcrs.txt"))
	if err != nil {
		t.Fatal(err)
	}
	pcrs, err := tpm.ParsePCRRead(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return list, pcrs
}

func wantCheck(t *testing.T, err error, check evidence.Check, says string) {
	t.Helper()
	if evidence.CheckOf(err) != check || !strings.Contains(fmt.Sprint(err), says) {
		t.Errorf("got %v, want %s that says %q", err, check, says)
	}
}

func TestRealBoots(t *testing.T) {
	for name, entries := range map[string]int{"clean": 43, "tampered": 44, "cmdline": 43, "direct-kernel": 43} {
		t.Run(name, func(t *testing.T) {
			list, pcrs := boot(t, name)
			r := check.Must(Appraise(State{}, list, pcrs))(t)
			if s := r.State; s.Entries != entries || s.Offset != len(list) || s.Bank != Native || s.Aggregate != "0-9" || s.Violations != 0 || r.Tail != 0 {
				t.Errorf("%+v with a tail of %d", s, r.Tail)
			}
			all := slices.Collect(r.Measurements())
			if len(all) != entries || !all[0].IsAggregate() || all[1].Name != "/sbin/init" ||
				all[1].Digest != "sha256:9f1f070bc5b03eaefa8ae5feaa09a7b27bc26306a76d11b6037f038de9562027" {
				t.Errorf("%d measurements, %+v", len(all), all[:2])
			}
			// The ASCII form is the same list.
			text := check.Must(os.ReadFile(filepath.Join(boots, name, "ima_ascii_runtime_measurements")))(t)
			if b := check.Must(ima.FromASCII(text))(t); !bytes.Equal(b, list) {
				t.Error("the ASCII list reads differently")
			}
			if !ima.IsASCII(text) || ima.IsASCII(list) {
				t.Error("the forms are taken for each other")
			}
		})
	}
	list, _ := boot(t, "clean")
	_, other := boot(t, "cmdline")
	_, err := Appraise(State{}, list, other)
	wantCheck(t, err, CheckAggregate, "of another boot")
	list, _ = boot(t, "tampered")
	_, clean := boot(t, "clean")
	_, err = Appraise(State{}, list, clean)
	wantCheck(t, err, CheckReplay, "no prefix of the 44 entries")
}

// facts is all that an appraisal lets its callers see.
func facts(r Result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %d %d %s %s\n", r.State.Offset, r.State.Entries, r.State.Violations, r.State.Bank, r.State.Aggregate)
	for m := range r.Measurements() {
		if m.Violation {
			m.Name, m.Digest, m.Signature = "", "", nil
		}
		fmt.Fprintf(&b, "%+v\n", m)
	}
	return b.String()
}

// Every flipped bit of a list, or of a value that it leads to, is refused. A
// bit of the unproven tail changes nothing.
func TestEveryBit(t *testing.T) {
	list, pcrs := boot(t, "clean")
	tail := measure{pcr: 10, template: "ima-ng", fields: [][]byte{digestNG("sha256", 7), nameNG("/tail")}}.entry(t)
	want := facts(check.Must(Appraise(State{}, list, pcrs))(t))
	long := tail.Append(slices.Clone(list))
	for i := range long {
		for bit := range 8 {
			long[i] ^= 1 << bit
			r, err := Appraise(State{}, long, pcrs)
			if i < len(list) && err == nil {
				t.Errorf("bit %d of byte %d flipped: accepted", bit, i)
			}
			if err == nil && facts(r) != want {
				t.Errorf("bit %d of byte %d of the tail changes a fact", bit, i)
			}
			if err != nil && evidence.CheckOf(err) == "" {
				t.Errorf("bit %d of byte %d: %v is no rejection", bit, i, err)
			}
			long[i] ^= 1 << bit
		}
	}
	for pcr := range 11 {
		for bit := range 256 {
			flipped := maps.Clone(pcrs)
			d := flipped[pcr]
			d[bit/8] ^= 1 << (bit % 8)
			flipped[pcr] = d
			if _, err := Appraise(State{}, list, flipped); err == nil {
				t.Errorf("bit %d of PCR %d flipped: accepted", bit, pcr)
			}
		}
	}
}

func TestEveryTruncation(t *testing.T) {
	list, pcrs := boot(t, "clean")
	for n := range list {
		if _, err := Appraise(State{}, list[:n], pcrs); evidence.CheckOf(err) == "" {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
}

// A measure builds one entry as a kernel would.
type measure struct {
	pcr       int
	template  string
	fields    [][]byte
	size      int // of template digests; 0: 20
	violation bool
}

func digestNG(algorithm string, fill byte) []byte {
	n := map[string]int{"md5": 16, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}[algorithm]
	return append([]byte(algorithm+":\x00"), bytes.Repeat([]byte{fill}, n)...)
}

func nameNG(name string) []byte { return []byte(name + "\x00") }

func (m measure) entry(t testing.TB) ima.Entry {
	t.Helper()
	e := ima.Entry{PCR: m.pcr, Template: m.template}
	if m.template == "ima" {
		e.Data = append(slices.Clone(m.fields[0]), binary.LittleEndian.AppendUint32(nil, uint32(len(m.fields[1])))...)
		e.Data = append(e.Data, m.fields[1]...)
	} else {
		for _, f := range m.fields {
			e.Data = append(binary.LittleEndian.AppendUint32(e.Data, uint32(len(f))), f...)
		}
	}
	switch size := max(m.size, 20); {
	case m.violation:
		e.TemplateDigest = make([]byte, size)
	case size == 20:
		sum := sha1.Sum(e.Hashed())
		e.TemplateDigest = sum[:]
	case size == 32:
		sum := sha256.Sum256(e.Hashed())
		e.TemplateDigest = sum[:]
	default:
		e.TemplateDigest = bytes.Repeat([]byte{0x5a}, size)
	}
	return e
}

// A host is a machine whose kernel extends as the tests say.
type host struct {
	pcrs   map[int]evidence.Digest
	list   []byte
	padded bool
}

func newHost(t testing.TB, aggregate int, size int, padded bool) *host {
	t.Helper()
	h := &host{pcrs: map[int]evidence.Digest{}, padded: padded}
	sum := sha256.New()
	for pcr := range 16 {
		if pcr < 10 {
			h.pcrs[pcr] = evidence.Sum([]byte{byte(pcr)})
		} else {
			h.pcrs[pcr] = evidence.Digest{}
		}
		if pcr <= aggregate {
			d := h.pcrs[pcr]
			sum.Write(d[:])
		}
	}
	h.add(t, measure{pcr: 10, template: "ima-ng", size: size, fields: [][]byte{append([]byte("sha256:\x00"), sum.Sum(nil)...), nameNG("boot_aggregate")}})
	return h
}

func (h *host) add(t testing.TB, m measure) {
	t.Helper()
	e := m.entry(t)
	h.list = e.Append(h.list)
	var with [32]byte
	short := sha1.Sum(e.Hashed())
	switch {
	case m.violation && h.padded:
		copy(with[:], bytes.Repeat([]byte{0xff}, 20))
	case m.violation:
		copy(with[:], bytes.Repeat([]byte{0xff}, 32))
	case h.padded:
		copy(with[:], short[:])
	default:
		with = sha256.Sum256(e.Hashed())
	}
	was := h.pcrs[m.pcr]
	h.pcrs[m.pcr] = sha256.Sum256(append(was[:], with[:]...))
}

// templates are one entry of each that kernels write.
func templates(size int) []measure {
	ng, name, sig := digestNG("sha256", 1), nameNG("/usr/bin/true"), []byte{3, 2, 4, 0, 0, 0, 0, 0, 1, 9}
	word := func(n int) []byte { return bytes.Repeat([]byte{1}, n) }
	return []measure{
		{pcr: 10, size: size, template: "ima", fields: [][]byte{bytes.Repeat([]byte{7}, 20), []byte("/bin/old")}},
		{pcr: 10, size: size, template: "ima-ng", fields: [][]byte{ng, name}},
		{pcr: 10, size: size, template: "ima-ng", fields: [][]byte{digestNG("sha1", 2), name}},
		{pcr: 10, size: size, template: "ima-ng", fields: [][]byte{digestNG("sha384", 2), name}},
		{pcr: 10, size: size, template: "ima-ng", fields: [][]byte{digestNG("sha512", 2), name}},
		{pcr: 10, size: size, template: "ima-sig", fields: [][]byte{ng, name, sig}},
		{pcr: 10, size: size, template: "ima-sig", fields: [][]byte{ng, name, nil}},
		{pcr: 10, size: size, template: "ima-buf", fields: [][]byte{ng, nameNG(".ima"), word(300)}},
		{pcr: 10, size: size, template: "ima-modsig", fields: [][]byte{ng, name, nil, digestNG("sha512", 4), word(500)}},
		{pcr: 10, size: size, template: "ima-ngv2", fields: [][]byte{append([]byte("verity:"), ng...), name}},
		{pcr: 10, size: size, template: "ima-sigv2", fields: [][]byte{append([]byte("ima:"), ng...), name, sig}},
		{pcr: 10, size: size, template: "evm-sig", fields: [][]byte{ng, name, sig, nameNG("security.ima"), word(4), word(12), word(4), word(4), word(2)}},
		{pcr: 10, size: size, template: "d-ng|n-ng|iuid|igid|imode", fields: [][]byte{ng, name, word(4), word(4), word(2)}},
		{pcr: 10, size: size, template: "d|n", fields: [][]byte{bytes.Repeat([]byte{7}, 20), []byte("/custom")}},
		{pcr: 11, size: size, template: "ima-ng", fields: [][]byte{ng, nameNG("/another/pcr")}},
		{pcr: 10, size: size, template: "ima-ng", violation: true, fields: [][]byte{append([]byte("sha256:\x00"), make([]byte, 20)...), nameNG("/var/log/open")}},
		{pcr: 10, size: size, template: "ima-ng", fields: [][]byte{ng, nameNG("/last")}},
	}
}

func TestTemplates(t *testing.T) {
	for _, size := range []int{20, 32, 48, 64} {
		for _, padded := range []bool{false, true} {
			for _, aggregate := range []int{7, 9} {
				t.Run(fmt.Sprintf("%d bytes, padded=%v, PCR 0-%d", size, padded, aggregate), func(t *testing.T) {
					h := newHost(t, aggregate, size, padded)
					for _, m := range templates(size) {
						h.add(t, m)
					}
					r := check.Must(Appraise(State{}, h.list, h.pcrs))(t)
					want := State{Offset: len(h.list), Entries: 18, Violations: 1, Bank: Native, Aggregate: fmt.Sprintf("0-%d", aggregate)}
					if padded {
						want.Bank = Padded
					}
					got := r.State
					got.values, got.digestSize = nil, 0
					if !reflect.DeepEqual(got, want) {
						t.Errorf("%+v, want %+v", got, want)
					}
					all := slices.Collect(r.Measurements())
					if m := all[1]; m.Name != "/bin/old" || m.Digest != "sha1:"+strings.Repeat("07", 20) {
						t.Errorf("template ima: %+v", m)
					}
					if m := all[6]; !bytes.Equal(m.Signature, []byte{3, 2, 4, 0, 0, 0, 0, 0, 1, 9}) {
						t.Errorf("template ima-sig: %+v", m)
					}
					if m := all[10]; m.Digest != "verity:sha256:"+strings.Repeat("01", 32) {
						t.Errorf("template ima-ngv2: %+v", m)
					}
					if m := all[16]; !m.Violation {
						t.Errorf("the violation: %+v", m)
					}
					// It stands, byte for byte.
					var again []byte
					for reader := ima.NewReader(h.list, 0); reader.More(); {
						e, _, err := reader.Next()
						check.Nil(t, err)
						again = e.Append(again)
					}
					if !bytes.Equal(again, h.list) {
						t.Error("written again, it is another list")
					}
				})
			}
		}
	}
}

// What comes later continues where the last request ended.
func TestResumes(t *testing.T) {
	for _, padded := range []bool{false, true} {
		h := newHost(t, 9, 20, padded)
		state := check.Must(Appraise(State{}, h.list, h.pcrs))(t).State
		sent := len(h.list)
		for i, m := range templates(20) {
			h.add(t, m)
			r := check.Must(Appraise(state, h.list[sent:], h.pcrs))(t)
			if all := slices.Collect(r.Measurements()); len(all) != 1 || all[0].Index != i+1 {
				t.Fatalf("entry %d: %+v", i+1, all)
			}
			whole := check.Must(Appraise(State{}, h.list, h.pcrs))(t)
			if !reflect.DeepEqual(whole.State, r.State) && i > 0 {
				t.Fatalf("entry %d: resumed %+v, at once %+v", i+1, r.State, whole.State)
			}
			state, sent = r.State, len(h.list)
			// Nothing new is fine, too.
			if again := check.Must(Appraise(state, nil, h.pcrs))(t); !reflect.DeepEqual(again.State, state) {
				t.Fatalf("nothing new: %+v", again.State)
			}
		}
		// From a state that isn't this host's, nothing is proven.
		other := newHost(t, 7, 20, padded)
		wrong := check.Must(Appraise(State{}, other.list, other.pcrs))(t).State
		before := len(h.list)
		h.add(t, templates(20)[1])
		_, err := Appraise(wrong, h.list[before:], h.pcrs)
		wantCheck(t, err, CheckReplay, "no prefix")
	}
}

// The list is read after the quote: what came in between is told as a tail.
func TestTail(t *testing.T) {
	h := newHost(t, 9, 20, false)
	h.add(t, templates(20)[1])
	quoted := maps.Clone(h.pcrs)
	proven := len(h.list)
	h.add(t, templates(20)[2])
	h.add(t, templates(20)[3])
	r := check.Must(Appraise(State{}, h.list, quoted))(t)
	if r.Tail != 2 || r.State.Entries != 2 || r.State.Offset != proven || len(slices.Collect(r.Measurements())) != 2 {
		t.Errorf("%+v with a tail of %d", r.State, r.Tail)
	}
	r = check.Must(Appraise(r.State, h.list[proven:], h.pcrs))(t)
	if r.Tail != 0 || r.State.Entries != 4 {
		t.Errorf("the next: %+v with a tail of %d", r.State, r.Tail)
	}
}

func TestForgedLists(t *testing.T) {
	h := newHost(t, 9, 20, false)
	for _, m := range templates(20) {
		h.add(t, m)
	}
	check.Must(Appraise(State{}, h.list, h.pcrs))(t) // the honest twin
	entries := func() (all []ima.Entry) {
		for r := ima.NewReader(slices.Clone(h.list), 0); r.More(); {
			e, _, err := r.Next()
			check.Nil(t, err)
			all = append(all, e)
		}
		return all
	}
	write := func(all []ima.Entry) (b []byte) {
		for _, e := range all {
			b = e.Append(b)
		}
		return b
	}
	for name, tt := range map[string]struct {
		forge func([]ima.Entry) []ima.Entry
		check evidence.Check
		says  string
	}{
		"an entry left out":    {func(a []ima.Entry) []ima.Entry { return slices.Delete(a, 3, 4) }, CheckReplay, "no prefix"},
		"an entry put in":      {func(a []ima.Entry) []ima.Entry { return slices.Insert(a, 3, a[2]) }, CheckReplay, "no prefix"},
		"two entries swapped":  {func(a []ima.Entry) []ima.Entry { a[2], a[3] = a[3], a[2]; return a }, CheckReplay, "no prefix"},
		"another digest":       {func(a []ima.Entry) []ima.Entry { a[2].Data[15] ^= 1; return a }, CheckReplay, "is not that of its data"},
		"a violation hidden":   {func(a []ima.Entry) []ima.Entry { a[16] = templates(20)[1].entry(t); return a }, CheckReplay, "no prefix"},
		"a violation invented": {func(a []ima.Entry) []ima.Entry { clear(a[2].TemplateDigest); return a }, CheckReplay, "no prefix"},
		"no boot aggregate":    {func(a []ima.Entry) []ima.Entry { return a[1:] }, CheckAggregate, "not with boot_aggregate"},
		"the end left out":     {func(a []ima.Entry) []ima.Entry { return a[:len(a)-1] }, CheckReplay, "no prefix"},
		"nothing at all":       {func([]ima.Entry) []ima.Entry { return nil }, CheckReplay, "the list is empty"},
		"another PCR":          {func(a []ima.Entry) []ima.Entry { a[2].PCR = 12; return a }, CheckReplay, "no prefix"},
		"all in another PCR, which root extended": {func(a []ima.Entry) []ima.Entry {
			forged := evidence.Digest{}
			for i := range a[:3] {
				a[i].PCR = 15
				d := evidence.Sum(a[i].Data)
				forged = evidence.Sum(append(forged[:], d[:]...))
			}
			h.pcrs[15] = forged
			return a[:3]
		}, CheckReplay, "PCR 10, quoted "},
		"a PCR that isn't quoted": {func(a []ima.Entry) []ima.Entry { a[2].PCR = 20; return a }, CheckReplay, "PCR 20 isn't quoted"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Appraise(State{}, write(tt.forge(entries())), h.pcrs)
			wantCheck(t, err, tt.check, tt.says)
		})
	}
	// No value isn't zeros, which an empty list would lead to.
	t.Run("IMA's PCR isn't quoted", func(t *testing.T) {
		without := maps.Clone(h.pcrs)
		delete(without, ima.DefaultPCR)
		for _, list := range [][]byte{h.list, nil} {
			_, err := Appraise(State{}, list, without)
			wantCheck(t, err, CheckReplay, "PCR 10 isn't quoted")
		}
	})
	// A kernel that is built to use another PCR leaves 10 alone.
	t.Run("another PCR, honestly", func(t *testing.T) {
		moved := newHost(t, 9, 20, false)
		moved.pcrs[10] = evidence.Digest{}
		e, _, err := ima.NewReader(moved.list, 0).Next()
		check.Nil(t, err)
		moved.list = nil
		moved.add(t, measure{pcr: 12, template: "ima-ng", fields: [][]byte{append([]byte("sha256:\x00"), e.Data[4+8:4+8+32]...), nameNG("boot_aggregate")}})
		r := check.Must(Appraise(State{}, moved.list, moved.pcrs))(t)
		if r.State.Entries != 1 || !slices.Equal(r.State.PCRs(), []int{12}) {
			t.Errorf("%+v", r.State)
		}
	})
	t.Run("another boot's aggregate", func(t *testing.T) {
		other := newHost(t, 9, 20, false)
		pcrs := maps.Clone(other.pcrs)
		pcrs[4] = evidence.Sum([]byte("another boot loader"))
		_, err := Appraise(State{}, other.list, pcrs)
		wantCheck(t, err, CheckAggregate, "of another boot")
	})
}

// Broken lists are refused with where and what.
func TestBrokenLists(t *testing.T) {
	good, name := digestNG("sha256", 1), nameNG("/bin/x")
	entry := func(template string, fields ...[]byte) []byte {
		return measure{pcr: 10, template: template, fields: fields}.entry(t).Append(nil)
	}
	long := func(at int, n uint32) []byte {
		b := entry("ima-ng", good, name)
		binary.LittleEndian.PutUint32(b[at:], n)
		return b
	}
	for what, tt := range map[string]struct {
		list []byte
		says string
	}{
		"huge template name":      {append(entry("ima-ng", good, name), long(24, 0xffffffff)...), "template's name of 4294967295 bytes"},
		"huge data":               {long(34, 0xffffffff), "a field of 4294967295 bytes"},
		"huge field":              {long(38, 0xffffffff), "a field of 4294967295 bytes"},
		"PCR 24":                  {long(0, 24), "PCR 24"},
		"unknown template":        {append(entry("ima-ng", good, name), entry("ima-xx", good, name)...), "unknown field"},
		"name first":              {append(entry("ima-ng", good, name), entry("n-ng|d-ng", name, good)...), "doesn't begin with"},
		"two names":               {append(entry("ima-ng", good, name), entry("d-ng|n-ng|n-ng", good, name, name)...), "doesn't begin with"},
		"bytes behind":            {entry("ima-ng", good, name, name), "behind the last field"},
		"name without NUL":        {entry("ima-ng", good, []byte("/bin/x")), "without its NUL"},
		"NUL in a name":           {entry("ima-ng", good, nameNG("/bin/x\x00y")), "a NUL within"},
		"no algorithm":            {entry("ima-ng", bytes.Repeat([]byte{1}, 20), name), "no algorithm"},
		"unknown algorithm":       {entry("ima-ng", append([]byte("crc32:\x00"), 1, 2, 3, 4), name), "unknown digest algorithm"},
		"short digest":            {entry("ima-ng", good[:20], name), "of sha256, which has 32"},
		"long name":               {entry("ima-ng", good, nameNG(strings.Repeat("x", 5000))), "5001 bytes"},
		"no list":                 {[]byte("hello, this is no list of anything at all, of course"), "no template's name"},
		"a cut one":               {entry("ima-ng", good, name)[:50], "cut short"},
		"two sizes of digests":    {append(entry("ima-ng", good, name), measure{pcr: 10, size: 32, template: "ima-ng", fields: [][]byte{good, name}}.entry(t).Append(nil)...), "template's name"},
		"a type in an old digest": {entry("ima-ngv2", good, name), "unknown type"},
	} {
		t.Run(what, func(t *testing.T) {
			pcrs := map[int]evidence.Digest{}
			// What is wrong with an entry is told before what it leads to.
			r := ima.NewReader(tt.list, 0)
			var err error
			for err == nil && r.More() {
				_, _, err = r.Next()
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "IMA entry") {
				t.Errorf("got %v, want %q", err, tt.says)
			}
			if _, err := Appraise(State{}, tt.list, pcrs); evidence.CheckOf(err) == "" {
				t.Errorf("accepted: %v", err)
			}
		})
	}
}

// A list without an end is refused at a stated length.
func TestEndlessList(t *testing.T) {
	_, err := Appraise(State{}, make([]byte, ima.MaxList+1), nil)
	wantCheck(t, err, CheckList, "more than 67108864 bytes in one boot")
	_, err = Appraise(State{Offset: ima.MaxList}, []byte{0}, nil)
	wantCheck(t, err, CheckList, "more than 67108864 bytes in one boot")
	h := newHost(t, 9, 20, false)
	state := check.Must(Appraise(State{}, h.list, h.pcrs))(t).State
	state.Entries = ima.MaxEntries
	n := len(h.list)
	h.add(t, templates(20)[1])
	_, err = Appraise(state, h.list[n:], h.pcrs)
	wantCheck(t, err, CheckList, "more than 1048576 entries")
}
