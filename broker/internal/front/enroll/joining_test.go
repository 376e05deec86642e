package enroll

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

func TestHostname(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "web-1.example.org": "web-1.example.org", "Web_2": "Web_2",
		"web\n1": "web1", "a b/c\"<d>": "abcd", "wéb\u202e": "wb", "日本": "", "\xff\x00a\x7f": "a",
		strings.Repeat("a", 65): strings.Repeat("a", 64), strings.Repeat("é", 70) + "b": "b",
	} {
		if got := hostname(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// softAK is an attestation key that no TPM has.
func softAK(t *testing.T) *tpmappraise.AK {
	t.Helper()
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	public := check.Must(tpm.WithKey(check.Must(tpm.AKTemplate(tpm.P256))(t), key.Public()))(t)
	return check.Must(tpmappraise.ParseAK(tpm2.Marshal(public)))(t)
}

func spki(t *testing.T) []byte {
	t.Helper()
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	return check.Must(x509.MarshalPKIXPublicKey(key.Public()))(t)
}

// What becomes of a host whose keys are verified, by what the inventory has of it.
func TestJoining(t *testing.T) {
	ca := check.Must(pki.Create(t.TempDir(), pki.HostCA, "hosts", []byte("test password"), noon))(t)
	ak, otherAK, tls, otherTLS := softAK(t), softAK(t), spki(t), spki(t)
	ek, secondEK := evidence.Sum([]byte("ek")), evidence.Sum([]byte("ek 2"))
	counters := tpmappraise.Counters{ResetCount: 5, RestartCount: 2, Clock: 1000}
	earlier := tpmappraise.Counters{ResetCount: 5, RestartCount: 2, Clock: 999}
	silent := noon.Add(7 * time.Minute)
	// known is a host that joined with the first keys, in a state.
	known := func(state inventory.State, edit ...func(*inventory.Host)) *inventory.Host {
		h := &inventory.Host{ID: "host", Name: "web-1", State: state, Reason: "as before", Admitted: state != inventory.Pending, Tier: "known", Created: noon,
			EKs: []evidence.Digest{ek}, AKPublic: ak.Encoded(), TLSKey: evidence.Sum(tls), Counters: &counters, LastProved: noon.Add(-time.Hour), SilentAt: silent}
		for _, e := range edit {
			e(h)
		}
		return h
	}
	reenrolling := func(h *inventory.Host) { h.Reenrolling = true }
	withSet := func(h *inventory.Host) { h.Reference = "web" }
	neverJoined := func(h *inventory.Host) {
		h.AKPublic, h.TLSKey, h.Counters, h.SilentAt, h.Reason = nil, evidence.Digest{}, nil, time.Time{}, ""
	}
	lost := func(h *inventory.Host) { h.Reason = "the laptop is lost" }
	waiting := func(h *inventory.Host) { h.Admitted = false }
	asked := func(h *inventory.Host) { h.Reason = wantsReenrol }

	const (
		firstAK = iota
		secondAK
	)
	for name, c := range map[string]struct {
		host                        *inventory.Host
		ak                          int
		otherTLS, certified, roots  bool
		token                       string // "good", "set" for one with a reference set, or what isn't one
		back                        bool   // the TPM's counters
		overtaken                   bool   // by a proof with higher counters
		byAnother                   bool   // it shows an EK that the inventory doesn't have
		full                        bool   // no place for one more that waits
		want                        error
		kind                        event.Kind
		state                       inventory.State
		reason, tier                string
		waits, certificate, revoked bool
		keeps                       bool // the keys that the inventory has
		silent                      time.Time
	}{
		"new":                                        {kind: event.HostPending, state: inventory.Pending, tier: "known", waits: true},
		"new, certified":                             {certified: true, roots: true, kind: event.HostPending, state: inventory.Pending, tier: "certified", waits: true},
		"new, with roots":                            {roots: true, want: ErrUncertified},
		"new, and full":                              {full: true, want: ErrPendingFull},
		"new, with a token":                          {token: "good", full: true, roots: true, kind: event.HostAdmitted, state: inventory.Trusted, tier: "known", certificate: true, silent: noon.Add(firstProof)},
		"new, by a token with a set":                 {token: "set", kind: event.HostAdmitted, state: inventory.Stale, reason: "joined; not proven since", tier: "known", certificate: true, silent: noon.Add(firstProof)},
		"new, with no token at all":                  {token: "bad", want: inventory.ErrToken},
		"waits":                                      {host: known(inventory.Pending), full: true, roots: true, state: inventory.Pending, reason: "as before", tier: "known", waits: true, silent: silent},
		"waits, comes with a token":                  {host: known(inventory.Pending), token: "good", kind: event.HostAdmitted, state: inventory.Trusted, tier: "known", certificate: true, silent: silent},
		"waits, counters back":                       {host: known(inventory.Pending), back: true, kind: event.HostDuplicate, state: inventory.Quarantined, reason: "went back", tier: "known", waits: true, revoked: true, keeps: true},
		"registered":                                 {host: known(inventory.Registered, neverJoined), roots: true, full: true, kind: event.HostJoined, state: inventory.Trusted, tier: "known", certificate: true, silent: noon.Add(firstProof)},
		"registered, with a set":                     {host: known(inventory.Registered, neverJoined, withSet), kind: event.HostJoined, state: inventory.Stale, reason: "joined; not", tier: "known", certificate: true, silent: noon.Add(firstProof)},
		"removed":                                    {host: known(inventory.Removed), want: ErrRemoved},
		"removed, with a token":                      {host: known(inventory.Removed), token: "good", want: ErrRemoved},
		"trusted":                                    {host: known(inventory.Trusted), kind: event.HostJoined, state: inventory.Trusted, reason: "as before", tier: "known", certificate: true, silent: silent},
		"trusted, certified now":                     {host: known(inventory.Trusted), certified: true, kind: event.HostJoined, state: inventory.Trusted, reason: "as before", tier: "certified", certificate: true, silent: silent},
		"trusted, counters back":                     {host: known(inventory.Trusted), back: true, kind: event.HostDuplicate, state: inventory.Quarantined, reason: "a copy or a reverted snapshot", tier: "known", waits: true, revoked: true, keeps: true},
		"stale":                                      {host: known(inventory.Stale), kind: event.HostJoined, state: inventory.Stale, reason: "joined; not proven since", tier: "known", certificate: true, silent: silent},
		"failed":                                     {host: known(inventory.Failed), kind: event.HostJoined, state: inventory.Failed, reason: "as before", tier: "known", certificate: true, silent: silent},
		"another AK":                                 {host: known(inventory.Trusted), ak: secondAK, kind: event.HostReenrolWanted, state: inventory.Trusted, reason: wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"another AK, counters back":                  {host: known(inventory.Trusted), ak: secondAK, back: true, kind: event.HostReenrolWanted, state: inventory.Trusted, reason: wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"another AK, with a token":                   {host: known(inventory.Trusted), ak: secondAK, token: "good", kind: event.HostReenrolWanted, state: inventory.Trusted, reason: wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"another AK, again":                          {host: known(inventory.Trusted, asked), ak: secondAK, state: inventory.Trusted, reason: wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"another TLS key":                            {host: known(inventory.Stale), otherTLS: true, kind: event.HostReenrolWanted, state: inventory.Stale, reason: wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"quarantined":                                {host: known(inventory.Quarantined), want: ErrQuarantined},
		"quarantined, with a token":                  {host: known(inventory.Quarantined), token: "good", want: ErrQuarantined},
		"quarantined, another key":                   {host: known(inventory.Quarantined), otherTLS: true, kind: event.HostReenrolWanted, state: inventory.Quarantined, reason: "as before; " + wantsReenrol, tier: "known", waits: true, keeps: true, silent: silent},
		"trusted, overtaken":                         {host: known(inventory.Trusted), back: true, overtaken: true, kind: event.HostJoined, state: inventory.Trusted, reason: "as before", tier: "known", certificate: true, keeps: true, silent: silent},
		"trusted, by another EK":                     {host: known(inventory.Trusted), byAnother: true, certified: true, roots: true, kind: event.HostJoined, state: inventory.Trusted, reason: "as before", tier: "certified", certificate: true, silent: silent},
		"removed, by another EK":                     {host: known(inventory.Removed), byAnother: true, certified: true, roots: true, token: "good", want: ErrRemoved},
		"removed, with its AK alone":                 {host: known(inventory.Removed), byAnother: true, otherTLS: true, certified: true, roots: true, want: ErrRemoved},
		"removed, its TLS key alone":                 {host: known(inventory.Removed), byAnother: true, ak: secondAK, certified: true, roots: true, want: ErrRemoved},
		"removed, its EK alone":                      {host: known(inventory.Removed), ak: secondAK, otherTLS: true, token: "good", want: ErrRemoved},
		"quarantined, by another EK":                 {host: known(inventory.Quarantined), byAnother: true, certified: true, want: ErrQuarantined},
		"quarantined before it joined":               {host: known(inventory.Quarantined, neverJoined, lost), want: ErrQuarantined},
		"quarantined before it joined, with a set":   {host: known(inventory.Quarantined, neverJoined, withSet, lost), want: ErrQuarantined},
		"quarantined before it joined, with a token": {host: known(inventory.Quarantined, neverJoined, lost), token: "good", want: ErrQuarantined},
		"quarantined while it waits":                 {host: known(inventory.Quarantined, waiting), want: ErrQuarantined},
		"quarantined while it waits, with a token":   {host: known(inventory.Quarantined, waiting), token: "good", want: ErrQuarantined},
		"quarantined while it waits, another key":    {host: known(inventory.Quarantined, waiting), ak: secondAK, otherTLS: true, want: ErrQuarantined},
		"quarantined while it waits, counters back":  {host: known(inventory.Quarantined, waiting), back: true, want: ErrQuarantined},
		"waits, with other keys":                     {host: known(inventory.Pending), ak: secondAK, kind: event.HostJoined, state: inventory.Pending, reason: "as before", tier: "known", waits: true, silent: silent},
		"reenrolling, another AK":                    {host: known(inventory.Failed, reenrolling), ak: secondAK, otherTLS: true, kind: event.HostJoined, state: inventory.Trusted, tier: "known", certificate: true, revoked: true, silent: silent},
		"reenrolling, with a set":                    {host: known(inventory.Registered, reenrolling, withSet), ak: secondAK, kind: event.HostJoined, state: inventory.Stale, reason: "joined; not", tier: "known", certificate: true, revoked: true, silent: silent},
		"reenrolling, counters back":                 {host: known(inventory.Stale, reenrolling), back: true, kind: event.HostJoined, state: inventory.Trusted, tier: "known", certificate: true, revoked: true, silent: silent},
		"reenrolling, quarantined":                   {host: known(inventory.Quarantined, reenrolling), want: ErrQuarantined},
		"reenrolling, failed, a set":                 {host: known(inventory.Failed, reenrolling, withSet), ak: secondAK, kind: event.HostJoined, state: inventory.Stale, reason: "joined; not", tier: "known", certificate: true, revoked: true, silent: silent},
		"reenrolling, trusted, a set":                {host: known(inventory.Trusted, reenrolling, withSet), ak: secondAK, kind: event.HostJoined, state: inventory.Stale, reason: "joined; not", tier: "known", certificate: true, revoked: true, silent: silent},
	} {
		t.Run(name, func(t *testing.T) {
			s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
			t.Cleanup(func() { check.Nil(t, s.Close()) })
			d := &Desk{Store: s, CA: ca, MostPending: 10, Now: func() time.Time { return noon }, Wall: func() time.Time { return noon }}
			if c.full {
				d.MostPending = 0
			}
			if c.roots {
				d.Roots = x509.NewCertPool()
			}
			token := c.token
			check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
				if c.host != nil {
					check.Nil(t, inventory.Save(tx, *c.host))
				}
				for kind, set := range map[string]string{"good": "", "set": "web"} {
					made := check.Must(inventory.CreateToken(tx, inventory.JoinToken{Name: "named", Labels: map[string]string{"a": "b"}, Reference: set, Expires: noon.Add(time.Hour)}))(t)
					if c.token == kind {
						token = string(made.Reveal())
					}
				}
				return nil
			}))

			j := &joining{Desk: d, Joining: &challenge.Joining{EKs: []challenge.Endorsement{{EK: &tpmappraise.EK{Hash: ek, Certified: c.certified}}}, AK: ak, Token: token, Name: "itself"},
				conn: &challenge.Conn{KeySPKI: tls, Address: "10.0.0.9"}, quoted: &tpmappraise.Verified{PCRs: map[int]evidence.Digest{0: ek}, Counters: counters}, now: noon, wall: noon, requestID: "request-1"}
			if c.byAnother {
				j.EKs[0].Hash = secondEK
			}
			if c.ak == secondAK {
				j.AK = otherAK
			} else if c.host != nil {
				j.Seen = c.host.Counters
			}
			if c.overtaken {
				j.Seen = &earlier
			}
			if c.otherTLS {
				j.conn.KeySPKI = otherTLS
			}
			if c.back {
				j.quoted.Counters = earlier
			}
			j.spki = j.conn.KeySPKI
			err := s.Update(t.Context(), store.Any(store.Hosts, store.Tokens), j.enrol)

			var kinds []event.Kind
			var hosts []inventory.Host
			check.Nil(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
				for _, h := range check.Must(inventory.ByName(tx, inventory.Cursor{}, 10))(t) {
					hosts = append(hosts, check.Must(inventory.Get(tx, h.ID))(t))
				}
				return audit.Read(tx, 0, 10, func(_ int64, body []byte) error {
					r, err := event.Parse(body)
					kinds = append(kinds, r.Kind)
					if len(hosts) != 1 || r.Actor != "host:"+hosts[0].ID || r.Host != hosts[0].ID || r.Request != "request-1" {
						t.Errorf("recorded: %+v", r)
					}
					return err
				})
			}))
			want := []event.Kind{}
			if c.kind != "" {
				want = append(want, c.kind)
			}
			if !slices.Equal(kinds, want) {
				t.Errorf("recorded %v, want %v", kinds, want)
			}
			if c.want != nil {
				left := 0
				if c.host != nil {
					left = 1
				}
				if !errors.Is(err, c.want) || len(hosts) != left || left == 1 && (hosts[0].State != c.host.State || hosts[0].Reason != c.host.Reason || !bytes.Equal(hosts[0].AKPublic, c.host.AKPublic)) {
					t.Errorf("%v, want %v; hosts %+v", err, c.want, hosts)
				}
				return
			}
			if err != nil || len(hosts) != 1 {
				t.Fatalf("%v, %d hosts", err, len(hosts))
			}

			h := hosts[0]
			if h.State != c.state || !strings.Contains(h.Reason, c.reason) || c.reason == "" && h.Reason != "" || h.Tier != c.tier {
				t.Errorf("%s of tier %s: %q; want %s of tier %s: %q", h.State, h.Tier, h.Reason, c.state, c.tier, c.reason)
			}
			if j.result.Pending != c.waits || (len(j.result.Certificate) > 0) != c.certificate || (j.revoke == h.ID) != c.revoked || (j.revoke != "") != c.revoked {
				t.Errorf("waits %v, a certificate of %d bytes, revokes of %q", j.result.Pending, len(j.result.Certificate), j.revoke)
			}
			if got := max(0, h.SilentAt.UnixMilli()); got != max(0, c.silent.UnixMilli()) {
				t.Errorf("silent at %s, want %s", h.SilentAt, c.silent)
			}
			if !slices.Contains(h.EKs, j.EKs[0].Hash) {
				t.Errorf("the EK that it showed isn't recorded: %v", h.EKs)
			}
			if c.overtaken && *h.Counters != counters {
				t.Errorf("its counters are %+v", h.Counters)
			}
			if same := bytes.Equal(h.AKPublic, j.AK.Encoded()) && h.TLSKey == j.conn.Key() && *h.Counters == j.quoted.Counters && h.Address == "10.0.0.9" && len(h.PCRs) == 1; same == c.keeps {
				t.Errorf("its keys, counters and address are the new ones: %v", same)
			}
			if h.Reenrolling {
				t.Error("the next one may bring another key, too")
			}
			if c.token == "good" && c.kind == event.HostAdmitted && (h.Name != "named" || fmt.Sprint(h.Labels) != "map[a:b]") || c.host == nil && c.token == "" && h.Name != "itself" {
				t.Errorf("it is called %s, with %v", h.Name, h.Labels)
			}
			if c.certificate {
				if leaf := check.Must(x509.ParseCertificate(j.result.Certificate))(t); leaf.Subject.CommonName != h.ID || !bytes.Equal(leaf.RawSubjectPublicKeyInfo, j.spki) || !leaf.NotAfter.Equal(noon.Add(CertificateLifetime)) {
					t.Errorf("certified: %s until %s", leaf.Subject, leaf.NotAfter)
				}
			}
		})
	}
}
