package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A bench is one broker with a host that has joined it.
type bench struct {
	dir    string
	tpm    *lab.TPM
	broker *lab.Broker
	agent  *lab.Agent
	host   string
}

const billingScope = `
scope "billing-db" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = %q }
  vault {
    path    = "database/creds/billing-ro"
    ttl     = "30m"
    overlap = "2s"
  }
}
`

// newBroker starts a broker with these scopes, and a TPM; nothing has joined.
func newBroker(t *testing.T, scopes string, faults bool) *bench {
	t.Helper()
	return newBrokerWith(t, scopes, lab.BrokerOptions{Faults: faults})
}

func newBrokerWith(t *testing.T, scopes string, o lab.BrokerOptions) *bench {
	t.Helper()
	ctx := check.Within(t, 2*time.Minute)
	b := &bench{dir: folder(t)}
	b.broker = check.Must(services.NewBrokerFor(ctx, b.dir, scopes, o))(t)
	t.Cleanup(func() {
		_ = b.broker.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(b.broker.Log())
			t.Logf("broker.log:\n%s", text)
		}
	})
	b.tpm = check.Must(lab.StartTPM(ctx, filepath.Join(b.dir, "tpm"), services.TPMCA, lab.TPMOptions{}))(t)
	t.Cleanup(b.tpm.Stop)
	return b
}

// newBench is newBroker with an agent on this machine that has joined.
func newBench(t *testing.T, scopes, credentials string, faults bool) *bench {
	t.Helper()
	b := newBroker(t, scopes, faults)
	b.agent = check.Must(lab.NewAgent(filepath.Join(b.dir, "agent"), b.broker, b.tpm.Path(), credentials, faults))(t)
	b.join(t)
	return b
}

// join has the agent join, and starts it.
func (b *bench) join(t *testing.T) {
	t.Helper()
	ctx := check.Within(t, 2*time.Minute)
	token := check.Must(b.broker.JoinToken(ctx, "role=billing"))(t)
	var joined struct {
		HostID string `json:"host_id"`
	}
	check.Nil(t, json.Unmarshal(check.Must(b.agent.Join(ctx, token))(t), &joined))
	b.host = joined.HostID
	check.Nil(t, b.agent.Start(ctx))
	t.Cleanup(func() {
		_ = b.agent.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(b.agent.Log())
			t.Logf("agent.log:\n%s", text)
		}
	})
}

// fileCredential is a credential's block for the program exe, with a file that
// startLegacy's program reads; more are further parts of it.
func fileCredential(scope, exe, file, more string) string {
	return fmt.Sprintf(`
credential %q {
  process { exe = %q }
  file %q {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "nobody"
    group    = "nogroup"
    mode     = "0400"
  }
  on_change { signal = "SIGHUP" }
  %s
}
`, scope, exe, file, more)
}

// A lease as `lease list -o json` shows it.
type lease struct {
	ID     string            `json:"id"`
	Scope  string            `json:"scope"`
	State  string            `json:"state"`
	Reason string            `json:"reason"`
	Names  map[string]string `json:"names"`
}

func (b *bench) leases(t *testing.T, args ...string) []lease {
	t.Helper()
	var out struct {
		Leases []lease `json:"leases"`
	}
	check.Nil(t, b.broker.JSON(check.Within(t, 10*time.Second), &out, append([]string{"lease", "list"}, args...)...))
	return out.Leases
}

// legacy runs the legacy program as an unprivileged user.
type legacy struct {
	cmd    *exec.Cmd
	status string
}

func startLegacy(t *testing.T, exe, file string) *legacy {
	t.Helper()
	return startLegacyAt(t, nil, exe, file, "127.0.0.1", services.PG.Port, "billing")
}

