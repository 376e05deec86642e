package ledger

import (
	"bufio"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"net/netip"
	"slices"
	"time"
)

// A Field is a name of an entry by which it is found.
type Field byte

// Fields that are indexed.
const (
	ByID         Field = iota
	ByDBUsername       // by AccountKey
	ByVaultLease
	BySerial // of an X.509 certificate
	BySSHKeyID
	BySSHSerial
	BySecret
	byProgram // of one scope on one host: its newest entry, from which the others hang
	fields
)

func (f Field) of(e *Entry) string {
	switch f {
	case ByID:
		return e.ID
	case ByDBUsername:
		return AccountKey(e.Names.DBUsername)
	case ByVaultLease:
		return e.Names.VaultLease
	case BySerial:
		return e.Names.CertificateSerial
	case BySSHKeyID:
		return e.Names.SSHKeyID
	case BySSHSerial:
		return e.Names.SSHSerial
	case BySecret:
		return e.Names.SecretHMAC
	case byProgram:
		return e.Host + "\x00" + e.Scope
	}
	return ""
}

// An Index finds entries of a ledger file. The entries stay in the file: in memory
// is where each lies, 8 bytes for each of its names, and what is asked of hosts
// and programs as a whole. It is not safe for concurrent use.
type Index struct {
	file  io.ReaderAt
	seed  maphash.Seed
	lines places // by entry, in the order in which they came
	names [256]shard
	// many has the names that more than one entry bears, as static accounts do.
	many map[nameKey][]uint32

	// recent has entries of names in many that were asked for: an account that is read
	// every hour has thousands.
	recent map[nameKey][]Entry

	hosts map[string]*host
	line  []byte
}

// maxRecent bounds the names that recent has.
const maxRecent = 64

// places grow by pages, so that growing copies nothing.
type places struct {
	pages []*[pageSize]place
	n     int
}

const pageSize = 4096

func (p *places) add(at place) {
	if p.n%pageSize == 0 {
		p.pages = append(p.pages, new([pageSize]place))
	}
	p.n++
	*p.at(uint32(p.n - 1)) = at
}

func (p *places) at(n uint32) *place { return &p.pages[n/pageSize][n%pageSize] }

// A shard has the names whose hashes begin with one byte: a table with open
// addressing, three quarters full at the most. Each grows by itself, so that no
// moment needs twice the memory.
type shard struct {
	table []slot
	used  int
}

type place struct {
	offset int64
	size   int32
	before uint32 // counted from 1: an entry of the same host and scope
}

// A slot is 32 bits of a name's hash and, counted from 1, the entry that bears it;
// shared marks that there are more, in many.
type slot struct {
	hash  uint32
	entry uint32
}

const shared = math.MaxUint32

type nameKey struct {
	field Field
	name  string
}

type host struct {
	addresses []address
}

// An address was a host's for as long as credentials issued to it there lived.
type address struct {
	prefix      netip.Prefix
	first, last time.Time // last zero: without end
}

// NewIndex makes an index over file, whose lines Add names.
func NewIndex(file io.ReaderAt) *Index {
	x := &Index{file: file, seed: maphash.MakeSeed(), many: map[nameKey][]uint32{}, recent: map[nameKey][]Entry{}, hosts: map[string]*host{}}
	for i := range x.names {
		x.names[i].table = make([]slot, 8)
	}
	return x
}

// Load adds every line of the file, which is size bytes long. The error names the
// line that it couldn't read.
func (x *Index) Load(size int64) error {
	r := bufio.NewReaderSize(io.NewSectionReader(x.file, 0, size), MaxLine+1)
	offset, number := int64(0), 0
	for {
		line, err := r.ReadSlice('\n')
		number++
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("ledger, line %d: longer than %d bytes", number, MaxLine)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("ledger: %w", err)
		}
		if len(line) > 1 || len(line) == 1 && line[0] != '\n' {
			e, perr := Parse(line)
			if perr == nil {
				perr = x.Add(offset, len(line), e)
			}
			if perr != nil {
				return fmt.Errorf("ledger, line %d: %w", number, perr)
			}
		}
		offset += int64(len(line))
		if err != nil {
			return nil
		}
	}
}

// Len is how many entries there are.
func (x *Index) Len() int { return x.lines.n }

// Size is how many bytes of the file its entries take, without lines that later ones
// took the place of.
func (x *Index) Size() (n int64) {
	for i := range x.lines.n {
		n += int64(x.lines.at(uint32(i)).size)
	}
	return n
}

