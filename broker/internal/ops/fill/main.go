// Command fill writes into a broker's store what a year of use leaves there, with
// the broker's own packages: hosts, live and ended leases with their audit
// records, decisions and findings. It is for measurements and tests alone.
//
// The broker must have been initialised, its scopes applied and its process
// stopped. What fill writes passes `countersign fsck`.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math/big"
	"os"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api/detector"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// What a year of use leaves, at scale 1.
const (
	hostCount    = 10_000
	liveOfHost   = 10
	endedOfHost  = 50
	findingCount = 50_000
	scopeCount   = 200
	roleCount    = 20 // each role has scopeCount/roleCount scopes
	batch        = 20 // hosts in a transaction
)

func main() {
	file := flag.String("store", "", "the broker's store.db")
	scale := flag.Float64("scale", 1, "how much of a year's use")
	retire := flag.Int("retire", 0, "do nothing but make so many live leases due now, as replaced ones at the end of their overlap")
	scopes := flag.Bool("scopes", false, "print the scopes and do nothing else")
	flag.Parse()
	if *scopes {
		fmt.Print(Scopes())
		return
	}
	if err := run(*file, *scale, *retire); err != nil {
		fmt.Fprintln(os.Stderr, "fill:", err)
		os.Exit(1)
	}
}

// Scopes are the scopes of the filled store, in HCL.
func Scopes() string {
	out := ""
	for i := range scopeCount {
		out += fmt.Sprintf(`
scope "app-%03d" {
  reprove = "5m"
  grace   = "24h"
  host { labels = { role = "role-%02d" } }
  process {
    user = "app"
    exe  = "/opt/app-%03d/bin/app"
  }
  certificate {
    dns     = ["app-%03d.example.com"]
    ttl     = "24h"
    overlap = "10m"
  }
}
`, i, i%roleCount, i, i)
	}
	return out
}

// A filler writes; n makes what it writes differ.
type filler struct {
	store *store.Store
	set   *policy.Set
	now   time.Time
	n     uint64
}

func run(file string, scale float64, retire int) (err error) {
	s, err := store.Open(file)
	if err != nil {
		return err
	}
	defer func() {
		if closed := s.Close(); err == nil {
			err = closed
		}
	}()
	set, err := policy.Parse([]policy.File{{Name: "scopes.hcl", Content: []byte(Scopes())}}, policy.Options{})
	if err != nil {
		return err
	}
	set.Version = 1
	f := &filler{store: s, set: set, now: time.Now().UTC().Truncate(time.Millisecond)}
	ctx := context.Background()
	if retire > 0 {
		return f.retire(ctx, retire)
	}
	hosts := int(hostCount * scale)
	for first := 0; first < hosts; first += batch {
		if err := s.Update(ctx, store.Everything(), func(tx *store.Tx) error {
			for i := first; i < min(first+batch, hosts); i++ {
				if err := f.host(tx, i); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		if first%1000 == 0 {
			fmt.Fprintf(os.Stderr, "fill: %d of %d hosts\n", first, hosts)
		}
	}
	return f.findings(ctx, int(findingCount*scale), hosts)
}

// digest is a new one.
func (f *filler) digest() evidence.Digest {
	f.n++
	return sha256.Sum256(binary.BigEndian.AppendUint64(nil, f.n))
}

func hostID(i int) string { return fmt.Sprintf("host%012d", i) }

func (f *filler) host(tx *store.Tx, i int) error {
	facts := f.facts(i)
	text, err := json.Marshal(facts)
	if err != nil {
		return err
	}
	h := inventory.Host{ID: hostID(i), Name: fmt.Sprintf("web-%05d", i), State: inventory.Trusted, Admitted: true, Tier: facts.Host.Tier, Labels: facts.Host.Labels,
		Address: facts.Host.Address, EKs: []evidence.Digest{f.digest()}, AKPublic: make([]byte, 88), TLSKey: f.digest(), PCRs: facts.Host.PCRs, Facts: text,
		Created: f.now.AddDate(-1, 0, 0), LastProved: f.now, SilentAt: f.now.Add(24 * time.Hour)}
	if _, err := audit.Append(tx, event.Record{Time: h.Created, Actor: "host:" + h.ID, Host: h.ID}, event.Enrolment{As: event.HostAdmitted, Name: h.Name,
		State: string(h.State), Tier: h.Tier, EKs: h.EKs, AK: evidence.Sum(h.AKPublic), TLSKey: h.TLSKey, Address: h.Address, Labels: h.Labels}); err != nil {
		return err
	}
	if err := inventory.Save(tx, h); err != nil {
		return err
	}
	for k := range liveOfHost + endedOfHost {
		scope := fmt.Sprintf("app-%03d", i%roleCount+k%(scopeCount/roleCount)*roleCount)
		if err := f.lease(tx, facts, scope, i, k); err != nil {
			return err
		}
	}
	return nil
}

// facts are those of a Debian machine with Secure Boot.
func (f *filler) facts(i int) appraise.Facts {
	on, verified := true, appraise.IMAVerified
	line := "BOOT_IMAGE=/boot/vmlinuz-6.1.0-28-amd64 root=UUID=" + hex.EncodeToString(make([]byte, 16)) + " ro quiet ima_policy=tcb ima_hash=sha256 audit=1"
	firmware := "edk2-2022.11-6+deb12u1"
	log := &appraise.EventLog{SecureBootMode: "deployed", FirmwareVersion: &firmware, KernelCommandLine: &line, KernelCommandLines: []string{line},
		PCRs: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14}, LinesComplete: true}
	for range 3 {
		log.Images = append(log.Images, f.digest().String())
		log.Authorities = append(log.Authorities, f.digest().String())
	}
	for range 12 {
		log.Files = append(log.Files, f.digest().String())
	}
	pcrs := map[int]evidence.Digest{}
	for pcr := range 16 {
		pcrs[pcr] = f.digest()
	}
	return appraise.Facts{At: f.now, Host: appraise.Host{ID: hostID(i), Name: fmt.Sprintf("web-%05d", i), Labels: map[string]string{"role": fmt.Sprintf("role-%02d", i%roleCount), "site": "fra1"},
		Tier: appraise.TierCertified, Address: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), Boot: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), OS: "linux",
		PCRs: pcrs, SecureBoot: &on, EventLog: log, IMA: &verified, List: &appraise.List{Proven: 2100}}}
}

