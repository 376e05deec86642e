package packages

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	rpmLeadMagic   = "\xed\xab\xee\xdb"
	rpmLead        = 96
	rpmHeaderMagic = "\x8e\xad\xe8\x01"

	// rpm's own bound is 65,535 entries and 256 MiB.
	maxRPMEntries = 65_535
	maxRPMStore   = 64 << 20
)

// Tags of the signature header.
const (
	sigLongSize     = 270  // int64, in place of sigSize
	sigHeaderSHA256 = 273  // string, of the header
	sigSize         = 1000 // int32, of header and payload
)

// Tags of the header.
const (
	tagOldFileNames  = 1027
	tagFileModes     = 1030 // int16
	tagFileDigests   = 1035 // strings
	tagFileFlags     = 1037 // int32
	tagDirIndexes    = 1116 // int32
	tagBaseNames     = 1117 // strings
	tagDirNames      = 1118 // strings
	tagDigestAlgo    = 5011 // int32
	tagPayloadSHA256 = 5092 // strings
)

const (
	kindInt16   = 3
	kindInt32   = 4
	kindInt64   = 5
	kindString  = 6
	kindStrings = 8

	modeType    = 0xf000
	modeRegular = 0x8000
	modeFolder  = 0x4000
	flagGhost   = 1 << 6 // named by the package, not in it
	algoSHA256  = 8
)

// readRPM takes the files of an .rpm from its header: lead, signature header,
// header, payload. Nothing of the payload is unpacked, but that all of it is
// there is seen.
func (s fileSet) readRPM(r io.ReaderAt, size int64) error {
	signature, at, err := readRPMHeader(r, rpmLead, size)
	if err != nil {
		return fmt.Errorf("signature header: %w", err)
	}
	at = (at + 7) &^ 7
	header, payload, err := readRPMHeader(r, at, size)
	if err != nil {
		return fmt.Errorf("header: %w", err)
	}
	if err := s.addRPMFiles(header); err != nil {
		return err
	}
	return checkRPM(r, at, payload, size, signature, header)
}

// checkRPM holds header and payload against the digests that the package carries,
// or where an old one has none of its payload, against its size.
func checkRPM(r io.ReaderAt, at, payload, size int64, signature, header rpmHeader) error {
	headerDigest, err1 := signature.strings(sigHeaderSHA256, kindString)
	payloadDigest, err2 := header.strings(tagPayloadSHA256, kindStrings)
	claimed, err3 := signature.ints(sigSize, kindInt32)
	long, err4 := signature.ints(sigLongSize, kindInt64)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	if len(headerDigest) > 0 {
		if err := digestHolds("header", io.NewSectionReader(r, at, payload-at), headerDigest[0]); err != nil {
			return err
		}
	}
	if len(payloadDigest) > 0 {
		return digestHolds("payload", io.NewSectionReader(r, payload, size-payload), payloadDigest[0])
	}
	if claimed = append(claimed, long...); len(claimed) != 1 || claimed[0] != uint64(size-at) {
		return fmt.Errorf("nothing says that its payload, of which %d bytes are there, is whole: damaged or cut off", size-payload)
	}
	return nil
}

func digestHolds(what string, r io.Reader, want string) error {
	sum := sha256.New()
	if _, err := io.Copy(sum, r); err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != want {
		return fmt.Errorf("its %s is not what its digest says: damaged or cut off", what)
	}
	return nil
}

func (s fileSet) addRPMFiles(h rpmHeader) error {
	names, err := h.strings(tagBaseNames, kindStrings)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		if old, err := h.strings(tagOldFileNames, kindStrings); err != nil || len(old) > 0 {
			return errors.New("its file names are in the format of rpm 3; use a manifest")
		}
		return nil
	}
	algo, err := h.ints(tagDigestAlgo, kindInt32)
	if err != nil {
		return err
	}
	if len(algo) != 1 || algo[0] != algoSHA256 {
		return errors.New("its file digests are not SHA-256: build it with %_binary_filedigest_algorithm 8, or use a manifest")
	}
	dirs, err1 := h.strings(tagDirNames, kindStrings)
	digests, err2 := h.strings(tagFileDigests, kindStrings)
	dirOf, err3 := h.ints(tagDirIndexes, kindInt32)
	modes, err4 := h.ints(tagFileModes, kindInt16)
	flags, err5 := h.ints(tagFileFlags, kindInt32)
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return err
	}
	for _, n := range []int{len(digests), len(dirOf), len(modes), len(flags)} {
		if n != len(names) {
			return fmt.Errorf("its header names %d files and says something of %d", len(names), n)
		}
	}
	for i, name := range names {
		if dirOf[i] >= uint64(len(dirs)) {
			return fmt.Errorf("file %d is in folder %d of %d", i, dirOf[i], len(dirs))
		}
		dir := dirs[dirOf[i]]
		if !strings.HasPrefix(dir, "/") {
			return fmt.Errorf("file %d is at no absolute path: a source package?", i)
		}
		if len(dir) > maxPath { // before it is copied for each of its files
			return fmt.Errorf("a path of %d bytes; %d at most", len(dir), maxPath)
		}
		p, err := clean(dir + name)
		if err != nil {
			return err
		}
		digest := ""
		switch kind := modes[i] & modeType; {
		case kind == modeFolder:
			continue
		case kind == modeRegular && flags[i]&flagGhost == 0:
			if digest, err = digestOf(digests[i]); err != nil {
				return fmt.Errorf("%q: %w", p, err)
			}
		}
		if err := s.add(p, digest); err != nil {
			return err
		}
	}
	return nil
}

