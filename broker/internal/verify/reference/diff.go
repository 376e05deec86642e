package reference

import (
	"fmt"
	"maps"
	"slices"

	"github.com/countersign/countersign/attestors/evidence"
	ima "github.com/countersign/countersign/attestors/ima/appraise"
)

// Diff says in words how one set became another.
func Diff(was, is Content) (diffs []string) {
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	a, b := was.Boot, is.Boot
	switch {
	case a == nil && b != nil:
		say("boot facts are demanded now")
	case a != nil && b == nil:
		say("boot facts are demanded no more")
	case a != nil:
		diffs = append(diffs, diffBoot(a, b)...)
	}
	for _, i := range slices.Sorted(maps.Keys(union(was.PCRs, is.PCRs))) {
		switch old, has := was.PCRs[i]; {
		case !has:
			say("PCR %d is demanded now: %s", i, is.PCRs[i])
		default:
			if now, still := is.PCRs[i]; !still {
				say("PCR %d is demanded no more", i)
			} else if now != old {
				say("PCR %d went from %s to %s", i, old, now)
			}
		}
	}
	return append(diffs, diffIMA(was.IMA, is.IMA)...)
}

func union[V any](a, b map[int]V) map[int]V {
	all := maps.Clone(a)
	if all == nil {
		all = map[int]V{}
	}
	maps.Copy(all, b)
	return all
}

func diffBoot(a, b *Boot) (diffs []string) {
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	if text := func(p *bool) string {
		if p == nil {
			return "not demanded"
		}
		return onOff(*p)
	}; text(a.SecureBoot) != text(b.SecureBoot) {
		say("Secure Boot went from %s to %s", text(a.SecureBoot), text(b.SecureBoot))
	}
	if a.SecureBootMode != b.SecureBootMode {
		say("Secure Boot's mode went from %q to %q", a.SecureBootMode, b.SecureBootMode)
	}
	for _, name := range learned {
		diffs = append(diffs, digests("Secure Boot's "+name, a.Databases[name], b.Databases[name])...)
	}
	diffs = append(diffs, digests("authorities that verified images", a.Authorities, b.Authorities)...)
	diffs = append(diffs, digests("boot images", a.Images, b.Images)...)
	diffs = append(diffs, digests("files that the boot loader read", a.Files, b.Files)...)
	diffs = append(diffs, digests("machine owner's key lists", a.MOK, b.MOK)...)
	for _, pcr := range extended {
		what := fmt.Sprintf("what is measured into PCR %d", pcr)
		was, had := a.Extended[pcr]
		now, has := b.Extended[pcr]
		diffs = append(append(diffs, demand(what, had, has)...), changes(what, was, now)...)
	}
	diffs = append(diffs, demand("kernel command lines", len(a.KernelCommandLines) > 0, len(b.KernelCommandLines) > 0)...)
	gone, came := without(a.KernelCommandLines, b.KernelCommandLines), without(b.KernelCommandLines, a.KernelCommandLines)
	for _, line := range came {
		if len(gone) == 0 {
			say("kernel command line %s is new", printable(line))
			continue
		}
		old := nearest(gone, line)
		gone = without(gone, []string{old})
		say("kernel command line %s", words(old, line))
	}
	for _, line := range gone {
		say("kernel command line %s is gone", printable(line))
	}
	return diffs
}

// demand says where a list came to demand something, or came to demand nothing: a
// set that lost the last of its images isn't stricter than it was.
func demand(what string, was, is bool) []string {
	switch {
	case !was && is:
		return []string{what + ": demanded now"}
	case was && !is:
		return []string{what + ": demanded no more"}
	}
	return nil
}

// digests says how a list changed that demands nothing when it is empty.
func digests(what string, a, b []evidence.Digest) []string {
	return append(demand(what, len(a) > 0, len(b) > 0), changes(what, a, b)...)
}

func changes(what string, a, b []evidence.Digest) (diffs []string) {
	for _, d := range without(b, a) {
		diffs = append(diffs, fmt.Sprintf("%s gained %s", what, d))
	}
	for _, d := range without(a, b) {
		diffs = append(diffs, fmt.Sprintf("%s lost %s", what, d))
	}
	return diffs
}

// without is what of list isn't in other.
func without[T comparable](list, other []T) (rest []T) {
	for _, v := range list {
		if !slices.Contains(other, v) {
			rest = append(rest, v)
		}
	}
	return rest
}

func diffIMA(a, b *ima.Policy) (diffs []string) {
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	switch {
	case a == nil && b == nil:
		return nil
	case a == nil:
		return []string{"measured files are demanded now"}
	case b == nil:
		return []string{"measured files are demanded no more"}
	}
	was, is := byPath(a), byPath(b)
	for _, path := range slices.Sorted(maps.Keys(is)) {
		old, known := was[path]
		for _, d := range without(is[path], old) {
			if known {
				say("%s gained %s", printable(path), d)
			} else {
				say("%s is new, with %s", printable(path), d)
			}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(was)) {
		now, still := is[path]
		if !still {
			say("%s is gone", printable(path))
			continue
		}
		for _, d := range without(was[path], now) {
			say("%s lost %s", printable(path), d)
		}
	}
	for _, glob := range without(b.Exclude, a.Exclude) {
		say("%s is excluded now", printable(glob))
	}
	for _, glob := range without(a.Exclude, b.Exclude) {
		say("%s is excluded no more", printable(glob))
	}
	if n, m := len(without(b.Keys, a.Keys)), len(without(a.Keys, b.Keys)); n+m > 0 {
		say("signing keys: %d new, %d gone", n, m)
	}
	if a.Mode != b.Mode {
		say("files' mode went from %q to %q", a.Mode, b.Mode)
	}
	if a.Files != b.Files {
		say("files that are held went from %q to %q", a.Files, b.Files)
	}
	if a.Violations != b.Violations {
		say("violations went from %q to %q", a.Violations, b.Violations)
	}
	return diffs
}

func byPath(p *ima.Policy) map[string][]string {
	out := map[string][]string{}
	for _, a := range p.Allow {
		out[a.Path] = append(out[a.Path], a.Digests...)
	}
	return out
}