// endedOver is the time in which the ended leases ended: within what is kept of them.
const endedOver = 80 * 24 * time.Hour

// lease writes the k-th of host i: the first are live, the others ended.
func (f *filler) lease(tx *store.Tx, facts appraise.Facts, scopeName string, i, k int) error {
	scope := f.set.Scope(scopeName)
	program := process.Program{Boot: facts.Host.Boot, PID: 1000 + k, Start: uint64(100_000 + k), User: "app",
		Executables: process.OneFile(scope.Process.Exe, sha256.Sum256([]byte(scopeName))),
		Linux:       &process.Linux{UID: 990, GID: 990, Cgroup: "/system.slice/" + scopeName + ".service", Unit: scopeName + ".service", Invocation: hex.EncodeToString(f.digestBytes(16))}}
	subject, err := program.Encode()
	if err != nil {
		return err
	}
	facts.Program = &program
	recorded := facts.Recorded()
	recorded.Program = nil
	text, err := json.Marshal(recorded)
	if err != nil {
		return err
	}
	recorded.Program = &program
	told, err := json.Marshal(recorded)
	if err != nil {
		return err
	}
	issued := f.now.Add(-time.Hour)
	if k >= liveOfHost {
		issued = f.now.Add(-time.Duration(k-liveOfHost+2) * endedOver / endedOfHost)
	}
	g := journal.Intend(journal.Lease{ID: fmt.Sprintf("%s%04d", hostID(i), k), Host: facts.Host.ID, Scope: scopeName, Kind: scope.Kind, DeliveryID: hex.EncodeToString(f.digestBytes(8)),
		Instance: program.Instance().String(), Unit: program.Unit(), Boot: program.Boot, SHA256: program.Main().SHA256.String(), Subject: subject, Facts: text,
		Machine: journal.Machine{SecureBoot: facts.Host.SecureBoot, CommandLine: *facts.Host.EventLog.KernelCommandLine}, Policy: 1, Sources: []string{facts.Host.Address},
		TTL: scope.TTL, Overlap: scope.Overlap, Grace: scope.Grace}, issued)
	serial := new(big.Int).SetBytes(f.digestBytes(15)).String()
	g.Ref = fmt.Appendf(nil, `{"serial":%q}`, serial)
	g.Names = map[string]string{"certificate_serial": serial, "certificate_sha256": f.digest().String()}
	g.State, g.Acked, g.Settled, g.ProveBy = journal.Live, issued, true, f.now.Add(scope.Reprove)
	g.Expires = issued.Add(g.TTL)
	g.Due = g.Expires
	result := f.set.Evaluate(scopeName, facts, f.now)
	if result.Outcome != policy.Allowed {
		return fmt.Errorf("host %d is not allowed scope %s: %+v", i, scopeName, result)
	}
	if _, err := audit.Append(tx, event.Record{Time: issued, Actor: "host:" + g.Host, Host: g.Host, Scope: g.Scope, Lease: g.ID},
		event.Allowed{Decision: result.Event(), Facts: told, HostFacts: f.digest(), Names: g.Names}); err != nil {
		return err
	}
	if k >= liveOfHost {
		g.State, g.Reason, g.Ended, g.Due = journal.Gone, "replaced", g.Expires, time.Time{}
		if _, err := audit.Append(tx, event.Record{Time: g.Ended, Actor: "broker", Host: g.Host, Scope: g.Scope, Lease: g.ID},
			event.Outcome{As: event.CredentialEnded, State: string(g.State), Reason: g.Reason, Names: g.Names, Expires: g.Expires}); err != nil {
			return err
		}
	} else if err := decision(tx, g.Host, result, facts); err != nil {
		return err
	}
	return journal.Save(tx, g)
}

