// Package ima reads the list of files that Linux's integrity measurement
// architecture (IMA) measured since boot: the kernel's binary form, and its
// ASCII form by turning it into the binary one.
//
// A list comes from a host and is hostile: every length is held against what
// is there before it is used, nothing recurses, and nothing is allocated by a
// length that the list claims. What a list says is a claim until the appraise
// room has replayed it; even then the template's name stays the sender's word,
// since no digest covers it.
//
// Formats follow Documentation/security/IMA-templates.rst of the kernel and
// its ima_fs.c. Integers are little-endian, as on every host that has a TPM
// and that the agent is built for.
package ima

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

const (
	// MaxEntries and MaxList, in bytes, are how long a list may grow in one boot.
	// One request may carry all of it: whatever is forgotten is sent again whole.
	MaxEntries = 1 << 20
	MaxList    = 64 << 20
	// DefaultPCR is where IMA extends unless its policy says otherwise.
	DefaultPCR = 10

	maxTemplate = 255      // bytes of a template's name or format
	maxData     = 1 << 20  // bytes of one entry's data; certificates and signatures stand in it
	maxPCR      = 23       // of TPM 2.0
	maxName     = 4096 + 1 // PATH_MAX and its end
	oldName     = 255      // the longest name under template "ima"
)

// An Entry is one measurement, as it stands in a list; its slices share the
// list's memory.
type Entry struct {
	PCR            int
	TemplateDigest []byte // 20, 32, 48 or 64 bytes; all zero: a violation
	Template       string // a name, as "ima-ng", or a format, as "d-ng|n-ng"
	Data           []byte // the fields, without the length in front of them
}

// Violation says that the kernel could not measure the file reliably: somebody
// had it open for writing. Its fields prove nothing, not even its name.
func (e Entry) Violation() bool {
	for _, b := range e.TemplateDigest {
		if b != 0 {
			return false
		}
	}
	return true
}

// formats are the kernel's own templates.
var formats = map[string]string{
	"ima": "d|n", "ima-ng": "d-ng|n-ng", "ima-sig": "d-ng|n-ng|sig", "ima-ngv2": "d-ngv2|n-ng", "ima-sigv2": "d-ngv2|n-ng|sig",
	"ima-buf": "d-ng|n-ng|buf", "ima-modsig": "d-ng|n-ng|sig|d-modsig|modsig",
	"evm-sig": "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode",
}

// A field's kind says how its bytes are written in ASCII.
type kind int

const (
	oldDigest kind = iota // hex
	digest                // ALGORITHM:hex, or TYPE:ALGORITHM:hex
	text                  // as it is, with a NUL behind it in the binary form
	oldText               // the same without the NUL
	octets                // hex
	number16              // decimal
	number32
)

var kinds = map[string]kind{
	"d": oldDigest, "d-ng": digest, "d-ngv2": digest, "d-modsig": digest, "n": oldText, "n-ng": text, "xattrnames": text,
	"sig": octets, "modsig": octets, "buf": octets, "evmsig": octets, "xattrlengths": octets, "xattrvalues": octets,
	"imode": number16, "iuid": number32, "igid": number32,
}

// fields names the fields of a template.
func fields(template string) ([]string, error) {
	format, known := formats[template]
	if !known {
		format = template
	}
	if len(format) > maxTemplate {
		return nil, fmt.Errorf("a template's name has %d bytes; %d are looked at", len(format), maxTemplate)
	}
	names := strings.Split(format, "|")
	for _, name := range names {
		if _, ok := kinds[name]; !ok {
			return nil, fmt.Errorf("template %q: unknown field %q", template, name)
		}
	}
	// A template's name is covered by no digest. That the digest and the name
	// come first, and once, keeps another field from being shown as one of them.
	if len(names) < 2 || !strings.HasPrefix(names[0], "d") || names[0] == "d-modsig" || !isName(names[1]) ||
		slices.ContainsFunc(names[2:], func(n string) bool { return isName(n) || n == "d" || strings.HasPrefix(n, "d-ng") }) {
		return nil, fmt.Errorf("template %q doesn't begin with one digest and one name", template)
	}
	return names, nil
}

func isName(field string) bool { return field == "n" || field == "n-ng" }

// A Reader walks over the entries of a binary list.
type Reader struct {
	rest  []byte
	start int // length of the whole
	size  int // of template digests; 0: not known yet
	n     int // entries read
	cache map[string][]string
}

