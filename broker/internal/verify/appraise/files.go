package appraise

import (
	"bytes"
	"cmp"
	"iter"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
)

// A file is one proven measurement.
type file struct {
	name      string
	digest    digest
	signature string // empty: none
	other     bool   // measured into another PCR than IMA's own
}

// A digest is of SHA-256, or another one's text.
type digest struct {
	sha256 evidence.Digest
	other  string
}

const plain = "sha256:"

func digestOf(text string) digest {
	if sum, ok := strings.CutPrefix(text, plain); ok {
		if d, err := evidence.ParseDigest(sum); err == nil {
			return digest{sha256: d}
		}
	}
	return digest{other: text}
}

func (d digest) text() string {
	if d.other != "" {
		return d.other
	}
	return plain + d.sha256.String()
}

func (d digest) compare(e digest) int {
	return cmp.Or(bytes.Compare(d.sha256[:], e.sha256[:]), strings.Compare(d.other, e.other))
}

func fileOf(m imaappraise.Measurement) file {
	return file{m.Name, digestOf(m.Digest), string(m.Signature), m.PCR != ima.DefaultPCR}
}

func (f file) measurement() imaappraise.Measurement {
	m := imaappraise.Measurement{Index: -1, PCR: ima.DefaultPCR, Name: f.name, Digest: f.digest.text()}
	if f.other {
		m.PCR = otherPCR
	}
	if f.signature != "" {
		m.Signature = []byte(f.signature)
	}
	return m
}

// otherPCR stands for those that aren't IMA's own.
const otherPCR = -1

func (f file) compare(g file) int {
	if c := cmp.Or(strings.Compare(f.name, g.name), f.digest.compare(g.digest), strings.Compare(f.signature, g.signature)); c != 0 || f.other == g.other {
		return c
	}
	if g.other {
		return -1
	}
	return 1
}

// files is a set that never changes: what a request adds lies on what was there
// before, which other requests may be reading. nil is empty. It is made of sorted
// lists, as maps take ten times as much memory.
type files struct {
	below        *files
	depth, count int      // of all layers
	bytes        int      // of names, and of what else is as long as a host makes it, in all layers
	here         []file   // in order, each once
	byDigest     []uint32 // indexes in here, by digest
}

// maxDepth is how many layers a look-up walks at most.
const maxDepth = 16

// with is s and what it lacks of more, which is returned too, each once.
func (s *files) with(more iter.Seq[file]) (*files, []file) {
	var lacks []file
	for f := range more {
		if !s.has(f) {
			lacks = append(lacks, f)
		}
	}
	if len(lacks) == 0 {
		return s, nil
	}
	layer := layerOf(lacks)
	fresh := layer.here
	layer.below, layer.depth = s, 1
	for _, f := range fresh {
		layer.bytes += len(f.name) + len(f.signature) + len(f.digest.other)
	}
	if s != nil {
		layer.depth, layer.count, layer.bytes = s.depth+1, s.count+layer.count, s.bytes+layer.bytes
	}
	if layer.depth > maxDepth {
		layer = layer.flat()
	}
	return layer, fresh
}

// layerOf is a layer of the files in list, which it takes.
func layerOf(list []file) *files {
	slices.SortFunc(list, file.compare)
	list = slices.Clone(slices.Compact(list))
	s := &files{count: len(list), here: list, byDigest: make([]uint32, len(list))}
	for i := range s.byDigest {
		s.byDigest[i] = uint32(i)
	}
	slices.SortFunc(s.byDigest, func(i, j uint32) int { return list[i].digest.compare(list[j].digest) })
	return s
}

func (s *files) flat() *files {
	one := layerOf(slices.AppendSeq(make([]file, 0, s.count), s.all()))
	one.depth, one.bytes = 1, s.bytes
	return one
}

func (s *files) all() iter.Seq[file] {
	return func(yield func(file) bool) {
		for ; s != nil; s = s.below {
			for _, f := range s.here {
				if !yield(f) {
					return
				}
			}
		}
	}
}

func (s *files) has(f file) bool {
	for ; s != nil; s = s.below {
		if _, ok := slices.BinarySearchFunc(s.here, f, file.compare); ok {
			return true
		}
	}
	return false
}

func (s *files) hasName(name string) bool {
	for ; s != nil; s = s.below {
		if _, ok := slices.BinarySearchFunc(s.here, name, func(f file, name string) int { return strings.Compare(f.name, name) }); ok {
			return true
		}
	}
	return false
}

func (s *files) hasDigest(text string) bool {
	d := digestOf(text)
	for ; s != nil; s = s.below {
		if _, ok := slices.BinarySearchFunc(s.byDigest, d, func(i uint32, d digest) int { return s.here[i].digest.compare(d) }); ok {
			return true
		}
	}
	return false
}

// fileSize is about how much memory a file takes beside its bytes.
const fileSize = 120

// size is about how much memory s takes, in bytes.
func (s *files) size() int {
	if s == nil {
		return 0
	}
	return s.bytes + fileSize*s.count
}

func (s *files) len() int {
	if s == nil {
		return 0
	}
	return s.count
}

// sorted are measurements in the order of their names.
func sorted(list iter.Seq[file]) []imaappraise.Measurement {
	out := []imaappraise.Measurement{}
	for f := range list {
		out = append(out, f.measurement())
	}
	slices.SortFunc(out, func(a, b imaappraise.Measurement) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.Digest, b.Digest)
	})
	return out
}