// retire makes n live leases due now.
func (f *filler) retire(ctx context.Context, n int) error {
	const page = 500
	at := journal.Filter{States: []journal.State{journal.Live}, Limit: page}
	for n > 0 {
		var list []journal.Lease
		if err := f.store.Update(ctx, store.Everything(), func(tx *store.Tx) (err error) {
			if list, err = journal.List(tx, at); err != nil {
				return err
			}
			for _, g := range list[:min(n, len(list))] {
				at.After = g.Cursor()
				g.State, g.Reason, g.Due = journal.Retiring, "replaced", f.now
				if err := journal.Save(tx, g); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		if len(list) == 0 {
			return fmt.Errorf("%d live leases too few", n)
		}
		n -= len(list)
	}
	return nil
}

func (f *filler) digestBytes(n int) []byte {
	d := f.digest()
	d[0] |= 1 // a serial is not zero
	return d[:n]
}

func decision(tx *store.Tx, host string, r policy.Result, facts appraise.Facts) error {
	result, err := json.Marshal(r)
	if err != nil {
		return err
	}
	text, err := json.Marshal(facts.Recorded())
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO decisions (host_id, scope, at, result, facts) VALUES (?, ?, ?, ?, ?)`, host, r.Scope, store.Millis(facts.At), string(result), string(text))
	return err
}

// findings writes n of them, of which one in ten is open.
func (f *filler) findings(ctx context.Context, n, hosts int) error {
	const page = 500
	for first := 0; first < n; first += page {
		if err := f.store.Update(ctx, store.Everything(), func(tx *store.Tx) error {
			for i := first; i < min(first+page, n); i++ {
				at := f.now.Add(-time.Duration(n-i) * 365 * 24 * time.Hour / time.Duration(n))
				r := findings.Finding{Detector: string(detector.UnmatchedLogin), Cause: fmt.Sprintf("cause-%d", i), Severity: "high", Host: hostID(i % max(hosts, 1)), Account: fmt.Sprintf("app_%d", i),
					Why: "the account is governed, and was not issued by the broker", First: at, Last: at, Count: 3,
					Evidence: []json.RawMessage{json.RawMessage(fmt.Sprintf(`{"time":%q,"kind":"login","account":"app_%d","from":"10.9.8.7","source":"billing-db","line":%d}`, at.Format(time.RFC3339), i, i))}}
				made, _, err := findings.Report(tx, r, f.now)
				if err != nil {
					return err
				}
				if _, err := audit.Append(tx, event.Record{Time: at, Actor: "operator:watch", Host: r.Host}, event.Finding{As: event.FindingOpened, ID: made.ID}); err != nil {
					return err
				}
				if i%10 != 0 {
					if _, err := audit.Append(tx, event.Record{Time: at, Actor: "operator:alice", Host: r.Host}, event.Finding{As: event.FindingClosed, ID: made.ID}); err != nil {
						return err
					}
					if _, err := findings.Close(tx, made.ID, "alice", "looked into", time.Time{}, f.now); err != nil {
						return err
					}
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}
