package vendors

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/sassoftware/relic/v8/lib/authenticode"
)

// Bounds of a cabinet. Microsoft's TrustedTpm.cab has some hundred files of one
// or two KiB.
const (
	maxCabinetFiles  = 10_000
	maxCabinetFolder = 32 << 20 // bytes, uncompressed, of all folders together
	maxCabinetBlocks = 1 << 16  // of all folders together
)

// A packed file is one file of a cabinet.
type packed struct {
	name string // with slashes
	data []byte
}

// errCorrupt is returned for a cabinet whose offsets or lengths don't fit.
var errCorrupt = errors.New("the cabinet is damaged: an offset or a length doesn't fit (fetch it again)")

// Fixed sizes of a cabinet's structures (MS-CAB, sections 2.1 to 2.4).
const (
	cabHeader    = 36
	cabFolder    = 8
	cabFile      = 16
	cabBlock     = 8
	cabMostBlock = 32 << 10 // uncompressed bytes of a block, and MSZIP's window

	flagPrevious, flagNext, flagReserve = 1, 2, 4
)

// A cabReader reads a cabinet's structures one behind the other.
type cabReader struct {
	data []byte
	at   int
	bad  bool
}

func (r *cabReader) take(n int) []byte {
	if n < 0 || r.at < 0 || r.at > len(r.data) || n > len(r.data)-r.at {
		r.bad = true
		return make([]byte, max(0, min(n, cabHeader)))
	}
	r.at += n
	return r.data[r.at-n : r.at]
}

