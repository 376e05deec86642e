package packages

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

const (
	arMagic  = "!<arch>\n"
	arHeader = 60
	// Dictionaries of xz -9 and windows of zstd --ultra -22.
	xzDictionary = 64 << 20
	zstdWindow   = 128 << 20
)

// readDeb finds the one data.tar in a .deb, which is an ar archive that starts
// with debian-binary.
func (s fileSet) readDeb(r io.ReaderAt, size int64, most limits) error {
	found := ""
	for pos, first := int64(len(arMagic)), true; pos < size; first = false {
		name, length, err := arMember(io.NewSectionReader(r, pos, size-pos))
		if err != nil {
			return fmt.Errorf("ar member at byte %d: %w", pos, err)
		}
		pos += arHeader
		if length > size-pos {
			return fmt.Errorf("%q is cut off: it claims %d bytes and %d follow", name, length, size-pos)
		}
		body := io.NewSectionReader(r, pos, length)
		pos += length + length&1
		switch {
		case first:
			version := make([]byte, 2)
			if _, err := io.ReadFull(body, version); err != nil || name != "debian-binary" || string(version) != "2." {
				return errors.New("an ar archive, but no Debian package of format 2")
			}
		case strings.HasPrefix(name, "data.tar"):
			if found != "" {
				return fmt.Errorf("both %q and %q: a package has one", found, name)
			}
			found = name
			if err := s.readData(name, body, most); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	if found == "" {
		return errors.New("a Debian package without data.tar: cut off?")
	}
	return nil
}

// arMember reads a member's header: name, mtime, owner, group, mode, size, each
// padded with spaces, and an end mark.
func arMember(r io.Reader) (name string, length int64, err error) {
	h := make([]byte, arHeader)
	if _, err := io.ReadFull(r, h); err != nil {
		return "", 0, errors.New("its header is cut off")
	}
	if string(h[58:]) != "`\n" {
		return "", 0, errors.New("its header has no end mark")
	}
	claimed, err := strconv.ParseUint(string(bytes.TrimRight(h[48:58], " ")), 10, 63)
	if err != nil {
		return "", 0, fmt.Errorf("its size %q is no number", h[48:58])
	}
	return strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/"), int64(claimed), nil
}

func (s fileSet) readData(name string, r io.Reader, most limits) error {
	switch strings.TrimPrefix(name, "data.tar") {
	case "":
	case ".gz":
		z, err := gzip.NewReader(r)
		if err != nil {
			return err
		}
		r = z
	case ".xz":
		z, err := xz.NewReader(r, xzDictionary)
		if err != nil {
			return err
		}
		r = z
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(zstdWindow), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	default:
		return errors.New("its compression is not among gz, xz, zst and none; repack it, or use a manifest")
	}
	return s.readTar(&bounded{r: r, left: most.bytes, most: most.bytes}, most)
}

func (s fileSet) readTar(r io.Reader, most limits) error {
	t := tar.NewReader(r)
	left := most.bytes // of contents: a sparse file holds more than the stream does
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if n == most.entries {
			return tooMany(n)
		}
		p, err := clean(h.Name)
		if err != nil {
			return err
		}
		digest := ""
		switch h.Typeflag {
		case tar.TypeDir:
			continue
		case tar.TypeLink:
			target, err := clean(h.Linkname)
			if err != nil {
				return fmt.Errorf("%q is a hard link: %w", p, err)
			}
			var known bool
			if digest, known = s.digests[target]; !known {
				return fmt.Errorf("%q is a hard link to %q, which is not before it", p, target)
			}
		case tar.TypeReg, tar.TypeGNUSparse:
			if h.Size > left {
				return tooLarge(most.bytes)
			}
			left -= h.Size
			sum := sha256.New()
			if _, err := io.Copy(sum, t); err != nil {
				return fmt.Errorf("%q: %w", p, err)
			}
			digest = fmt.Sprintf("%s%x", digestPrefix, sum.Sum(nil))
		case tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		default:
			return fmt.Errorf("%q: an entry of type %q, which no package has", p, h.Typeflag)
		}
		if err := s.add(p, digest); err != nil {
			return err
		}
	}
	_, err := io.Copy(io.Discard, r) // to the compressor's checksum
	return err
}

// bounded ends a stream with an error where it gets too long.
type bounded struct {
	r          io.Reader
	left, most int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, tooLarge(b.most)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

func tooLarge(most int64) error { return fmt.Errorf("it unpacks to more than %d bytes", most) }
