package admin

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/reference"
)

// LearnReference takes what a host has shown as the next version of a set, a
// draft: facts of its boot and the files that it measured, or, without an event
// log, raw values of PCR 0–7. PCRs that are named are taken raw beside them.
func (d *Desk) LearnReference(ctx context.Context, a Actor, name, host string, pcrs []int) (r inventory.Reference, err error) {
	if !plainName(name) {
		return r, invalid("reference name %q: 1 to 64 letters, digits, and . @ _ -", name)
	}
	told := &event.Reference{As: event.ReferenceLearned, Name: name, PCRs: pcrs}
	err = d.act(ctx, a, Operator, store.Any(store.References), told, func(tx *store.Tx, rec *event.Record) error {
		h, err := inventory.Find(tx, host)
		if err != nil {
			return err
		}
		rec.Host = h.ID
		if h.State != inventory.Trusted {
			return invalid("host %s is %s: it is learned from only while it is trusted", h.ID, h.State)
		}
		var content reference.Content
		known := d.Logs.Get(h.ID, h.StepUps)
		if known == nil {
			return invalid("host %s has not proven itself since this broker started; it does so by itself, then learn from it", h.ID)
		}
		switch {
		case known.BootFacts() != nil:
			content = reference.Learn(known.BootFacts(), h.PCRs, pcrs, known.Measured())
		case len(pcrs) == 0:
			pcrs = []int{0, 1, 2, 3, 4, 5, 6, 7}
			fallthrough
		default:
			content = reference.Learn(nil, h.PCRs, pcrs, known.Measured())
		}
		if content.IMA != nil && known.Violations() > 0 {
			content.IMA.Violations = "ignore" // or the set would not even hold for this host
		}
		for _, i := range pcrs {
			if _, ok := h.PCRs[i]; !ok {
				return invalid("host %s quotes no PCR %d; it has %v", h.ID, i, slices.Sorted(maps.Keys(h.PCRs)))
			}
		}
		r = inventory.Reference{Name: name, LearnedFrom: h.ID, Created: d.Now()}
		if r.Content, err = json.Marshal(content); err != nil {
			return err
		}
		// What can't be read again would fail every host that it is for.
		if _, err := reference.Parse(r.Content); err != nil {
			return invalid("what host %s measured makes no set: %v; narrow IMA's policy, or write the set with globs and add it with -f", h.ID, err)
		}
		r, err = inventory.AddReference(tx, r)
		told.Version, told.SHA256 = r.Version, evidence.Sum(r.Content).String()
		return err
	})
	return r, err
}

// AddReference takes a content that was written by hand, or learned from a
// record, as the next version of a set, a draft.
func (d *Desk) AddReference(ctx context.Context, a Actor, name string, content []byte) (r inventory.Reference, err error) {
	if !plainName(name) {
		return r, invalid("reference name %q: 1 to 64 letters, digits, and . @ _ -", name)
	}
	parsed, err := reference.Parse(content)
	if err != nil {
		return r, invalid("%v", err)
	}
	told := &event.Reference{As: event.ReferenceAdded, Name: name}
	err = d.act(ctx, a, Operator, store.Any(store.References), told, func(tx *store.Tx, _ *event.Record) error {
		r = inventory.Reference{Name: name, Created: d.Now()}
		if r.Content, err = json.Marshal(parsed); err != nil {
			return err
		}
		r, err = inventory.AddReference(tx, r)
		told.Version, told.SHA256 = r.Version, evidence.Sum(r.Content).String()
		return err
	})
	return r, err
}

// ApproveReference puts a version in force, 0 for the newest; older ones end
// at olderEnd. The host that it was learned from matches the set from then on,
// where it has no other.
func (d *Desk) ApproveReference(ctx context.Context, a Actor, name string, version int64, olderEnd time.Time) (r inventory.Reference, err error) {
	now := d.Now()
	if olderEnd.Before(now) {
		olderEnd = now
	}
	told := &event.Reference{As: event.ReferenceApproved, Name: name, Version: version, OlderEnd: olderEnd}
	err = d.act(ctx, a, Operator, store.Any(store.References), told, func(tx *store.Tx, rec *event.Record) error {
		if r, err = inventory.ApproveReference(tx, name, version, now, olderEnd); err != nil {
			return err
		}
		told.Version, told.SHA256 = r.Version, evidence.Sum(r.Content).String()
		if r.LearnedFrom == "" {
			return nil
		}
		h, err := inventory.Get(tx, r.LearnedFrom)
		if err != nil || h.Reference != "" || h.State == inventory.Removed {
			return err
		}
		rec.Host = h.ID
		h.Reference = name
		return errors.Join(tx.Also(store.Host(h.ID)), inventory.Save(tx, h))
	})
	return r, err
}

