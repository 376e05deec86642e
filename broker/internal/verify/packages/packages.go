// Package packages says which regular files a package puts where, and with which
// SHA-256: what a release expects IMA to measure on the hosts that install it.
//
// It trusts nothing of its input. A .deb's files are unpacked as a stream and
// hashed here; an .rpm's digests are those of its header, which rpm holds its
// payload against when it installs. That a package is who it claims to be is for
// whoever announces the release: signatures are not looked at.
//
// What is read is bounded in bytes after decompression, in entries and in the
// length of paths, and nothing is allocated because the input claims a length.
// A path leaves as a clean absolute one, once.
package packages

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A File is a regular file of a package, with its digest as "sha256:hex".
type File struct {
	Path   string `json:"path"`
	Digest string `json:"digest"`
}

type limits struct {
	bytes   int64 // after decompression, and of all files together
	entries int
}

var usual = limits{bytes: 4 << 30, entries: 100_000}

const maxPath = 4096 // Linux' PATH_MAX

// Read lists the regular files of a .deb or .rpm, by path.
func Read(r io.ReaderAt, size int64) ([]File, error) { return read(r, size, usual) }

func read(r io.ReaderAt, size int64, most limits) ([]File, error) {
	magic := make([]byte, len(arMagic))
	n, err := r.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	files := fileSet{most: most.entries, digests: map[string]string{}}
	switch magic = magic[:n]; {
	case bytes.Equal(magic, []byte(arMagic)):
		err = files.readDeb(r, size, most)
	case bytes.HasPrefix(magic, []byte(rpmLeadMagic)):
		err = files.readRPM(r, size)
	default:
		err = errors.New("neither a .deb nor an .rpm")
	}
	if err != nil {
		return nil, err
	}
	return files.list(), nil
}

// A fileSet collects what has a path; what is no regular file has no digest.
type fileSet struct {
	most    int
	digests map[string]string
}

func (s fileSet) add(p, digest string) error {
	if _, twice := s.digests[p]; twice {
		return fmt.Errorf("%q: there twice", p)
	}
	if len(s.digests) >= s.most {
		return tooMany(s.most)
	}
	s.digests[p] = digest
	return nil
}

func tooMany(most int) error { return fmt.Errorf("more than %d entries", most) }

func (s fileSet) list() []File {
	var list []File
	for p, digest := range s.digests {
		if digest != "" {
			list = append(list, File{p, digest})
		}
	}
	slices.SortFunc(list, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return list
}

// clean makes a name in an archive the path that it is installed at.
func clean(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("a file without a name")
	case len(name) > maxPath:
		return "", fmt.Errorf("a path of %d bytes; %d at most", len(name), maxPath)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return "", fmt.Errorf("%q: a path with control characters or not in UTF-8", name)
	case slices.Contains(strings.Split(name, "/"), ".."):
		return "", fmt.Errorf("%q: a path with .. in it", name)
	}
	return path.Clean("/" + name), nil
}

const digestPrefix = "sha256:"

// digestOf takes a SHA-256 in hex.
func digestOf(text string) (string, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != 32 {
		return "", fmt.Errorf("%.80q is no SHA-256 in hex", text)
	}
	return digestPrefix + hex.EncodeToString(b), nil
}
