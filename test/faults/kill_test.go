package faults_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

const softExe = "/opt/billing/bin/billingd"

// The broker dies at each point between a challenge and an acknowledgement. A
// host that asks again is served, and nothing is left that nobody knows.
func TestBrokerKilled(t *testing.T) {
	for _, point := range []string{"issue.intended", "issue.issued", "issue.recorded", "lease.extended", "lease.revoked"} {
		t.Run(point, func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{})
			ctx := check.Within(t, 40*time.Minute)
			h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
			check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
			for round := range *rounds {
				mark := filepath.Join(s.dir, fmt.Sprintf("mark-%d", round))
				check.Nil(t, s.broker.Stop())
				check.Nil(t, s.broker.Start(ctx, "COUNTERSIGN_KILL_AT="+point, "COUNTERSIGN_KILL_MARK="+mark))
				session := check.Must(h.Dial(ctx))(t)
				body := h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 100+round))(t))
				r, err := h.Issue(ctx, session, body)
				if point == "lease.revoked" {
					check.Nil(t, err)
					_, _ = s.broker.CLI(ctx, "lease", "revoke", r.GetLeaseId())
				}
				_ = session.Close()
				select {
				case <-s.broker.Ended():
				case <-time.After(20 * time.Second):
					t.Fatalf("round %d: the broker lives: %s was not passed", round, point)
				}
				if said, err := os.ReadFile(mark); err != nil || string(said) != point {
					t.Fatalf("round %d: the failpoint was not hit: %q, %v", round, said, err)
				}
				check.Nil(t, s.broker.Start(ctx))
				again := check.Must(h.Dial(ctx))(t)
				check.Must(h.Issue(ctx, again, body))(t) // the same delivery, as an agent would
				_ = again.Close()
				check.Eventually(t, 30*time.Second, "one lease of this delivery is in force", func() (bool, string) {
					n, text := 0, ""
					for _, l := range s.leases(t) {
						text += l.ID + " " + l.State + " "
						if l.State == "live" {
							n++
						}
					}
					return n == round+1, text
				})
				s.invariants(t)
			}
		})
	}
}

// The agent dies at each step of a delivery. Started again it comes to a whole
// file whose credential lives, and leaves nothing beside it.
func TestAgentKilled(t *testing.T) {
	for _, point := range []string{"agent.issued", "agent.prepared", "agent.pending", "agent.swapped", "agent.acknowledged", "agent.saved", "agent.finished", "agent.withdrawn"} {
		t.Run(point, func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{})
			ctx := check.Within(t, 40*time.Minute)
			file := filepath.Join(s.dir, "credential")
			agent := s.newAgent(t, file)
			for round := range *rounds {
				mark := filepath.Join(s.dir, fmt.Sprintf("mark-%d", round))
				end := s.sleep(t)
				if err := agent.Start(ctx, "COUNTERSIGN_KILL_AT="+point, "COUNTERSIGN_KILL_MARK="+mark); err != nil {
					select {
					case <-agent.Ended(): // it came to its end before it was up
					default:
						t.Fatal(err)
					}
				}
				if point == "agent.withdrawn" {
					inForce(t, s, file)
					end()
				}
				select {
				case <-agent.Ended():
				case <-time.After(20 * time.Second):
					t.Fatalf("round %d: the agent lives: %s was not passed", round, point)
				}
				if said, err := os.ReadFile(mark); err != nil || string(said) != point {
					t.Fatalf("round %d: the failpoint was not hit: %q, %v", round, said, err)
				}
				whole(t, file)
				check.Nil(t, agent.Start(ctx))
				if point != "agent.withdrawn" {
					inForce(t, s, file)
					end()
				}
				check.Eventually(t, 30*time.Second, "the file and the leases are gone with the program", func() (bool, string) {
					entries := check.Must(filepath.Glob(filepath.Join(s.dir, "*credential*")))(t)
					hidden := check.Must(filepath.Glob(filepath.Join(s.dir, ".credential*")))(t)
					var working []string
					for _, l := range s.leases(t) {
						if l.State != "provisional" && l.State != "intended" {
							working = append(working, l.ID+" "+l.State)
						}
					}
					return len(entries)+len(hidden)+len(working) == 0, fmt.Sprint(entries, hidden, working)
				})
				check.Nil(t, agent.Stop())
				s.invariants(t)
			}
		})
	}
}

// whole fails on a file that is neither absent nor complete.
func whole(t *testing.T, file string) (content string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return ""
	}
	check.Nil(t, err)
	content = string(b)
	if !strings.HasPrefix(content, "user=v-") || !strings.HasSuffix(content, "\nend\n") {
		t.Errorf("half a file: %q", content)
	}
	return content
}