// startLegacyAt has it started by what enter is, as lab.Namespace.Enter, and use
// another database.
func startLegacyAt(t *testing.T, enter []string, exe, file, host string, port int, database string) *legacy {
	t.Helper()
	u := check.Must(user.Lookup("nobody"))(t)
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	dir := folder(t)
	check.Nil(t, os.Chown(dir, uid, gid))
	l := &legacy{status: filepath.Join(dir, "status")}
	line := append(slices.Clone(enter), "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
		exe, "-file", file, "-host", host, "-port", strconv.Itoa(port), "-database", database, "-status", l.status)
	l.cmd = exec.Command(line[0], line[1:]...)
	var stderr bytes.Buffer
	l.cmd.Stderr = &stderr
	check.Nil(t, l.cmd.Start())
	t.Cleanup(func() { l.stop(); t.Log(stderr.String()) })
	return l
}

func (l *legacy) stop() {
	_ = l.cmd.Process.Signal(syscall.SIGTERM)
	_ = l.cmd.Wait()
}

type legacyStatus struct {
	User    string
	Queries int64
	Failed  int64
	Pools   int
	Error   string
}

func (l *legacy) last(t *testing.T) legacyStatus {
	t.Helper()
	var st legacyStatus
	text, _ := os.ReadFile(l.status)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if last := lines[len(lines)-1]; last != "" {
		check.Nil(t, json.Unmarshal([]byte(last), &st))
	}
	return st
}

func roleExists(t *testing.T, name string) bool {
	t.Helper()
	return roleExistsIn(t, services.PG, name)
}

func roleExistsIn(t *testing.T, pg *lab.Postgres, name string) bool {
	t.Helper()
	rows := check.Must(pg.Query(context.Background(), "postgres", "SELECT rolname FROM pg_roles WHERE rolname = $1", name))(t)
	return len(rows) == 1
}

func copyExe(t *testing.T, dir, name string) string {
	t.Helper()
	b := check.Must(os.ReadFile(legacyProgram()))(t)
	path := filepath.Join(dir, name)
	check.Nil(t, os.WriteFile(path, b, 0o755))
	return path
}

// A program that only reads a file gets in, through a rotation, and loses its
// user at PostgreSQL when it ends.
func TestWholePath(t *testing.T) {
	dir := folder(t)
	exe := copyExe(t, dir, "billingd")
	file := filepath.Join(dir, "db.properties")
	b := newBench(t, fmt.Sprintf(billingScope, exe), fileCredential("billing-db", exe, file, ""), false)
	l := startLegacy(t, exe, file)
	var user string
	check.Eventually(t, 20*time.Second, "the program gets in", func() (bool, string) {
		st := l.last(t)
		user = st.User
		return st.Queries > 10 && strings.HasPrefix(user, "v-"), fmt.Sprintf("%+v", st)
	})
	if !roleExists(t, user) {
		t.Errorf("PostgreSQL has no role %s", user)
	}
	leases := b.leases(t)
	if len(leases) != 1 || leases[0].State != "live" || leases[0].Names["db_username"] != user {
		t.Fatalf("leases: %+v, want one live one of %s", leases, user)
	}
	info := check.Must(os.Stat(file))(t)
	if info.Mode().Perm() != 0o400 {
		t.Errorf("file mode %v", info.Mode())
	}
	if before := l.last(t); before.Failed != 0 {
		t.Errorf("%d queries failed: %s", before.Failed, before.Error)
	}

	// A proof passes and takes nothing.
	time.Sleep(6 * time.Second)
	if got := b.leases(t); len(got) != 1 || got[0].ID != leases[0].ID || got[0].State != "live" {
		t.Fatalf("after a proof: %+v", got)
	}

	start := time.Now()
	l.stop()
	check.Eventually(t, 10*time.Second, "the role is gone after the program ended", func() (bool, string) { return !roleExists(t, user), user })
	took := time.Since(start)
	if took > 5*time.Second {
		t.Errorf("the role lived on for %v", took)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file still stands: %v", err)
	}
	check.Eventually(t, 5*time.Second, "the end is confirmed", func() (bool, string) {
		got := b.leases(t)
		return len(got) == 0, fmt.Sprintf("%+v", got)
	})
	if out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config()).CombinedOutput(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}
