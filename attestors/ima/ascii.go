package ima

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// IsASCII says whether a list is the ASCII form: it begins with the decimal
// number of a PCR, where the binary one has zeros in its second byte.
func IsASCII(list []byte) bool {
	return len(list) > 1 && list[0] >= ' ' && list[1] >= ' '
}

// FromASCII turns an ASCII list into the binary one that it was printed from.
// Names have no spaces in either: the kernel writes '_' for them.
func FromASCII(list []byte) ([]byte, error) {
	if len(list) > 4*MaxList {
		return nil, fmt.Errorf("an IMA list of %d bytes; %d are looked at", len(list), 4*MaxList)
	}
	var out []byte
	for n := 0; len(list) > 0; n++ {
		line, rest, whole := bytes.Cut(list, []byte("\n"))
		if !whole {
			return nil, fmt.Errorf("IMA entry %d: %w", n, errCut)
		}
		e, err := fromLine(string(line))
		if err != nil {
			return nil, fmt.Errorf("IMA entry %d: %w", n, err)
		}
		out, list = e.Append(out), rest
	}
	return out, nil
}

func fromLine(line string) (e Entry, err error) {
	words := strings.Split(strings.TrimLeft(line, " "), " ") // the PCR stands in a column of two
	if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == utf8.RuneError }) {
		return e, errors.New("it has bytes that are no text: a binary entry in an ASCII list")
	}
	if len(words) < 4 {
		return e, errors.New("it is no `PCR DIGEST TEMPLATE FIELDS`")
	}
	if e.PCR, err = strconv.Atoi(words[0]); err != nil || e.PCR < 0 || e.PCR > maxPCR {
		return e, fmt.Errorf("PCR %q", words[0])
	}
	if e.TemplateDigest, err = hex.DecodeString(words[1]); err != nil {
		return e, fmt.Errorf("template digest: %w", err)
	}
	switch len(e.TemplateDigest) {
	case 20, 32, 48, 64:
	default:
		return e, fmt.Errorf("a template digest of %d bytes", len(e.TemplateDigest))
	}
	e.Template = words[2]
	names, err := fields(e.Template)
	if err != nil {
		return e, err
	}
	words = words[3:]
	if len(words) == len(names)-1 && kinds[names[len(words)]] != digest && !isName(names[len(words)]) {
		words = append(words, "") // an empty field at the end, whose space was trimmed
	}
	if len(words) != len(names) {
		return e, fmt.Errorf("%d fields, where template %s has %d", len(words), e.Template, len(names))
	}
	for i, name := range names {
		b, err := fromWord(kinds[name], words[i])
		if err != nil {
			return e, fmt.Errorf("field %s: %w", name, err)
		}
		switch {
		case e.Template == "ima" && name == "d":
			if len(b) != 20 {
				return e, fmt.Errorf("field d: %d bytes, not SHA-1's 20", len(b))
			}
			e.Data = append(e.Data, b...)
		default:
			e.Data = binary.LittleEndian.AppendUint32(e.Data, uint32(len(b)))
			e.Data = append(e.Data, b...)
		}
	}
	return e, nil
}

// fromWord is the bytes that a field was printed from; an empty one is printed
// as nothing.
func fromWord(k kind, word string) ([]byte, error) {
	if word == "" {
		return nil, nil
	}
	switch k {
	case digest:
		colon := strings.LastIndexByte(word, ':')
		if colon < 0 {
			return nil, errors.New("no algorithm before the digest")
		}
		sum, err := hex.DecodeString(word[colon+1:])
		if err != nil {
			return nil, err
		}
		return append([]byte(word[:colon+1]+"\x00"), sum...), nil
	case text:
		return []byte(word + "\x00"), nil
	case oldText:
		return []byte(word), nil
	case number16:
		n, err := strconv.ParseUint(word, 10, 16)
		return binary.LittleEndian.AppendUint16(nil, uint16(n)), err
	case number32:
		n, err := strconv.ParseUint(word, 10, 32)
		return binary.LittleEndian.AppendUint32(nil, uint32(n)), err
	default:
		return hex.DecodeString(word)
	}
}
