package faults_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// order asks for a credential for one more program of a host.
func order(ctx context.Context, h *lab.SoftHost, pid int) error {
	program, err := h.Program(softExe, "billing", pid)
	if err != nil {
		return err
	}
	session, err := h.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = session.Close() }()
	_, err = h.Issue(ctx, session, h.IssueBody("soft", program))
	return err
}

// Vault does what it was told, and its answer is lost on the way: nobody is
// let in whom nobody knows, and a revocation is repeated until it is confirmed.
func TestReplyLost(t *testing.T) {
	for _, path := range []string{"auth/token/create/", "database/creds/", "auth/token/renew-accessor", "sys/leases/renew", "sys/leases/revoke", "auth/token/revoke-accessor"} {
		t.Run(path, func(t *testing.T) {
			front := check.Must(lab.NewFront(services.Vault, filepath.Join(t.TempDir(), "front-ca.pem")))(t)
			t.Cleanup(front.Close)
			s := newSite(t, lab.BrokerOptions{Front: front})
			ctx := check.Within(t, 20*time.Minute)
			h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
			check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
			for round := range *rounds {
				check.Nil(t, order(ctx, h, 100+round))
				lost := front.LoseReply(path)
				err := order(ctx, h, 200+round)
				live := s.leases(t, "--state", "live")
				revoked := ""
				if strings.Contains(path, "revoke") {
					check.Nil(t, err)
					revoked = live[0].ID
					_, err = s.broker.CLI(ctx, "lease", "revoke", revoked)
					check.Nil(t, err)
				}
				select {
				case <-lost:
				case <-time.After(20 * time.Second):
					t.Fatalf("round %d: %s was not called (%v)", round, path, err)
				}
				front.Set(nil)
				check.Nil(t, order(ctx, h, 300+round))
				// One whose token nobody heard of stays until it has died by itself.
				check.Eventually(t, 60*time.Second, "the revocation is confirmed", func() (bool, string) {
					left := s.leases(t, "--state", "revoking")
					return !slices.ContainsFunc(left, func(l lease) bool { return l.ID == revoked }), fmt.Sprint(left)
				})
				s.invariants(t)
			}
		})
	}
}

// Vault turns the broker away in different ways: nothing new is issued,
// nothing that works is taken, and afterwards it goes on by itself.
func TestVaultRefuses(t *testing.T) {
	write := func(path string, data map[string]any) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			_, err := check.Must(services.Vault.Client())(t).Logical().WriteWithContext(check.Within(t, time.Minute), path, data)
			check.Nil(t, err)
		}
	}
	for _, tt := range []struct {
		name  string
		fault func(t *testing.T, s *site) (mend func(*testing.T))
	}{
		{"the broker's token is revoked", func(t *testing.T, s *site) func(*testing.T) {
			file := filepath.Join(s.broker.Dir, "vault-token")
			write("auth/token/revoke", map[string]any{"token": string(check.Must(os.ReadFile(file))(t))})(t)
			return func(t *testing.T) {
				t.Helper()
				fresh := check.Must(check.Must(services.Vault.Client())(t).Logical().WriteWithContext(check.Within(t, time.Minute), "auth/token/create-orphan",
					map[string]any{"policies": []string{"countersign-broker"}, "no_default_policy": true, "period": "1h"}))(t)
				check.Nil(t, os.WriteFile(file, []byte(fresh.Auth.ClientToken), 0o600))
			}
		}},
		{"its policy is taken away", func(t *testing.T, _ *site) func(*testing.T) {
			const path = "sys/policies/acl/countersign-broker"
			was := check.Must(check.Must(services.Vault.Client())(t).Logical().ReadWithContext(check.Within(t, time.Minute), path))(t)
			write(path, map[string]any{"policy": `path "sys/nothing" { capabilities = ["read"] }`})(t)
			return write(path, map[string]any{"policy": was.Data["policy"]})
		}},
		{"PostgreSQL's connections are used up", func(t *testing.T, _ *site) func(*testing.T) {
			release := check.Must(services.PG.TakeConnections(check.Within(t, time.Minute)))(t)
			return func(*testing.T) { release() }
		}},
		{"its rate limit is used up", func(t *testing.T, _ *site) func(*testing.T) {
			write("sys/quotas/rate-limit/faults", map[string]any{"rate": 0.01, "interval": "300s", "path": "auth/token/"})(t)
			return func(t *testing.T) {
				t.Helper()
				_, err := check.Must(services.Vault.Client())(t).Logical().DeleteWithContext(check.Within(t, time.Minute), "sys/quotas/rate-limit/faults")
				check.Nil(t, err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t, lab.BrokerOptions{})
			ctx := check.Within(t, 40*time.Minute)
			h := check.Must(lab.NewSoftHost(s.broker, services.TPMCA))(t)
			check.Must(h.Join(ctx, check.Must(s.broker.JoinToken(ctx, "role=billing"))(t)))(t)
			for round := range *rounds {
				order := func(ctx context.Context, pid int) error { return order(ctx, h, 10_000+round*100+pid) }
				check.Nil(t, order(ctx, 1))
				live := len(s.leases(t, "--state", "live"))
				mend := tt.fault(t, s)
				// A token, or an answer, may be cached for one more request.
				var err error
				for pid := 2; pid < 6 && err == nil; pid++ {
					if err = order(ctx, pid); err == nil {
						live++
					}
				}
				if err == nil {
					t.Error("issued on")
				} else if e := api.FromConnect(err); e.Outcome != api.Fault {
					t.Errorf("a host hears %v, want a fault", e)
				}
				// One that was issued and never got its length may be among them; it
				// dies by itself.
				if n := len(s.leases(t, "--state", "live")); n < live {
					t.Errorf("%d live leases of %d: what worked was taken", n, live)
				}
				mend(t)
				pid := 10
				check.Eventually(t, 3*time.Minute, "it goes on", func() (bool, string) {
					pid++
					if err := order(ctx, pid); err != nil {
						time.Sleep(2 * time.Second)
						return false, err.Error()
					}
					return true, ""
				})
				s.invariants(t)
			}
		})
	}
}
