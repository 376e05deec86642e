package faults_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A full disk on the host's side: a rotation that can't be written keeps the
// old file with its credential, and the next one goes through.
func TestHostsDiskFull(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 40*time.Minute)
	check.Nil(t, s.broker.ApplyScopes(ctx, fmt.Sprintf(`
scope "sleeper" {
  reprove = "5s"
  host    { labels = { role = "billing" } }
  process { exe = %q }
  vault {
    path    = "database/creds/billing-ro"
    ttl     = "1m"
    overlap = "20s"
  }
}`, s.sleeper)))
	volume := filepath.Join(s.dir, "volume")
	check.Nil(t, os.Mkdir(volume, 0o755))
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", volume).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", volume).Run() })
	file := filepath.Join(volume, "credential")
	agent := s.newAgent(t, file)
	s.sleep(t)
	check.Nil(t, agent.Start(ctx))
	filler := filepath.Join(volume, "filler")
	for round := range *rounds {
		inForce(t, s, file)
		_ = exec.Command("sh", "-c", "cat /dev/zero > "+filler).Run()
		before := whole(t, file)
		said := len(check.Must(os.ReadFile(agent.Log()))(t))
		check.Eventually(t, 60*time.Second, "the agent says that the disk is full", func() (bool, string) {
			log := check.Must(os.ReadFile(agent.Log()))(t)[said:]
			return strings.Contains(string(log), "no space left"), string(log)
		})
		if after := whole(t, file); after != before {
			t.Errorf("round %d: the file went from %q to %q on a full disk", round, before, after)
		}
		check.Nil(t, os.Remove(filler))
		check.Eventually(t, 60*time.Second, "the next rotation is written", func() (bool, string) {
			after := whole(t, file)
			return after != "" && after != before, after
		})
		s.invariants(t)
	}
}

// A broker that was away for longer than every grace takes nothing when it is
// back, and neither does one whose store came back from a backup.
func TestBrokerAway(t *testing.T) {
	for _, restored := range []bool{false, true} {
		t.Run(fmt.Sprintf("restored=%v", restored), func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{})
			ctx := check.Within(t, 40*time.Minute)
			check.Nil(t, s.broker.ApplyScopes(ctx, strings.ReplaceAll(fmt.Sprintf(scopes, s.sleeper), `grace   = "1h"`, `grace   = "3s"`)))
			h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
			other := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
			for _, one := range []*lab.SoftHost{h, other} {
				check.Must(one.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
			}
			store := filepath.Join(s.broker.State(), "store.db")
			backup := filepath.Join(s.dir, "backup.db")
			var held []byte // the newest checkpoint the host has seen
			for round := range *rounds {
				check.Nil(t, s.broker.Stop())
				check.Nil(t, os.WriteFile(backup, check.Must(os.ReadFile(store))(t), 0o600))
				check.Nil(t, s.broker.Start(ctx))
				session := check.Must(h.Dial(ctx))(t)
				program := check.Must(h.Program(softExe, "billing", 100+round))(t)
				r := check.Must(h.Issue(ctx, session, h.IssueBody("soft", program)))(t)
				proof := &v1.LeaseProof{LeaseId: r.GetLeaseId(), Scope: "soft", Program: program, Ticket: r.GetTicket()}
				held = check.Must(h.Prove(ctx, session, held, proof))(t).GetCheckpoint().GetNote()
				_ = session.Close()
				check.Nil(t, s.broker.Stop())
				time.Sleep(5 * time.Second)
				if restored {
					check.Nil(t, os.Remove(store))
					for _, ending := range []string{"-wal", "-shm"} {
						_ = os.Remove(store + ending)
					}
					out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "broker", "restore", backup, "-c", s.broker.Config()).CombinedOutput()
					if err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				}
				check.Nil(t, s.broker.Start(ctx))
				// Another host speaks first: the silent one is not to blame.
				session = check.Must(other.Dial(ctx))(t)
				check.Must(other.Prove(ctx, session, nil))(t)
				_ = session.Close()
				session = check.Must(h.Dial(ctx))(t)
				got := check.Must(h.Prove(ctx, session, held, proof))(t)
				if o := got.GetLeases()[0]; o.GetOutcome() != "live" {
					t.Errorf("round %d: the lease is %s: %s", round, o.GetOutcome(), o.GetReason())
				}
				held = got.GetCheckpoint().GetNote()
				_ = session.Close()
				s.invariants(t)
				_, err := s.broker.CLI(ctx, "lease", "revoke", r.GetLeaseId())
				check.Nil(t, err)
			}
		})
	}
}
