package boot

import (
	"bytes"
	"strings"
	"testing"
)

// registerLog has a separator in each register, with digests of the banks' lengths.
func registerLog(header uint32, banks []Bank, registers ...uint32) *Log {
	log := &Log{SpecID: &SpecID{Major: 2, UintnSize: 2, Banks: banks, Vendor: []byte{}, Register: header}}
	add := func(register uint32, kind EventType) {
		e := Event{PCR: register, Type: kind, Data: make([]byte, 4)}
		for _, b := range banks {
			e.Digests = append(e.Digests, Digest{b.Algorithm, bytes.Repeat([]byte{1}, int(b.Size))})
		}
		log.Events = append(log.Events, e)
	}
	add(0, NoAction) // extends nothing, so its register doesn't count
	for _, register := range registers {
		add(register, Separator)
	}
	return log
}

func TestUnsuited(t *testing.T) {
	only384 := []Bank{{sha384, 48}}
	const confidential, bank = "a confidential VM's event log", "activate the TPM's SHA-256 PCR bank"
	for _, c := range []struct {
		name string
		log  *Log
		want string // empty: usable
	}{
		{"TDX", registerLog(1, only384, 1, 2, 3, 4), confidential},
		{"TDX, header in register 0", registerLog(0, only384, 1, 1), confidential},
		{"TDX, padded", func() *Log {
			l := registerLog(1, only384, 1, 2)
			l.Padding = bytes.Repeat([]byte{0xff}, 1000)
			return l
		}(), confidential},
		{"a TPM's SHA-384 bank", registerLog(0, only384, 0, 1, 2, 4), "only SHA-384: " + bank},
		{"a PCR that no TDX VM has", registerLog(0, only384, 1, 5), "only SHA-384: " + bank},
		{"two banks", registerLog(0, []Bank{{sha384, 48}, {SHA1, 20}}, 1, 2), "only SHA-1, SHA-384: " + bank},
		{"an unknown bank", registerLog(0, []Bank{{0x99, 8}}, 1), "only algorithm 0x0099: " + bank},
		{"SHA-256", registerLog(0, []Bank{{SHA256, 32}}, 1, 2), ""},
		{"SHA-256 beside SHA-384", registerLog(0, []Bank{{SHA256, 32}, {sha384, 48}}, 1, 2), ""},
		{"nothing extended", registerLog(1, only384), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := c.log.Encode()
			log, err := Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(log.Encode(), b) {
				t.Error("written otherwise than read")
			}
			if err := log.Unsuited(); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	for _, banks := range [][]Bank{{{SHA256, 32}}, {{sha384, 48}, {SHA256, 32}}} {
		if _, err := Parse(registerLog(1, banks, 1).Encode()); err == nil {
			t.Errorf("a header in register 1 was accepted with banks %v", banks)
		}
	}
}

func TestUnsuitedSHA1(t *testing.T) {
	log, err := Parse(sha1Log(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := log.Unsuited(); err == nil || !strings.Contains(err.Error(), "only SHA-1: ") {
		t.Error(err)
	}
}
