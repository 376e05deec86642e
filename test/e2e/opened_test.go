package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
)

// An opened file, as `audit export` has it.
type opened struct {
	Kind  string `json:"kind"`
	Actor string `json:"actor"`
	Host  string `json:"host"`
	Scope string `json:"scope"`
	Lease string `json:"lease"`
	Open  struct {
		Time time.Time `json:"time"`
		Path string    `json:"path"`
		PID  int       `json:"pid"`
		Exe  string    `json:"exe"`
		User string    `json:"user"`
		Unit string    `json:"unit"`
	} `json:"detail"`
}

// opened are the audit's records of programs that opened a credential's file.
func (b *bench) opened(t *testing.T) (out []opened) {
	t.Helper()
	text := check.Must(b.broker.CLI(check.Within(t, 10*time.Second), "audit", "export"))(t)
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, `"credential.opened"`) {
			continue
		}
		var o opened
		check.Nil(t, json.Unmarshal([]byte(line), &o))
		out = append(out, o)
	}
	return out
}

// A program that opens another's credential is seen and let in; the program itself
// raises nothing.
func TestOpenedByAnother(t *testing.T) {
	dir := folder(t)
	exe := copyExe(t, dir, "billingd")
	file := filepath.Join(dir, "db.properties")
	checked := filepath.Join(dir, "checked")
	credential := strings.Replace(fileCredential("billing-db", exe, file, ""), `{ signal = "SIGHUP" }`, fmt.Sprintf("{\n  signal = \"SIGHUP\"\n  check = [\"/usr/bin/touch\", %q]\n  user = \"root\"\n}", checked), 1)
	b := newBench(t, fmt.Sprintf(billingScope, exe), "witness = true\n"+credential, false)
	b.startWatch(t, fmt.Sprintf("sensor \"vault-audit\" \"vault\" {\n  path = %q\n}\n", services.Vault.AuditLog))
	l := startLegacy(t, exe, file)
	// Not getsIn, which opens the file, too, and isn't the program.
	check.Eventually(t, 20*time.Second, "the program gets in", func() (bool, string) {
		st := l.last(t)
		return st.Queries > 10 && strings.HasPrefix(st.User, "v-"), fmt.Sprintf("%+v", st)
	})
	check.Must(os.Stat(checked))(t) // the agent ran its command
	user := l.last(t).User
	time.Sleep(time.Second) // the file is marked
	pools := l.last(t).Pools
	check.Nil(t, l.cmd.Process.Signal(syscall.SIGHUP))
	check.Eventually(t, 10*time.Second, "the program reads its file again", func() (bool, string) {
		st := l.last(t)
		return st.Pools > pools, fmt.Sprintf("%+v", st)
	})

	thief := filepath.Join(dir, "thief")
	check.Nil(t, os.WriteFile(thief, check.Must(os.ReadFile("/bin/cat"))(t), 0o755))
	if got := check.Must(exec.Command(thief, file).Output())(t); !strings.Contains(string(got), "user="+user) {
		t.Errorf("it read %q", got)
	}
	id := b.leases(t)[0].ID
	var got []opened
	check.Eventually(t, 20*time.Second, "the other program is told of", func() (bool, string) {
		got = b.opened(t)
		return len(got) > 0, "no record"
	})
	if o := got[0]; o.Open.Exe != thief || o.Open.User != "root" || o.Lease != id || o.Host != b.host || o.Scope != "billing-db" || o.Actor != "host:"+b.host ||
		o.Open.Path != file || o.Open.PID <= 1 || time.Since(o.Open.Time) > time.Minute {
		t.Errorf("recorded: %+v", o)
	}
	for range 20 {
		check.Nil(t, exec.Command(thief, file).Run())
	}
	second := filepath.Join(dir, "second")
	check.Nil(t, os.WriteFile(second, check.Must(os.ReadFile("/bin/cat"))(t), 0o755))
	check.Nil(t, exec.Command(second, file).Run())
	check.Eventually(t, 30*time.Second, "the next is told of", func() (bool, string) {
		got = b.opened(t)
		return len(got) > 1, fmt.Sprintf("%+v", got)
	})
	if len(got) != 2 || got[1].Open.Exe != second {
		t.Errorf("recorded: %+v; want the two once each, and not the program itself", got)
	}
	// Each is a finding, and nothing is done about it.
	check.Eventually(t, 30*time.Second, "the watch says so", func() (bool, string) {
		of := map[string]bool{}
		list := b.findings(t, id)
		for _, f := range list {
			for _, exe := range []string{thief, second} {
				if f.Detector == "out-of-band-read" && f.Response == "alert" && strings.Contains(string(f.Evidence[0]), `"program":"`+exe+`"`) {
					of[exe] = true
				}
			}
		}
		return len(list) == 2 && len(of) == 2, fmt.Sprintf("%+v", list)
	})
	if st := l.last(t); st.Failed != 0 {
		t.Errorf("%d queries failed: %s", st.Failed, st.Error)
	}
}