// References lists a page of the versions of sets.
func (d *Desk) References(ctx context.Context, a Actor, f inventory.ReferenceFilter) (list []inventory.Reference, more bool, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, false, err
	}
	err = d.Store.Report(ctx, func(tx *store.Tx) error {
		list, more, err = inventory.ReferencePage(tx, f)
		return err
	})
	return list, more, err
}

// longestMaintenance bounds how long files are let be.
const longestMaintenance = 7 * 24 * time.Hour

// Maintain lets be, until then, files that a set doesn't allow. What isn't
// allowed at its end fails its host.
func (d *Desk) Maintain(ctx context.Context, a Actor, name string, until time.Time) error {
	if until.After(d.Now().Add(longestMaintenance)) {
		return invalid("maintenance lasts a week at most")
	}
	err := d.act(ctx, a, Operator, store.Any(store.References), event.Reference{As: event.ReferenceMaintenance, Name: name, Until: until}, func(tx *store.Tx, _ *event.Record) error {
		if _, err := inventory.Versions(tx, name); err != nil {
			return err
		}
		return inventory.Maintain(tx, name, until)
	})
	return err
}

// inForce fails unless a version of the set is approved: a host would match
// nothing.
func inForce(tx *store.Tx, name string, now time.Time) error {
	list, err := inventory.Versions(tx, name)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(r inventory.Reference) bool { return r.State(now) == inventory.Approved }) {
		return invalid("no version of reference set %s is in force; `countersign reference approve %s` puts the newest", name, name)
	}
	return nil
}

// mostReleaseFiles bounds a release.
const mostReleaseFiles = 100_000

// AddRelease expects files that a build announced; older versions of the name
// end at olderEnd.
func (d *Desk) AddRelease(ctx context.Context, a Actor, r inventory.Release, olderEnd time.Time) (inventory.Release, error) {
	now := d.Now()
	if !plainName(r.Name) {
		return r, invalid("release name %q: 1 to 64 letters, digits, and . @ _ -", r.Name)
	}
	if len(r.Files) == 0 || len(r.Files) > mostReleaseFiles {
		return r, invalid("a release of %d files; 1 to %d are taken", len(r.Files), mostReleaseFiles)
	}
	policy := imaappraise.Policy{}
	for _, f := range r.Files {
		if len(f.Path) == 0 || f.Path[0] != '/' || len(f.Path) > 4096 {
			return r, invalid("release %s: %q is no absolute path", r.Name, f.Path)
		}
		policy.Allow = append(policy.Allow, imaappraise.Allowed{Path: "/", Digests: []string{f.Digest}})
	}
	if _, err := policy.Compile(); err != nil { // which knows what digests look like
		return r, invalid("release %s: %v", r.Name, err)
	}
	if olderEnd.Before(now) {
		olderEnd = now
	}
	r.Added = now
	told := &event.Release{Name: r.Name, Files: len(r.Files), Source: r.Source, OlderEnd: olderEnd}
	err := d.act(ctx, a, Operator, store.Any(store.References), told, func(tx *store.Tx, _ *event.Record) (err error) {
		if r, err = inventory.AddRelease(tx, r, olderEnd); err != nil {
			return err
		}
		files, err := json.Marshal(r.Files)
		told.Version, told.SHA256 = r.Version, evidence.Sum(files).String()
		return err
	})
	return r, err
}

// Releases lists the versions of one name, or of all, with how many files each has.
func (d *Desk) Releases(ctx context.Context, a Actor, name string) (list []inventory.ReleaseSize, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, err
	}
	err = d.Store.Report(ctx, func(tx *store.Tx) error {
		list, err = inventory.ReleaseSizes(tx, name)
		return err
	})
	return list, err
}