// NewReader reads list. size is the length of its template digests, which is
// one for a whole list; 0 finds it out by the first entry.
func NewReader(list []byte, size int) *Reader {
	return &Reader{rest: list, start: len(list), size: size, cache: map[string][]string{}}
}

// DigestSize is the length of template digests in bytes; 0 before the first entry.
func (r *Reader) DigestSize() int { return r.size }

// Offset is how many bytes were read.
func (r *Reader) Offset() int { return r.start - len(r.rest) }

// More says whether something is left to read.
func (r *Reader) More() bool { return len(r.rest) > 0 }

// Next reads one entry and what it says. Errors name the entry, counted from 0
// within what is read, and where it begins.
func (r *Reader) Next() (Entry, File, error) {
	e, f, rest, err := r.next()
	if err != nil {
		return Entry{}, File{}, fmt.Errorf("IMA entry %d at byte %d: %w", r.n, r.Offset(), err)
	}
	r.rest = rest
	r.n++
	return e, f, nil
}

var errCut = errors.New("the list is cut short")

func (r *Reader) next() (e Entry, f File, rest []byte, err error) {
	if r.size == 0 {
		if r.size, err = digestSize(r.rest); err != nil {
			return e, f, nil, err
		}
	}
	b := r.rest
	if len(b) < 8+r.size {
		return e, f, nil, errCut
	}
	pcr := binary.LittleEndian.Uint32(b)
	if pcr > maxPCR {
		return e, f, nil, fmt.Errorf("PCR %d", pcr)
	}
	e.PCR, e.TemplateDigest = int(pcr), b[4:4+r.size]
	nameLength := binary.LittleEndian.Uint32(b[4+r.size:])
	b = b[8+r.size:]
	if nameLength == 0 || nameLength > maxTemplate {
		return e, f, nil, fmt.Errorf("a template's name of %d bytes; 1 to %d are looked at", nameLength, maxTemplate)
	}
	if uint32(len(b)) < nameLength {
		return e, f, nil, errCut
	}
	names, known := r.cache[string(b[:nameLength])]
	e.Template = string(b[:nameLength])
	if !known {
		if names, err = fields(e.Template); err != nil {
			return e, f, nil, err
		}
		if len(r.cache) < 16 {
			r.cache[e.Template] = names
		}
	}
	b = b[nameLength:]
	if e.Template == "ima" {
		e.Data, b, err = oldData(b)
	} else {
		e.Data, b, err = prefixed(b, maxData)
	}
	if err != nil {
		return e, f, nil, err
	}
	if f, err = e.file(names); err != nil {
		return e, f, nil, err
	}
	return e, f, b, nil
}

// oldData is template "ima": 20 bytes of digest without a length, and a name.
func oldData(b []byte) (data, rest []byte, err error) {
	if len(b) < 24 {
		return nil, nil, errCut
	}
	n := binary.LittleEndian.Uint32(b[20:])
	if n > oldName {
		return nil, nil, fmt.Errorf("a name of %d bytes; template ima has %d", n, oldName)
	}
	if uint32(len(b)-24) < n {
		return nil, nil, errCut
	}
	return b[:24+n], b[24+n:], nil
}

// prefixed reads a length and as many bytes.
func prefixed(b []byte, most uint32) (data, rest []byte, err error) {
	if len(b) < 4 {
		return nil, nil, errCut
	}
	n := binary.LittleEndian.Uint32(b)
	if n > most {
		return nil, nil, fmt.Errorf("a field of %d bytes; %d are looked at", n, most)
	}
	if uint32(len(b)-4) < n {
		return nil, nil, errCut
	}
	return b[4 : 4+n], b[4+n:], nil
}

// digestSize finds the one length of template digests under which the first
// entry names a template.
func digestSize(b []byte) (int, error) {
	var unsupported error // the first entry's template has a name, and isn't known here
	for _, size := range []int{20, 32, 48, 64} {
		if len(b) < 8+size {
			break
		}
		n := binary.LittleEndian.Uint32(b[4+size:])
		if n == 0 || n > maxTemplate || uint32(len(b)-8-size) < n {
			continue
		}
		name := string(b[8+size : 8+size+int(n)])
		_, err := fields(name)
		if err == nil {
			return size, nil
		}
		if strings.HasPrefix(name, "ima") && unsupported == nil {
			unsupported = err
		}
	}
	if unsupported != nil {
		return 0, unsupported
	}
	return 0, errors.New("no template's name where one stands in a list; is this ascii_runtime_measurements, or no IMA list?")
}

