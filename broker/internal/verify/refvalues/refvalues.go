// Package refvalues is what operators said that evidence is held against: the
// versions of reference sets that are in force, maintenance, and releases. It
// reads them from the store and compiles them once, until one of them changes
// or ends.
//
// It trusts the store. It promises that what it hands out is whole: a set that
// can't be read is an error, never a set that demands less.
package refvalues

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/broker/internal/verify/reference"
)

// A Book is safe for concurrent use.
type Book struct{ edition store.Cache[*edition] }

// An edition holds for one generation of what operators said.
type edition struct {
	mu    sync.Mutex
	pages map[string]page // guarded by mu; by the name of the reference set
}

// A page is one set's basis, and when something of it ends.
type page struct {
	basis appraise.Basis
	from  time.Time
	until time.Time // zero: nothing ends
}

// New makes an empty book.
func New() *Book {
	return &Book{store.Cache[*edition]{Topic: store.References, Read: func(*store.Tx) (*edition, error) {
		return &edition{pages: map[string]page{}}, nil
	}}}
}

// For is what a host of the set has to match; an empty name is no set, and
// releases alone.
func (b *Book) For(tx *store.Tx, set string, now time.Time) (appraise.Basis, error) {
	e, err := b.edition.In(tx)
	if err != nil {
		return appraise.Basis{}, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if p, ok := e.pages[set]; ok && !now.Before(p.from) && (p.until.IsZero() || now.Before(p.until)) {
		return p.basis, nil
	}
	p := page{from: now}
	if err := p.read(tx, set, now); err != nil {
		return appraise.Basis{}, err
	}
	e.pages[set] = p
	return p.basis, nil
}

// ends notes that the page is to be read again then.
func (p *page) ends(at time.Time) {
	if !at.IsZero() && at.After(p.from) && (p.until.IsZero() || at.Before(p.until)) {
		p.until = at
	}
}

func (p *page) read(tx *store.Tx, set string, now time.Time) error {
	expected, rules, err := p.releases(tx, now)
	if err != nil || set == "" {
		return err
	}
	versions, err := inventory.References(tx, set)
	if err != nil {
		return err
	}
	maintenance, err := inventory.Maintenance(tx, set)
	if err != nil {
		return err
	}
	r := &appraise.Reference{Name: set, Expected: expected, Lenient: now.Before(maintenance)}
	p.ends(maintenance)
	rules = append(rules, fmt.Sprintf("%s lenient=%v", set, r.Lenient))
	for _, v := range versions {
		p.ends(v.Ends)
		if v.State(now) != inventory.Approved {
			continue
		}
		content, err := reference.Parse(v.Content)
		if err != nil {
			return fmt.Errorf("reference set %s version %d: %w", set, v.Version, err)
		}
		one := appraise.Version{Content: content}
		if content.IMA != nil {
			if one.Files, err = content.IMA.Compile(); err != nil {
				return fmt.Errorf("reference set %s version %d: %w", set, v.Version, err)
			}
		}
		r.Versions = append(r.Versions, one)
		rules = append(rules, fmt.Sprint(v.Version))
	}
	r.Rules = strings.Join(rules, " ")
	p.basis.Reference = r
	return nil
}

func (p *page) releases(tx *store.Tx, now time.Time) (appraise.Expected, []string, error) {
	list, err := inventory.Releases(tx)
	if err != nil {
		return nil, nil, err
	}
	expected := appraise.Expected{}
	names := map[inventory.ReleaseFile][]string{}
	var rules []string
	for _, r := range list {
		p.ends(r.Ends)
		if !r.Ends.IsZero() && !now.Before(r.Ends) {
			continue
		}
		rules = append(rules, fmt.Sprintf("%s/%d", r.Name, r.Version))
		for _, f := range r.Files {
			f.Path = reference.Merged(f.Path)
			expected.Add(f.Path, f.Digest)
			if !slices.Contains(names[f], r.Name) {
				names[f] = append(names[f], r.Name)
			}
		}
	}
	p.basis.Releases = func(path, digest string) []string {
		return names[inventory.ReleaseFile{Path: reference.Merged(path), Digest: digest}]
	}
	return expected, rules, nil
}