// unpack returns the files of a cabinet (MS-CAB), stored or compressed by MSZIP.
func unpack(data []byte) ([]packed, error) {
	le := binary.LittleEndian
	r := &cabReader{data: data}
	header := r.take(cabHeader)
	if r.bad {
		return nil, errCorrupt
	}
	filesAt, folders, count, flags := int(le.Uint32(header[16:])), int(le.Uint16(header[26:])), int(le.Uint16(header[28:])), le.Uint16(header[30:])
	if flags&(flagPrevious|flagNext) != 0 {
		return nil, errors.New("the cabinet is one part of several, which isn't supported")
	}
	if count > maxCabinetFiles {
		return nil, fmt.Errorf("the cabinet has %d files; at most %d are read", count, maxCabinetFiles)
	}

	// Room that is reserved in the header, in each folder and in each block.
	folderReserve, blockReserve := 0, 0
	if flags&flagReserve != 0 {
		reserve := r.take(4)
		folderReserve, blockReserve = int(reserve[2]), int(reserve[3])
		r.take(int(le.Uint16(reserve)))
	}

	content, total, blocks := make([][]byte, folders), 0, 0
	for i := range folders {
		folder := r.take(cabFolder + folderReserve)
		if r.bad {
			return nil, errCorrupt
		}
		if blocks += int(le.Uint16(folder[4:])); blocks > maxCabinetBlocks {
			return nil, fmt.Errorf("the cabinet has more than %d blocks of data", maxCabinetBlocks)
		}
		var err error
		content[i], err = inflate(&cabReader{data: data, at: int(le.Uint32(folder))}, int(le.Uint16(folder[4:])), le.Uint16(folder[6:]), blockReserve, maxCabinetFolder-total)
		if err != nil {
			return nil, err
		}
		total += len(content[i])
	}

	r.at = filesAt
	var files []packed
	for range count {
		entry := r.take(cabFile)
		if r.bad {
			return nil, errCorrupt
		}
		size, offset, folder := int(le.Uint32(entry)), int(le.Uint32(entry[4:])), int(le.Uint16(entry[8:]))
		end := bytes.IndexByte(r.data[r.at:], 0)
		if end < 0 || folder >= folders || offset > len(content[folder]) || size > len(content[folder])-offset {
			return nil, errCorrupt
		}
		name := string(r.take(end + 1)[:end])
		files = append(files, packed{strings.ReplaceAll(name, `\`, "/"), content[folder][offset : offset+size]})
	}
	return files, nil
}

// inflate returns the content of a folder of so many blocks.
func inflate(r *cabReader, blocks int, compression uint16, reserve, limit int) (out []byte, err error) {
	le := binary.LittleEndian
	const stored, mszip = 0, 1
	method := compression & 0x0f
	if method != stored && method != mszip {
		name := map[uint16]string{2: "Quantum", 3: "LZX"}[method]
		if name == "" {
			name = fmt.Sprintf("method %d", method)
		}
		return nil, fmt.Errorf("the cabinet is compressed by %s, and only MSZIP is read here: `cabextract -d FOLDER FILE` unpacks it; then import the files in the folder", name)
	}

	for range blocks {
		head := r.take(cabBlock + reserve)
		size, whole := int(le.Uint16(head[4:])), int(le.Uint16(head[6:]))
		block := r.take(size)
		switch {
		case r.bad || whole > cabMostBlock:
			return nil, errCorrupt
		case len(out)+whole > limit:
			return nil, fmt.Errorf("the cabinet unpacks to more than %d bytes", maxCabinetFolder)
		case method == stored:
			if size != whole {
				return nil, errCorrupt
			}
			out = append(out, block...)
			continue
		}

		// Each block is a DEFLATE stream of its own, which may refer to what the
		// blocks before it gave (MS-MCI).
		rest, ok := bytes.CutPrefix(block, []byte("CK"))
		if !ok {
			return nil, errCorrupt
		}
		plain, err := io.ReadAll(io.LimitReader(flate.NewReaderDict(bytes.NewReader(rest), out[max(0, len(out)-cabMostBlock):]), int64(whole)+1))
		if err != nil || len(plain) != whole {
			return nil, errCorrupt
		}
		out = append(out, plain...)
	}
	return out, nil
}

//go:embed microsoft.pem
var microsoftPEM []byte

// microsoftRoots are SHA-256 fingerprints of Microsoft's roots of 2010 and 2011
// for code signing, which microsoft.pem holds.
var microsoftRoots = []string{
	"df545bf919a2439c36983b54cdfc903dfa4f37d3996d8d84b4c31eec6f3c163e",
	"847df6a78497943f27fc72eb93f9a637320a02b561d0a91b09e87a7807ed7c61",
}

// microsoft returns the roots that a cabinet's signature has to lead to.
func microsoft() *x509.CertPool {
	pool := x509.NewCertPool()
	certs, err := parsePEM(microsoftPEM)
	if err != nil || len(certs) != len(microsoftRoots) {
		panic("vendors: microsoft.pem doesn't hold its roots")
	}
	for i, cert := range certs {
		if sum := sha256.Sum256(cert.Raw); hex.EncodeToString(sum[:]) != microsoftRoots[i] {
			panic("vendors: microsoft.pem holds another root")
		}
		pool.AddCert(cert)
	}
	return pool
}

// checkSignature verifies that a cabinet is signed by a certificate for code
// signing that leads to one of the roots. A time stamp lets the signature
// outlive the certificate.
func checkSignature(cabinet []byte, roots *x509.CertPool) (err error) {
	const next = "fetch it again from Microsoft, or unpack it by `cabextract -d FOLDER FILE`, check the files by yourself, and import them"
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the cabinet's signature can't be read (%s)", next)
		}
	}()

	// Lengths are claims; the library makes room for them.
	le := binary.LittleEndian
	if len(cabinet) < cabHeader+4+20 || le.Uint16(cabinet[30:])&flagReserve == 0 || int(le.Uint32(cabinet[cabHeader+12:])) > len(cabinet) {
		return fmt.Errorf("the cabinet isn't signed (%s)", next)
	}
	if int(le.Uint32(cabinet[8:])) > len(cabinet) || int(le.Uint32(cabinet[16:])) > len(cabinet) {
		return errCorrupt
	}
	signature, err := authenticode.VerifyCab(bytes.NewReader(cabinet), false)
	if err != nil {
		return fmt.Errorf("the cabinet's signature is wrong: %w (%s)", err, next)
	}
	if err := signature.VerifyChain(roots, nil, x509.ExtKeyUsageCodeSigning); err != nil {
		return fmt.Errorf("the cabinet isn't signed by Microsoft: %w (%s)", err, next)
	}
	return nil
}
