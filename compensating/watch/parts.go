package watch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"strings"

	"github.com/countersign/countersign/internal/durable"
)

// A partsFile keeps a state that changes a little at a time: named parts, each JSON.
//
// Its first line has all parts, each later line what changed at one moment. A line is
// appended and synced as one, so after a kill anywhere the file is the state of the last
// moment that was saved: a last line that isn't whole never counts. Once the changes are
// three times the parts, the file is written anew and takes the place of the old one.
type partsFile struct {
	path  string
	f     *os.File // nil: the next save writes the file anew
	size  int64    // of the file
	whole int64    // of its first line
	fold  int64    // below this size it isn't written anew
	seed  maphash.Seed
	round uint64
	known map[string]part
	wrote int64 // bytes, by all saves
}

// A part is what is known of one that is in the file.
type part struct {
	sum   uint64 // of its JSON
	round uint64 // of the save that had it last
}

// A change is one line of the file.
type change struct {
	Set  map[string]json.RawMessage `json:"set,omitempty"`
	Drop []string                   `json:"drop,omitempty"`
}

// foldFrom is the size below which a state isn't written anew.
const foldFrom = 1 << 20

func newPartsFile(path string) *partsFile {
	return &partsFile{path: path, fold: foldFrom, seed: maphash.MakeSeed(), known: map[string]part{}}
}

// load returns the parts; none where there is no file. The next save writes it anew.
func (p *partsFile) load() (map[string]json.RawMessage, error) {
	text, err := os.ReadFile(p.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}

	parts := map[string]json.RawMessage{}
	for number := 1; len(text) > 0; number++ {
		line, rest, whole := bytes.Cut(text, []byte{'\n'})
		text = rest
		var c change
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		err := d.Decode(&c)
		if number > 1 && len(text) == 0 && (!whole || err != nil) {
			break // it was being written
		}
		if number == 1 && err != nil && json.Valid(line) {
			return nil, errWhole
		}
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", p.path, number, err)
		}
		for key, value := range c.Set {
			parts[key] = value
		}
		for _, key := range c.Drop {
			delete(parts, key)
		}
	}
	return parts, nil
}

// A saving collects what changed since the last one: put takes a part, putFixed one that
// never changes under its key, and fail an error for which nothing is written.
type saving struct {
	*partsFile
	change
	err error
}

func (s *saving) fail(err error) { s.err = errors.Join(s.err, err) }

func (s *saving) putFixed(key string, value any) {
	if was, ok := s.known[key]; ok {
		was.round = s.round
		s.known[key] = was
		return
	}
	s.put(key, value)
}

func (s *saving) put(key string, value any) {
	text, made := value.(json.RawMessage)
	if !made {
		var err error
		if text, err = json.Marshal(value); err != nil {
			s.fail(err)
			return
		}
	}
	sum := maphash.Bytes(s.seed, text)
	if was, ok := s.known[key]; !ok || was.sum != sum {
		s.Set[key] = text
	}
	s.known[key] = part{sum, s.round}
}

// save writes what differs from the last save of all that parts puts.
func (p *partsFile) save(parts func(*saving)) error {
	if p.f != nil && p.size > max(p.fold, 4*p.whole) {
		p.close()
	}
	anew := p.f == nil
	if anew {
		clear(p.known)
	}
	p.round++
	s := &saving{partsFile: p, change: change{Set: map[string]json.RawMessage{}}}
	parts(s)
	for key, was := range p.known {
		if was.round != p.round {
			s.Drop = append(s.Drop, key)
			delete(p.known, key)
		}
	}
	if s.err == nil && !anew && len(s.Set) == 0 && len(s.Drop) == 0 {
		return nil
	}

	slices.Sort(s.Drop)
	line, err := json.Marshal(s.change)
	if err = errors.Join(s.err, err); err == nil {
		line = append(line, '\n')
		err = p.write(line, anew)
	}
	if err != nil {
		p.close() // half a line may stand there
	}
	return err
}

func (p *partsFile) write(line []byte, anew bool) error {
	p.wrote += int64(len(line))
	if !anew {
		p.size += int64(len(line))
		_, err := p.f.Write(line)
		if err == nil {
			err = p.f.Sync()
		}
		return err
	}

	if err := durable.Write(p.path, line); err != nil {
		return err
	}
	f, err := os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	p.f, p.size, p.whole = f, int64(len(line)), int64(len(line))
	return nil
}

func (p *partsFile) close() {
	if p.f != nil {
		_ = p.f.Close()
		p.f = nil
	}
}

// key is a part's name of several words, none of which can be taken for two.
func key(words ...string) string {
	var b strings.Builder
	for i, w := range words {
		if i > 0 {
			b.WriteByte('/')
		}
		_, _ = escape.WriteString(&b, w)
	}
	return b.String()
}

// words is the inverse of key.
func words(key string) []string {
	list := strings.Split(key, "/")
	for i, w := range list {
		list[i] = unescape.Replace(w)
	}
	return list
}

var escape, unescape = strings.NewReplacer("%", "%25", "/", "%2F"), strings.NewReplacer("%2F", "/", "%25", "%")

// smallPart is the size up to which a reader's state is one part.
const smallPart = 1 << 10

// putObject puts an object whose fields may be large objects, as a reader's sessions
// are: each member of those is a part by itself.
func (s *saving) putObject(text json.RawMessage, name ...string) {
	if len(text) <= smallPart {
		s.put(key(name...), text)
		return
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		s.fail(err)
		return
	}
	for field, value := range fields {
		if len(value) <= smallPart || value[0] != '{' {
			continue
		}
		var members map[string]json.RawMessage
		if err := json.Unmarshal(value, &members); err != nil {
			s.fail(err)
			return
		}
		for member, value := range members {
			s.put(key(append(slices.Clone(name), field, member)...), value)
		}
		delete(fields, field)
	}
	s.put(key(name...), fields)
}

// joinObject puts together what putObject made of an object: the part itself, and the
// members of its large fields.
func joinObject(small json.RawMessage, large map[string]map[string]json.RawMessage) (json.RawMessage, error) {
	if len(large) == 0 {
		return small, nil
	}
	fields := map[string]any{}
	var rest map[string]json.RawMessage
	if err := json.Unmarshal(small, &rest); err != nil {
		return nil, err
	}
	for field, value := range rest {
		fields[field] = value
	}
	for field, members := range large {
		fields[field] = members
	}
	return json.Marshal(fields)
}