// An rpmHeader is an index of 16 bytes an entry (tag, type, offset, count) and
// the store that it points into.
type rpmHeader struct{ index, store []byte }

// readRPMHeader also says where the header ends.
func readRPMHeader(r io.ReaderAt, at, size int64) (rpmHeader, int64, error) {
	intro := make([]byte, 16)
	if _, err := io.ReadFull(io.NewSectionReader(r, at, max(size-at, 0)), intro); err != nil {
		return rpmHeader{}, 0, errors.New("cut off")
	}
	if !bytes.HasPrefix(intro, []byte(rpmHeaderMagic)) {
		return rpmHeader{}, 0, errors.New("not there, or of an unknown version")
	}
	entries, store := int64(binary.BigEndian.Uint32(intro[8:])), int64(binary.BigEndian.Uint32(intro[12:]))
	if entries > maxRPMEntries || store > maxRPMStore {
		return rpmHeader{}, 0, fmt.Errorf("%d entries and %d bytes; %d and %d at most", entries, store, maxRPMEntries, maxRPMStore)
	}
	at += int64(len(intro))
	length := entries*16 + store
	if length > size-at { // so that what is allocated is there
		return rpmHeader{}, 0, fmt.Errorf("cut off: it claims %d bytes and %d follow", length, size-at)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(io.NewSectionReader(r, at, length), b); err != nil {
		return rpmHeader{}, 0, err
	}
	return rpmHeader{b[:entries*16], b[entries*16:]}, at + length, nil
}

// find returns the store from where a tag's values start, and how many it
// claims; none where the tag isn't there.
func (h rpmHeader) find(tag, kind uint32) (data []byte, count uint32, err error) {
	found := false
	for e := h.index; len(e) > 0; e = e[16:] {
		if binary.BigEndian.Uint32(e) != tag {
			continue
		}
		offset := binary.BigEndian.Uint32(e[8:])
		switch {
		case found:
			return nil, 0, fmt.Errorf("header tag %d is there twice", tag)
		case binary.BigEndian.Uint32(e[4:]) != kind:
			return nil, 0, fmt.Errorf("header tag %d is not of its type", tag)
		case uint64(offset) > uint64(len(h.store)):
			return nil, 0, fmt.Errorf("header tag %d is outside of the header", tag)
		}
		found = true
		data, count = h.store[offset:], binary.BigEndian.Uint32(e[12:])
	}
	return data, count, nil
}

func (h rpmHeader) strings(tag, kind uint32) ([]string, error) {
	data, count, err := h.find(tag, kind)
	if err != nil {
		return nil, err
	}
	if int64(count) > int64(usual.entries) {
		return nil, tooMany(usual.entries)
	}
	var list []string
	for range count {
		value, rest, ended := bytes.Cut(data, []byte{0})
		if !ended {
			return nil, fmt.Errorf("header tag %d runs out of the header", tag)
		}
		list, data = append(list, string(value)), rest
	}
	return list, nil
}

func (h rpmHeader) ints(tag, kind uint32) ([]uint64, error) {
	data, count, err := h.find(tag, kind)
	if err != nil {
		return nil, err
	}
	width := map[uint32]int{kindInt16: 2, kindInt32: 4, kindInt64: 8}[kind]
	if uint64(count) > uint64(len(data)/width) {
		return nil, fmt.Errorf("header tag %d runs out of the header", tag)
	}
	if int64(count) > int64(usual.entries) {
		return nil, tooMany(usual.entries)
	}
	list := make([]uint64, count)
	for i := range list {
		for _, b := range data[i*width : (i+1)*width] {
			list[i] = list[i]<<8 | uint64(b)
		}
	}
	return list, nil
}
