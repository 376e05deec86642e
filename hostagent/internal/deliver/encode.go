package deliver

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// The encoders take UTF-8 text. What they can't write so that the format's
// readers get the same bytes back is an error, which never quotes the value.
var encoders = map[string]func([]byte) ([]byte, error){
	"plain":      plain,
	"pem":        pemBlocks,
	"pgpass":     pgpass,
	"properties": properties,
	"json":       jsonString,
	"yaml":       yamlString,
	"xml":        xmlText,
	"shell":      shell,
}

// control says whether r ends a line or can't be seen, to some reader.
func control(r rune) bool {
	return r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0x2028 || r == 0x2029
}

func plain(b []byte) ([]byte, error) {
	for _, r := range string(b) {
		if control(r) {
			return nil, errors.New("has a control character, as a line break: write it through the file's encoder, or through pem if it is PEM")
		}
	}
	return b, nil
}

// pemBlocks writes PEM anew, so that nothing but PEM passes.
func pemBlocks(b []byte) ([]byte, error) {
	begins := bytes.Count(b, []byte("-----BEGIN "))
	var out []byte
	rest := b
	for range begins {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("is not whole PEM")
		}
		out = append(out, pem.EncodeToMemory(block)...)
		clear(block.Bytes)
	}
	if len(out) == 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("is not PEM")
	}
	return out, nil
}

// pgpass is one field of a .pgpass file, whose lines can't be continued.
func pgpass(b []byte) ([]byte, error) {
	if bytes.ContainsAny(b, "\x00\r\n") {
		return nil, errors.New("a .pgpass file can't hold a line break or a NUL")
	}
	var out []byte
	for _, c := range b {
		if c == '\\' || c == ':' {
			out = append(out, '\\')
		}
		out = append(out, c)
	}
	return out, nil
}

// properties is a value, or a key, of a Java properties file, in ASCII so that
// it is the same in both character sets that Java reads them in.
func properties(b []byte) ([]byte, error) {
	var out []byte
	for i, r := range string(b) {
		switch {
		case r == ' ' && i == 0, r == '\\', r == '=', r == ':', r == '#', r == '!':
			out = append(out, '\\', byte(r))
		case r == '\n':
			out = append(out, `\n`...)
		case r == '\r':
			out = append(out, `\r`...)
		case r == '\t':
			out = append(out, `\t`...)
		case r < 0x20 || r >= 0x7f:
			for _, u := range utf16.Encode([]rune{r}) {
				out = fmt.Appendf(out, `\u%04X`, u)
			}
		default:
			out = append(out, byte(r))
		}
	}
	return out, nil
}

// jsonString is a string with its quotes.
func jsonString(b []byte) ([]byte, error) { return quoted(b), nil }

// yamlString is a double-quoted scalar with its quotes, to YAML 1.1 and 1.2.
func yamlString(b []byte) ([]byte, error) { return quoted(b), nil }

// quoted has every character escaped that JSON or YAML want escaped, in the way
// that both read.
func quoted(b []byte) []byte {
	out := []byte{'"'}
	for _, r := range string(b) {
		switch {
		case r == '"' || r == '\\':
			out = append(out, '\\', byte(r))
		case control(r), r == 0xfeff, r == 0xfffe, r == 0xffff:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = utf8.AppendRune(out, r)
		}
	}
	return append(out, '"')
}

// xmlText is text, or an attribute's value without its quotes.
func xmlText(b []byte) ([]byte, error) {
	var out []byte
	for _, r := range string(b) {
		switch {
		case r == '&' || r == '<' || r == '>' || r == '"' || r == '\'', r == '\t' || r == '\n' || r == '\r', r >= 0x7f && r < 0xa0, r == 0x2028:
			out = fmt.Appendf(out, "&#%d;", r)
		case r < 0x20, r == 0xfffe, r == 0xffff:
			return nil, errors.New("XML has no way to write one of its control characters")
		default:
			out = utf8.AppendRune(out, r)
		}
	}
	return out, nil
}

// shell is one word of POSIX sh with its quotes.
func shell(b []byte) ([]byte, error) {
	if bytes.IndexByte(b, 0) >= 0 {
		return nil, errors.New("a shell's word can't hold a NUL")
	}
	out := []byte{'\''}
	for _, c := range b {
		if c == '\'' {
			out = append(out, `'\''`...)
		} else {
			out = append(out, c)
		}
	}
	return append(out, '\''), nil
}