// inForce waits until the file's user is a live lease's.
func inForce(t *testing.T, s *site, file string) {
	t.Helper()
	check.Eventually(t, 40*time.Second, "a live credential stands in the file", func() (bool, string) {
		content := whole(t, file)
		for _, l := range s.leases(t, "--state", "live") {
			if user := l.Names["db_username"]; user != "" && strings.Contains(content, "user="+user+"\n") {
				return true, ""
			}
		}
		return false, content
	})
}

// A wall clock that jumps by an hour, either way, takes no credential: not
// while the programs run, and not over a restart of the agent.
func TestClockStepped(t *testing.T) {
	for _, seconds := range []int{3600, -3600} {
		t.Run(fmt.Sprint(seconds), func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{})
			ctx := check.Within(t, 10*time.Minute)
			clock := filepath.Join(s.dir, "clock")
			step := func(n int) { check.Nil(t, os.WriteFile(clock, fmt.Append(nil, n), 0o600)) }
			step(0)
			check.Nil(t, s.broker.Stop())
			check.Nil(t, s.broker.Start(ctx, "COUNTERSIGN_CLOCK_FILE="+clock))
			file := filepath.Join(s.dir, "credential")
			agent := s.newAgent(t, file)
			s.sleep(t)
			check.Nil(t, agent.Start(ctx, "COUNTERSIGN_CLOCK_FILE="+clock))
			inForce(t, s, file)
			before, lease := whole(t, file), s.leases(t)[0].ID
			same := func(when string) {
				t.Helper()
				if after := whole(t, file); after != before {
					t.Errorf("%s: the file changed from %q to %q", when, before, after)
				}
				if l := s.leases(t); len(l) != 1 || l[0].ID != lease || l[0].State != "live" {
					t.Errorf("%s: leases %+v, want %s live", when, l, lease)
				}
			}
			step(seconds)
			time.Sleep(12 * time.Second) // two proofs
			same("stepped")
			check.Nil(t, agent.Stop())
			check.Nil(t, agent.Start(ctx, "COUNTERSIGN_CLOCK_FILE="+clock))
			time.Sleep(6 * time.Second)
			same("after the agent's restart")
			check.Nil(t, s.broker.Stop())
			check.Nil(t, s.broker.Start(ctx, "COUNTERSIGN_CLOCK_FILE="+clock))
			proved := func() bool {
				var st struct{ Problem string }
				out, err := agent.CLI(ctx, "status", "-o", "json")
				return err == nil && json.Unmarshal(out, &st) == nil && st.Problem == ""
			}
			check.Eventually(t, 60*time.Second, "proven again", func() (bool, string) {
				text, _ := os.ReadFile(agent.Log())
				return proved(), string(text)
			})
			time.Sleep(6 * time.Second)
			same("after the broker's restart")
			s.invariants(t)
		})
	}
}

// ownDisk moves the broker's state folder onto a file system of its own, of so many MiB.
func (s *site) ownDisk(t *testing.T, mib int) (state string) {
	t.Helper()
	check.Nil(t, s.broker.Stop())
	state = s.broker.State()
	saved := state + ".saved"
	check.Nil(t, os.Rename(state, saved))
	check.Nil(t, os.Mkdir(state, 0o700))
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	run("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", mib), "tmpfs", state)
	t.Cleanup(func() {
		_ = s.broker.Stop()
		run("umount", "-l", state)
	})
	run("cp", "-a", saved+"/.", state)
	check.Nil(t, s.broker.Start(check.Within(t, time.Minute)))
	return state
}

