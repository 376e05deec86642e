package appraise

import (
	"iter"
	"slices"
	"strings"
	"unique"

	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
)

// A file is one proven measurement. Fleets share most names and digests.
type file struct{ name, digest, signature unique.Handle[string] }

func fileOf(m imaappraise.Measurement) file {
	return file{unique.Make(m.Name), unique.Make(m.Digest), unique.Make(string(m.Signature))}
}

func (f file) measurement() imaappraise.Measurement {
	m := imaappraise.Measurement{Index: -1, Name: f.name.Value(), Digest: f.digest.Value()}
	if s := f.signature.Value(); s != "" {
		m.Signature = []byte(s)
	}
	return m
}

// files is a set that never changes: what a request adds lies on what was there
// before, which other requests may be reading. nil is empty.
type files struct {
	below          *files
	depth, count   int // of all layers
	here           map[file]struct{}
	names, digests map[unique.Handle[string]]struct{}
}

// maxDepth is how many layers a look-up walks at most.
const maxDepth = 16

// with is s and what it lacks of more, which is returned too.
func (s *files) with(more iter.Seq[file]) (*files, []file) {
	layer := &files{below: s, depth: 1, here: map[file]struct{}{}, names: map[unique.Handle[string]]struct{}{}, digests: map[unique.Handle[string]]struct{}{}}
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
	if s != nil {
		layer.depth, layer.count = s.depth+1, s.count+len(layer.here)
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
	one := &files{depth: 1, count: s.count, here: make(map[file]struct{}, s.count), names: map[unique.Handle[string]]struct{}{}, digests: map[unique.Handle[string]]struct{}{}}
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

func (s *files) hasDigest(digest string) bool {
	h := unique.Make(digest)
	for ; s != nil; s = s.below {
		if _, ok := s.digests[h]; ok {
			return true
		}
	}
	return false
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