// Hashed is what the kernel hashes for the template digest: the data, with the
// name padded under template "ima".
func (e Entry) Hashed() []byte {
	if e.Template != "ima" {
		return e.Data
	}
	padded := make([]byte, 20+oldName+1)
	copy(padded, e.Data[:20])
	copy(padded[20:], e.Data[24:])
	return padded
}

// Append writes e as it stands in a binary list.
func (e Entry) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(e.PCR))
	b = append(b, e.TemplateDigest...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Template)))
	b = append(b, e.Template...)
	if e.Template != "ima" {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Data)))
	}
	return append(b, e.Data...)
}

// A File is what an entry says. Names have '_' where the file's path has a
// space: the kernel writes them so.
type File struct {
	Name      string
	Algorithm string // as "sha256"
	Verity    bool   // the digest is fs-verity's, not of the content
	Digest    []byte
	Signature []byte // the security.ima extended attribute; nil: none
}

func (e Entry) file(names []string) (f File, err error) {
	if e.Template == "ima" {
		name := e.Data[24:]
		if bytes.IndexByte(name, 0) >= 0 {
			return f, errors.New("a NUL within a name")
		}
		return File{Name: string(name), Algorithm: "sha1", Digest: e.Data[:20]}, nil
	}
	rest := e.Data
	for _, field := range names {
		var b []byte
		if b, rest, err = prefixed(rest, maxData); err != nil {
			return f, fmt.Errorf("field %s: %w", field, err)
		}
		switch field {
		case "d":
			f.Algorithm, f.Digest = "sha1", b
			if len(b) != 20 && !e.Violation() {
				err = fmt.Errorf("%d bytes, not SHA-1's 20", len(b))
			}
		case "d-ng", "d-ngv2":
			err = f.digest(b, field == "d-ngv2", e.Violation())
		case "n", "n-ng":
			f.Name, err = name(b, field == "n-ng")
		case "sig":
			if len(b) > 0 {
				f.Signature = b
			}
		case "imode":
			err = length(b, 2)
		case "iuid", "igid":
			err = length(b, 4)
		}
		if err != nil {
			return f, fmt.Errorf("field %s: %w", field, err)
		}
	}
	if len(rest) > 0 {
		return f, fmt.Errorf("%d bytes behind the last field of template %s", len(rest), e.Template)
	}
	return f, nil
}

func length(b []byte, n int) error {
	if len(b) != 0 && len(b) != n {
		return fmt.Errorf("%d bytes, not %d", len(b), n)
	}
	return nil
}

// name reads a name; the newer form ends with a NUL.
func name(b []byte, ends bool) (string, error) {
	if len(b) > maxName {
		return "", fmt.Errorf("a name of %d bytes; %d are looked at", len(b), maxName)
	}
	if ends {
		if len(b) == 0 || b[len(b)-1] != 0 {
			return "", errors.New("a name without its NUL")
		}
		b = b[:len(b)-1]
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return "", errors.New("a NUL within a name")
	}
	return string(b), nil
}

// sizes are those of the digests we know.
var sizes = map[string]int{"md5": 16, "sha1": 20, "rmd160": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "sm3": 32, "sm3-256": 32,
	"sha3-256": 32, "sha3-384": 48, "sha3-512": 64, "streebog256": 32, "streebog512": 64}

// digest reads ALGORITHM ":" NUL and the bytes, with TYPE ":" before it in the
// second version. A violation's digest is not there, and how many zeros stand
// for it is each kernel's own.
func (f *File) digest(b []byte, typed, violation bool) error {
	end := bytes.IndexByte(b[:min(len(b), 40)], 0)
	if end < 2 || b[end-1] != ':' {
		return errors.New("no algorithm before the digest")
	}
	algorithm := string(b[:end-1])
	if typed {
		kind, after, found := strings.Cut(algorithm, ":")
		if !found || kind != "ima" && kind != "verity" {
			return fmt.Errorf("a digest of unknown type in %q", algorithm)
		}
		algorithm, f.Verity = after, kind == "verity"
	}
	want, known := sizes[algorithm]
	if !known {
		return fmt.Errorf("unknown digest algorithm %q", algorithm)
	}
	f.Algorithm, f.Digest = algorithm, b[end+1:]
	if len(f.Digest) != want && !violation {
		return fmt.Errorf("%d bytes of %s, which has %d", len(f.Digest), algorithm, want)
	}
	return nil
}