// A disk that is nearly full: the broker warns, then issues nothing new while it
// proves and revokes, and with room again it issues on.
func TestDiskWatermarks(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 5*time.Minute)
	h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
	check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
	const size = 100
	state := s.ownDisk(t, size)
	session := check.Must(h.Dial(ctx))(t)
	defer func() { _ = session.Close() }()
	pid := 0
	issue := func() (*v1.IssueResponse, []byte, error) {
		pid++
		program := check.Must(h.Program(softExe, "billing", 1000+pid))(t)
		r, err := h.Issue(ctx, session, h.IssueBody("soft", program))
		return r, program, err
	}
	held, program, err := issue()
	check.Nil(t, err)
	ended, _, err := issue()
	check.Nil(t, err)

	filler := filepath.Join(state, "filler")
	status := func(want string) {
		t.Helper()
		check.Eventually(t, 20*time.Second, "the status says "+want, func() (bool, string) {
			out := string(check.Must(s.broker.CLI(ctx, "status"))(t))
			return strings.Contains(out, want), out
		})
	}
	leave := func(mib uint64) {
		t.Helper()
		var disk unix.Statfs_t
		check.Nil(t, unix.Statfs(state, &disk))
		f := check.Must(os.OpenFile(filler, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))(t)
		check.Must(f.Write(make([]byte, disk.Bavail*uint64(disk.Bsize)-mib<<20)))(t)
		check.Nil(t, f.Close())
	}
	leave(15)
	status("below 10 MiB the broker issues nothing new")
	if _, _, err := issue(); err != nil {
		t.Errorf("while it warns: %v", err)
	}
	leave(8)
	status("issues nothing new until there is more")
	if _, _, err := issue(); err == nil || api.FromConnect(err).Check != "disk" || api.FromConnect(err).Outcome != api.Fault {
		t.Errorf("on a full disk: %v", err)
	}
	r := check.Must(h.Prove(ctx, session, nil, &v1.LeaseProof{LeaseId: held.GetLeaseId(), Scope: "soft", Program: program, Ticket: held.GetTicket()},
		&v1.LeaseProof{LeaseId: ended.GetLeaseId(), Scope: "soft", Program: program, Ticket: ended.GetTicket()}))(t)
	if r.GetLeases()[0].GetOutcome() != "live" {
		t.Errorf("proven on a full disk: %v", r.GetLeases())
	}
	check.Must(s.broker.CLI(ctx, "lease", "revoke", ended.GetLeaseId()))(t)
	check.Eventually(t, 30*time.Second, "the revoked lease ends", func() (bool, string) {
		left := s.leases(t, "--host", h.ID)
		return len(left) == 2, fmt.Sprint(left)
	})
	check.Nil(t, os.Remove(filler))
	check.Eventually(t, 20*time.Second, "it issues again", func() (bool, string) {
		_, _, err := issue()
		return err == nil, fmt.Sprint(err)
	})
	s.invariants(t)
}

// A full disk under the broker's store: it stops rather than guess, nothing
// is issued without a record, and with room again it goes on.
func TestBrokersDiskFull(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 10*time.Minute)
	h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
	check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
	state := s.ownDisk(t, 2+*rounds) // the store grows with the rounds
	for round := range *rounds {
		session := check.Must(h.Dial(ctx))(t)
		check.Must(h.Issue(ctx, session, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 1000+round))(t))))(t)
		filler := filepath.Join(state, "filler")
		_ = exec.Command("sh", "-c", "cat /dev/zero > "+filler).Run()
		var refused error
		for i := range 200 {
			if _, refused = h.Issue(ctx, session, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 10_000+round*1000+i))(t))); refused != nil {
				break
			}
		}
		if refused == nil {
			t.Fatal("issued on with a full disk")
		}
		if api.FromConnect(refused).Check == "disk" { // it was seen in time: what operators do is written on
			for range 10_000 {
				if _, err := s.broker.JoinToken(ctx, "role=billing"); err != nil {
					break
				}
			}
		}
		_ = session.Close()
		select {
		case <-s.broker.Ended():
		case <-time.After(20 * time.Second):
			t.Fatal("the broker went on over a failed write")
		}
		check.Nil(t, os.Remove(filler))
		check.Nil(t, s.broker.Start(ctx))
		again := check.Must(h.Dial(ctx))(t)
		check.Must(h.Issue(ctx, again, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 3000+round))(t))))(t)
		_ = again.Close()
		s.invariants(t)
	}
}

// Vault goes down while leases are wanted, extended and revoked.
func TestVaultDown(t *testing.T) {
	s := newSite(t, lab.BrokerOptions{})
	ctx := check.Within(t, 20*time.Minute)
	h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
	check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
	for round := range *rounds {
		session := check.Must(h.Dial(ctx))(t)
		id := check.Must(h.Issue(ctx, session, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 100+round))(t))))(t).GetLeaseId()
		check.Nil(t, services.Vault.Stop())
		if _, err := h.Issue(ctx, session, h.IssueBody("soft", check.Must(h.Program(softExe, "billing", 200+round))(t))); err == nil {
			t.Fatal("issued without Vault")
		}
		if l := s.leases(t, "--state", "live"); len(l) != 1 {
			t.Errorf("round %d: %d live leases while Vault is down, want the one", round, len(l))
		}
		_, err := s.broker.CLI(ctx, "lease", "revoke", id)
		check.Nil(t, err)
		check.Nil(t, services.Vault.Start(context.Background()))
		check.Eventually(t, 90*time.Second, "the revocation is confirmed", func() (bool, string) {
			l := s.leases(t, "--state", "revoking")
			n := 0
			for _, one := range l {
				if one.ID == id {
					n++
				}
			}
			return n == 0, fmt.Sprint(l)
		})
		_ = session.Close()
		s.invariants(t)
	}
}