// The agent's service sees with its drop-in, and does its work without; a unit's
// own processes raise nothing, through rotations, and another unit's do. An agent
// that is stopped holds up nobody for longer than its watchdog waits.
func TestOpenedByAnotherUnit(t *testing.T) {
	t.Setenv("SYSTEMD_SECCOMP", "0") // nspawn's filter has no fanotify; the machine's own systemd doesn't see this
	m := newMachine(t, unitScope, "witness = true\n"+fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	m.beforeStart(t)
	m.sh(t, "systemctl start billing")
	first := m.getsIn(t)
	check.Eventually(t, 10*time.Second, "the agent says what it lacks", func() (bool, string) {
		out := m.sh(t, "journalctl --no-pager -u countersign-agent")
		return strings.Contains(out, "witness = true needs CAP_SYS_ADMIN"), out
	})
	text := check.Must(os.ReadFile("../../packaging/systemd/optional/countersign-agent.service.d/witness.conf"))(t)
	m.sh(t, "mkdir -p /etc/systemd/system/countersign-agent.service.d")
	check.Nil(t, m.sys.WriteFile(check.Within(t, time.Minute), "/etc/systemd/system/countersign-agent.service.d/witness.conf", text, 0o644))
	m.sh(t, "systemctl daemon-reload && systemctl restart countersign-agent")
	check.Eventually(t, 2*time.Minute, "another credential is delivered and read", func() (bool, string) {
		st := m.status(t)
		return st.User != first && st.Pools > 1, fmt.Sprintf("%+v", st)
	})
	check.Eventually(t, 10*time.Second, "and marked", func() (bool, string) {
		out := m.sh(t, "cat /proc/$(systemctl show -P MainPID countersign-agent)/fdinfo/*")
		return strings.Contains(out, "fanotify ino:"), out
	})
	m.sh(t, "systemd-run --wait --unit thief -p User=billing -p ProtectHome=yes cat /etc/billing/db.properties")
	var got []opened
	check.Eventually(t, 20*time.Second, "the other unit is told of", func() (bool, string) {
		got = m.opened(t)
		return len(got) > 0, "no record"
	})
	if o := got[0]; len(got) != 1 || o.Open.Unit != "thief.service" || o.Open.User != "billing" || !strings.HasSuffix(o.Open.Exe, "/cat") || o.Open.Path != "/etc/billing/db.properties" {
		t.Errorf("recorded: %+v", got)
	}
	pid := strings.TrimSpace(m.sh(t, "systemctl show -P MainPID countersign-agent"))
	m.sh(t, "kill -STOP "+pid+" && timeout 50 cat /etc/billing/db.properties")
	check.Eventually(t, 20*time.Second, "the agent is back", func() (bool, string) {
		now := strings.TrimSpace(m.sh(t, "systemctl show -P MainPID countersign-agent"))
		return now != pid && now != "0", now
	})
	if st := m.status(t); st.Failed != 0 {
		t.Errorf("%d queries failed: %s", st.Failed, st.Error)
	}
}
