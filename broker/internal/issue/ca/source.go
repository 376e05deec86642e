package ca

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/hclread"
)

// Kind describes X.509 certificates of the embedded CA.
var Kind = issue.Kind{
	Kind: policy.Kind{Name: "certificate", Arguments: []string{"dns", "ips"}, Decode: decode},
	Open: open,
}

// A Source is a scope's certificate block.
type Source struct {
	DNS []string
	IPs []string
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func decode(b hclread.Block, o policy.Options) policy.Source {
	r := reserved(o.Reserved)
	return &Source{DNS: b.Texts("dns", r.dns), IPs: b.Texts("ips", r.ip)}
}

// reserved lists names and addresses that no certificate may contain.
type reserved []string

func (r reserved) has(name string) bool {
	return slices.ContainsFunc(r, func(own string) bool {
		return strings.EqualFold(strings.TrimSuffix(own, "."), name)
	})
}

func (r reserved) dns(name string) (why, meant string) {
	labels := strings.Split(name, ".")
	last := labels[len(labels)-1]
	switch {
	case len(name) > 253 || slices.ContainsFunc(labels, func(l string) bool { return !dnsLabel.MatchString(l) }):
		why = "is no DNS name in lowercase; wildcards are not issued"
	case strings.Trim(last, "0123456789") == "":
		why = "looks like an address; those belong into ips"
	case last == "localhost" || name == "localhost.localdomain":
		why = "means another host on each host"
	case r.has(name):
		why = "is the broker's own name"
	}
	return why, ""
}

func (r reserved) ip(s string) (why, meant string) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil || addr.Zone() != "" || addr.Is4In6():
		why = "is no IP address"
	case addr.String() != s:
		return "is not the address's usual form", addr.String()
	case addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLinkLocalUnicast():
		why = "is no host's own address"
	case r.has(s):
		why = "is the broker's own address"
	}
	return why, ""
}
