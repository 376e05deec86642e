package appraise

import (
	"encoding/binary"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// utf16Text reads little-endian UTF-16 that is printable; a NUL at its end is left
// out.
func utf16Text(b []byte) (string, bool) {
	if len(b)%2 != 0 {
		return "", false
	}
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	if n := len(units); n > 0 && units[n-1] == 0 {
		units = units[:n-1]
	}
	text := string(utf16.Decode(units))
	return text, printable(text)
}

// printable says whether text can be shown, and compared, as it stands. U+FFFD is
// what a decoder leaves of bytes that were no text.
func printable(s string) bool {
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != '\t' && r != '\n' {
			return false
		}
	}
	return true
}
