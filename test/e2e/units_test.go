package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A machine is a bench whose agent is a service of a systemd.
type machine struct {
	*bench
	sys *lab.Machine
}

const unitScope = `
scope "billing-db" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process {
    unit         = "billing.service"
    user         = "billing"
    exe          = "/opt/billing/bin/billingd"
    before_start = true
  }
  vault {
    path    = "database/creds/billing-ro"
    ttl     = "1m"
    overlap = "10s"
  }
}
`

func newMachine(t *testing.T, scopes, credentials string) *machine {
	t.Helper()
	ctx := check.Within(t, 2*time.Minute)
	m := &machine{bench: newBroker(t, scopes, false)}
	m.sys = check.Must(lab.NewMachine(ctx, filepath.Join(m.dir, "systemd"), m.broker, m.tpm, credentials))(t)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := m.sys.Run(context.Background(), "journalctl", "--no-pager", "-u", "countersign-agent", "-u", "billing", "-n", "80")
			t.Logf("journal:\n%s", out)
		}
		check.Nil(t, m.sys.Poweroff(check.Within(t, time.Minute)))
	})
	check.Nil(t, m.sys.LegacyUnit(ctx, "billing", legacyProgram(), services.PG.Port))
	check.Nil(t, m.sys.Join(ctx, m.broker, "role=billing"))
	m.host = m.sys.HostID
	return m
}

func (m *machine) beforeStart(t *testing.T) {
	t.Helper()
	check.Nil(t, m.sys.BeforeStart(check.Within(t, time.Minute), "billing", "billing-db"))
}

func (m *machine) sh(t *testing.T, script string) string {
	t.Helper()
	return string(check.Must(m.sys.Run(check.Within(t, time.Minute), "sh", "-c", script))(t))
}

// try is sh for what may fail.
func (m *machine) try(t *testing.T, script string) (string, error) {
	t.Helper()
	out, err := m.sys.Run(check.Within(t, time.Minute), "sh", "-c", script)
	return string(out), err
}

func (m *machine) status(t *testing.T) (st legacyStatus) {
	t.Helper()
	out, err := m.try(t, "tail -n 1 /var/lib/billing/status")
	if err == nil && strings.TrimSpace(out) != "" {
		check.Nil(t, json.Unmarshal([]byte(out), &st))
	}
	return st
}

func (m *machine) getsIn(t *testing.T) string {
	t.Helper()
	var user string
	check.Eventually(t, 20*time.Second, "the unit gets in", func() (bool, string) {
		st := m.status(t)
		user = st.User
		return strings.HasPrefix(user, "v-"), fmt.Sprintf("%+v", st)
	})
	return user
}

const unitCredential = `
credential "billing-db" {
  process { unit = "billing.service" }
  file "/etc/billing/db.properties" {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "billing"
    group    = "billing"
  }
  on_change { %s }
}
`

// A unit finds its credential when it starts, keeps it through rotations
// without a failed query, and nothing stands while it is down.
func TestUnit(t *testing.T) {
	m := newMachine(t, unitScope, fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	m.beforeStart(t)
	m.sh(t, "systemctl start billing.service")
	if out := m.sh(t, "stat -c '%U %G %a' /etc/billing/db.properties"); strings.TrimSpace(out) != "billing billing 400" {
		t.Errorf("the file is %s", out)
	}
	first := m.getsIn(t)
	invocation := strings.TrimSpace(m.sh(t, "systemctl show -P InvocationID billing.service"))
	var shown struct {
		Subject string `json:"subject"`
	}
	check.Nil(t, m.broker.JSON(check.Within(t, time.Minute), &shown, "lease", "show", m.leases(t)[0].ID))
	t.Log("invocation", invocation)

	// Its lease lives a minute, so it is replaced twice and more.
	check.Eventually(t, 2*time.Minute, "two rotations", func() (bool, string) {
		st := m.status(t)
		return st.Pools >= 3, fmt.Sprintf("%+v", st)
	})
	st := m.status(t)
	if st.Failed != 0 {
		t.Errorf("%d of %d queries failed over %d pools: %s", st.Failed, st.Queries, st.Pools, st.Error)
	}
	if st.User == first {
		t.Errorf("after %d pools the user is still %s", st.Pools, first)
	}
	check.Eventually(t, 20*time.Second, "the first user is gone", func() (bool, string) { return !roleExists(t, first), first })

	user := m.status(t).User
	start := time.Now()
	m.sh(t, "systemctl stop billing.service")
	check.Eventually(t, 10*time.Second, "the user is gone after the stop", func() (bool, string) { return !roleExists(t, user), user })
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("revoked %v after the stop", took)
	}
	if out, err := m.try(t, "ls /etc/billing"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("while the unit is down: %q, %v", out, err)
	}
}

