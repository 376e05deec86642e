package appraise

import (
	"iter"
	"slices"
	"strings"
	"unique"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
)

// A file is one proven measurement. Fleets share most names, so that those are
// kept once; a digest is as small as what would point to it.
type file struct {
	name      unique.Handle[string]
	digest    digest
	signature unique.Handle[string] // empty: none
	other     bool                  // measured into another PCR than IMA's own
}

// A digest is of SHA-256, or another one's text.
type digest struct {
	sha256 evidence.Digest
	other  unique.Handle[string]
}

const plain = "sha256:"

func digestOf(text string) digest {
	if sum, ok := strings.CutPrefix(text, plain); ok {
		if d, err := evidence.ParseDigest(sum); err == nil {
			return digest{sha256: d}
		}
	}
	return digest{other: unique.Make(text)}
}

func (d digest) text() string {
	if d.other != (unique.Handle[string]{}) {
		return d.other.Value()
	}
	return plain + d.sha256.String()
}

func fileOf(m imaappraise.Measurement) file {
	return file{unique.Make(m.Name), digestOf(m.Digest), unique.Make(string(m.Signature)), m.PCR != ima.DefaultPCR}
}

func (f file) measurement() imaappraise.Measurement {
	m := imaappraise.Measurement{Index: -1, PCR: ima.DefaultPCR, Name: f.name.Value(), Digest: f.digest.text()}
	if f.other {
		m.PCR = otherPCR
	}
	if s := f.signature.Value(); s != "" {
		m.Signature = []byte(s)
	}
	return m
}

// otherPCR stands for those that aren't IMA's own.
const otherPCR = -1

// files is a set that never changes: what a request adds lies on what was there
// before, which other requests may be reading. nil is empty.
type files struct {
	below        *files
	depth, count int // of all layers
	bytes        int // of names, and of what else is as long as a host makes it, in all layers
	here         map[file]struct{}
	names        map[unique.Handle[string]]struct{}
	digests      map[digest]struct{}
}

// maxDepth is how many layers a look-up walks at most.
const maxDepth = 16

// with is s and what it lacks of more, which is returned too.
func (s *files) with(more iter.Seq[file]) (*files, []file) {
	layer := &files{below: s, depth: 1, here: map[file]struct{}{}, names: map[unique.Handle[string]]struct{}{}, digests: map[digest]struct{}{}}
	var fresh []file
	for f := range more {
		if !s.has(f) && layer.add(f) {
			fresh = append(fresh, f)
		}
	}
	if len(fresh) == 0 {
		return s, nil
	}
	layer.count = len(layer.here)
	for _, f := range fresh {
		layer.bytes += len(f.name.Value()) + len(f.signature.Value())
	}
	if s != nil {
		layer.depth, layer.count, layer.bytes = s.depth+1, s.count+layer.count, s.bytes+layer.bytes
	}
	if layer.depth > maxDepth {
		layer = layer.flat()
	}
	return layer, fresh
}

func (s *files) add(f file) bool {
	if _, old := s.here[f]; old {
		return false
	}
	s.here[f], s.names[f.name], s.digests[f.digest] = struct{}{}, struct{}{}, struct{}{}
	return true
}

func (s *files) flat() *files {
	one := &files{depth: 1, count: s.count, bytes: s.bytes, here: make(map[file]struct{}, s.count), names: map[unique.Handle[string]]struct{}{}, digests: map[digest]struct{}{}}
	for f := range s.all() {
		one.add(f)
	}
	return one
}

func (s *files) all() iter.Seq[file] {
	return func(yield func(file) bool) {
		for ; s != nil; s = s.below {
			for f := range s.here {
				if !yield(f) {
					return
				}
			}
		}
	}
}

func (s *files) has(f file) bool {
	for ; s != nil; s = s.below {
		if _, ok := s.here[f]; ok {
			return true
		}
	}
	return false
}

func (s *files) hasName(name string) bool {
	h := unique.Make(name)
	for ; s != nil; s = s.below {
		if _, ok := s.names[h]; ok {
			return true
		}
	}
	return false
}

func (s *files) hasDigest(text string) bool {
	d := digestOf(text)
	for ; s != nil; s = s.below {
		if _, ok := s.digests[d]; ok {
			return true
		}
	}
	return false
}

// size is about how much memory s takes, in bytes, if no other host shares it.
func (s *files) size() int {
	if s == nil {
		return 0
	}
	return s.bytes + 400*s.count
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