// Add indexes e, which lies at offset in the file. An entry whose id is known takes
// the place of the earlier one.
func (x *Index) Add(offset int64, size int, e Entry) error {
	known, err := x.find(ByID, e.ID)
	if err != nil {
		return err
	}
	n := uint32(x.lines.n)
	if len(known) > 0 {
		n = known[0]
		before, err := x.entry(n)
		if err != nil {
			return err
		}
		if before.Host != e.Host || before.Scope != e.Scope {
			return fmt.Errorf("entry %s: it was of host %s and scope %s", e.ID, before.Host, before.Scope)
		}
		line := x.lines.at(n)
		line.offset, line.size = offset, int32(size)
	} else {
		x.lines.add(place{offset: offset, size: int32(size)})
		if e.Kind != KindCanary { // a canary is no program's
			at, err := x.slot(byProgram, byProgram.of(&e))
			if err != nil {
				return err
			}
			x.lines.at(n).before = at.entry
			x.put(at, byProgram, byProgram.of(&e), n)
		}
	}
	for f := ByID; f < byProgram; f++ {
		delete(x.recent, nameKey{f, f.of(&e)})
		if err := x.bear(f, f.of(&e), n); err != nil {
			return err
		}
	}
	x.addresses(e)
	return nil
}

func (x *Index) addresses(e Entry) {
	h := x.hosts[e.Host]
	if h == nil {
		h = &host{}
		x.hosts[e.Host] = h
	}
	end := e.End()
next:
	for _, p := range e.Prefixes() {
		for i := range h.addresses {
			a := &h.addresses[i]
			if a.prefix != p {
				continue
			}
			if e.Issued.Before(a.first) {
				a.first = e.Issued
			}
			if end.IsZero() || !a.last.IsZero() && end.After(a.last) {
				a.last = end
			}
			continue next
		}
		h.addresses = append(h.addresses, address{prefix: p, first: e.Issued, last: end})
	}
}

// At says whether a was an address of the host at t, give or take skew.
func (x *Index) At(hostID string, a netip.Addr, t time.Time, skew time.Duration) bool {
	h := x.hosts[hostID]
	if h == nil {
		return false
	}
	return slices.ContainsFunc(h.addresses, func(at address) bool {
		return at.prefix.Contains(a) && !t.Before(at.first.Add(-skew)) && (at.last.IsZero() || !t.After(at.last.Add(skew)))
	})
}

// Find returns the entries that bear name, in no order.
func (x *Index) Find(f Field, name string) ([]Entry, error) {
	found, err := x.find(f, name)
	if err != nil {
		return nil, err
	}
	key := nameKey{f, name}
	if list, ok := x.recent[key]; ok {
		return slices.Clone(list), nil
	}
	list, err := x.entries(f, name, found)
	if err == nil && len(found) > 1 {
		if len(x.recent) >= maxRecent {
			clear(x.recent)
		}
		x.recent[key] = slices.Clone(list)
	}
	return list, err
}

// maxProgram bounds what is read at once of one program's entries, or one name's.
const maxProgram = 200

// Program returns the entries of one scope on one host, by the time of issue: the 200
// that came last.
func (x *Index) Program(hostID, scope string) ([]Entry, error) {
	at, err := x.slot(byProgram, hostID+"\x00"+scope)
	if err != nil {
		return nil, err
	}
	return x.chain(at.entry, maxProgram)
}

// History is Program, without its bound.
func (x *Index) History(hostID, scope string) ([]Entry, error) {
	at, err := x.slot(byProgram, hostID+"\x00"+scope)
	if err != nil {
		return nil, err
	}
	return x.chain(at.entry, math.MaxInt)
}