// With the broker away a restart of the same unit goes on with the lease that
// still lives; when the broker is back it learns of the new invocation.
func TestUnitRestartsWhileTheBrokerIsAway(t *testing.T) {
	scopes := strings.Replace(unitScope, `"1m"`, `"30m"`, 1)
	m := newMachine(t, scopes, fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	m.beforeStart(t)
	m.sh(t, "systemctl start billing.service")
	user := m.getsIn(t)
	before := m.leases(t)
	check.Nil(t, m.broker.Stop())
	m.sh(t, "systemctl stop billing.service")
	check.Eventually(t, 40*time.Second, "the file is withdrawn", func() (bool, string) {
		out, _ := m.try(t, "ls /etc/billing")
		return strings.TrimSpace(out) == "", out
	})
	m.sh(t, "rm -f /var/lib/billing/status; systemctl start billing.service")
	if again := m.getsIn(t); again != user {
		t.Errorf("goes on as %s, was %s", again, user)
	}
	check.Nil(t, m.broker.Start(check.Within(t, time.Minute)))
	invocation := strings.TrimSpace(m.sh(t, "systemctl show -P InvocationID billing.service"))
	check.Eventually(t, 90*time.Second, "the broker knows the new invocation", func() (bool, string) {
		out, err := m.broker.CLI(check.Within(t, time.Minute), "lease", "show", before[0].ID)
		return err == nil && strings.Contains(string(out), invocation), string(out)
	})
	if after := m.leases(t); len(after) != 1 || after[0].ID != before[0].ID || after[0].State != "live" {
		t.Errorf("leases after: %+v, before: %+v", after, before)
	}
	// A program that isn't the one that earned it gets nothing of what is withheld.
	user = m.status(t).User
	check.Nil(t, m.broker.Stop())
	m.sh(t, "systemctl stop billing.service")
	m.sh(t, "cp /bin/sleep /opt/billing/bin/billingd.new && mv /opt/billing/bin/billingd.new /opt/billing/bin/billingd")
	if out, err := m.try(t, "timeout 20 systemctl start billing.service"); err == nil {
		t.Errorf("another program started with the withheld credential: %s", out)
	}
	m.sh(t, "systemctl stop billing.service || true")
	check.Nil(t, m.broker.Start(check.Within(t, time.Minute)))
	check.Eventually(t, 90*time.Second, "the owed lease is given back", func() (bool, string) { return !roleExists(t, user), user })
}

// A restart on change hands the new lease to the next invocation; the end of
// the old one takes only the old lease.
func TestUnitHandOver(t *testing.T) {
	m := newMachine(t, unitScope, fmt.Sprintf(unitCredential, `restart = true`))
	m.beforeStart(t)
	m.sh(t, "systemctl start billing.service")
	first := m.getsIn(t)
	invocation := m.sh(t, "systemctl show -P InvocationID billing.service")
	check.Eventually(t, 90*time.Second, "restarted with another user", func() (bool, string) {
		st := m.status(t)
		return m.sh(t, "systemctl show -P InvocationID billing.service") != invocation && st.User != first && st.User != "", fmt.Sprintf("%+v", st)
	})
	second := m.status(t).User
	check.Eventually(t, 20*time.Second, "the old user is gone", func() (bool, string) { return !roleExists(t, first), first })
	time.Sleep(7 * time.Second) // a proof passes
	if !roleExists(t, second) {
		t.Errorf("the new user %s went with the old instance", second)
	}
	if live := m.leases(t, "--state", "live"); len(live) != 1 || live[0].Names["db_username"] != second {
		t.Errorf("live leases: %+v, want one of %s", live, second)
	}
}