// chain reads an entry, counted from 1, and those of its program before it, so many.
func (x *Index) chain(n uint32, most int) ([]Entry, error) {
	var list []Entry
	for ; n != 0 && len(list) < most; n = x.lines.at(n - 1).before {
		e, err := x.entry(n - 1)
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	slices.SortStableFunc(list, func(a, b Entry) int { return a.Issued.Compare(b.Issued) })
	return list, nil
}

// Programs calls f with all entries of a program, as Program has them, for each scope on
// each host. Canaries are
// no program's.
func (x *Index) Programs(f func([]Entry) error) error {
	followed := make([]bool, x.lines.n+1)
	for n := range x.lines.n {
		followed[x.lines.at(uint32(n)).before] = true
	}
	for n := range x.lines.n {
		if followed[n+1] {
			continue
		}
		list, err := x.chain(uint32(n+1), math.MaxInt)
		if err == nil && list[0].Kind != KindCanary {
			err = f(list)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Each calls f with every entry until it returns an error.
func (x *Index) Each(f func(Entry) error) error {
	for n := range x.lines.n {
		e, err := x.entry(uint32(n))
		if err == nil {
			err = f(e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Shared calls f for every name that several entries bear.
func (x *Index) Shared(f func(Field, []Entry) error) error {
	for key, list := range x.many {
		entries, err := x.entries(key.field, key.name, list)
		if err == nil && len(entries) > 1 {
			err = f(key.field, entries)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entries reads those of the list that still bear the name: the 200 that came last, where
// there are more.
func (x *Index) entries(f Field, name string, list []uint32) ([]Entry, error) {
	list = list[max(0, len(list)-maxProgram):]
	out := make([]Entry, 0, len(list))
	for _, n := range list {
		e, err := x.entry(n)
		if err != nil {
			return nil, err
		}
		if f.of(&e) == name {
			out = append(out, e)
		}
	}
	return out, nil
}

func (x *Index) entry(n uint32) (Entry, error) {
	at := x.lines.at(n)
	if cap(x.line) < int(at.size) {
		x.line = make([]byte, at.size)
	}
	line := x.line[:at.size]
	if _, err := x.file.ReadAt(line, at.offset); err != nil {
		return Entry{}, fmt.Errorf("ledger: %w", err)
	}
	return Parse(line)
}

func (x *Index) hash(f Field, name string) uint32 {
	var h maphash.Hash
	h.SetSeed(x.seed)
	_ = h.WriteByte(byte(f))
	_, _ = h.WriteString(name)
	return uint32(h.Sum64())
}

// find returns the entries that bear a name.
func (x *Index) find(f Field, name string) ([]uint32, error) {
	if name == "" {
		return nil, nil
	}
	at, err := x.slot(f, name)
	if err != nil || at.entry == 0 {
		return nil, err
	}
	if at.entry == shared {
		return x.many[nameKey{f, name}], nil
	}
	return []uint32{at.entry - 1}, nil
}

// slot is where a name is, or would be; it is good until put is called.
func (x *Index) slot(f Field, name string) (*slot, error) {
	h := x.hash(f, name)
	table := x.names[h>>24].table
	for at := home(h, table); ; at = (at + 1) % len(table) {
		s := &table[at]
		if s.entry == 0 {
			return s, nil
		}
		if s.hash != h {
			continue
		}
		if s.entry == shared {
			if _, ok := x.many[nameKey{f, name}]; ok {
				return s, nil
			}
			continue
		}
		// A hash is no name: the entry itself tells.
		e, err := x.entry(s.entry - 1)
		if err != nil {
			return nil, err
		}
		if f.of(&e) == name {
			return s, nil
		}
	}
}

// home is where in a shard's table the search for a hash begins.
func home(hash uint32, table []slot) int {
	return int(uint64(hash&0xffffff) * uint64(len(table)) >> 24)
}

// bear enters that entry n bears a name.
func (x *Index) bear(f Field, name string, n uint32) error {
	if name == "" {
		return nil
	}
	s, err := x.slot(f, name)
	if err != nil {
		return err
	}
	key := nameKey{f, name}
	switch s.entry {
	case 0:
		x.put(s, f, name, n)
	case shared:
		if i, ok := slices.BinarySearch(x.many[key], n); !ok {
			x.many[key] = slices.Insert(x.many[key], i, n)
		}
	case n + 1:
	default:
		x.many[key] = []uint32{min(s.entry-1, n), max(s.entry-1, n)}
		s.entry = shared
	}
	return nil
}

// put has a slot name entry n.
func (x *Index) put(s *slot, f Field, name string, n uint32) {
	h := x.hash(f, name)
	of := &x.names[h>>24]
	if s.entry == 0 {
		of.used++
	}
	*s = slot{hash: h, entry: n + 1}
	if of.used*4 <= len(of.table)*3 {
		return
	}
	grown := make([]slot, len(of.table)+len(of.table)/2)
	for _, s := range of.table {
		if s.entry == 0 {
			continue
		}
		at := home(s.hash, grown)
		for grown[at].entry != 0 {
			at = (at + 1) % len(grown)
		}
		grown[at] = s
	}
	of.table = grown
}
