package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// sshdLogin defines login KEY ADDRESS USER, in a machine with an sshd.
const sshdLogin = `cd /root/k
login() { ssh -F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes -o IdentitiesOnly=yes -b $2 -p 2222 -i $1 -l "$3" 127.0.0.1 true; }
`

// startSshd boots a systemd with an sshd that takes the certificates of two users'
// keys, one of whom has logged in.
func startSshd(ctx context.Context, t *testing.T, binds ...string) *lab.Systemd {
	t.Helper()
	m := check.Must(lab.BootSystemd(ctx, filepath.Join(folder(t), "machine"), binds...))(t)
	t.Cleanup(func() { _ = m.Poweroff(context.Background()) })
	check.Must(m.Run(ctx, "sh", "-ec", `
useradd -m -s /bin/sh -p '*' deploy
mkdir -p /root/k /run/sshd && cd /root/k
for k in ca honest stolen host; do ssh-keygen -q -t ed25519 -N '' -f $k; done
ssh-keygen -q -s ca -I deploy@billing-1 -z 71000000000000001 -n deploy honest.pub
ssh-keygen -q -s ca -I deploy@billing-2 -z 71000000000000002 -n deploy stolen.pub
cat > conf <<X
Port 2222
ListenAddress 127.0.0.1
HostKey /root/k/host
TrustedUserCAKeys /root/k/ca.pub
UsePAM no
X
systemd-run --quiet --unit=sshd-test --property=SyslogIdentifier=sshd /usr/sbin/sshd -D -f /root/k/conf
`+sshdLogin+`
for i in $(seq 50); do login honest 127.0.0.1 deploy 2>/dev/null && break; sleep 0.2; done
`))(t)
	return m
}

// TestJournal: a watch follows the journal of a machine, and has each login once
// though it is killed on the way.
func TestJournal(t *testing.T) {
	ctx := check.Within(t, 2*time.Minute)
	b := newBroker(t, fmt.Sprintf(billingScope, "/bin/true"), false)
	journal := folder(t)
	m := startSshd(ctx, t, journal+":/var/log/journal")
	check.Must(m.Run(ctx, "journalctl", "--flush"))(t)
	w := check.Must(lab.StartWatch(filepath.Join(b.dir, "watch"), b.broker, fmt.Sprintf(`
governed = ["deploy"]
sensor "sshd" "jump" {
  journal = %q
}
`, journal)))(t)
	t.Cleanup(func() { _ = w.Stop() })
	found := func(want int) {
		t.Helper()
		check.Eventually(t, 30*time.Second, "the logins are found", func() (bool, string) {
			list := b.findings(t, "")
			return len(list) == 1 && list[0].Detector == "unmatched-login" && list[0].Account == "deploy" && list[0].Count == want, fmt.Sprintf("%+v", list)
		})
	}
	login := func() {
		t.Helper()
		check.Must(m.Run(ctx, "sh", "-ec", sshdLogin+"login honest 127.0.0.9 deploy"))(t)
	}
	found(1)
	login()
	found(2)
	check.Nil(t, w.Kill())
	login()
	check.Nil(t, w.Start())
	found(3)
	// Another boot.
	check.Nil(t, m.Poweroff(ctx))
	m = startSshd(ctx, t, journal+":/var/log/journal")
	check.Must(m.Run(ctx, "journalctl", "--flush"))(t)
	found(4)
	// Anybody may say in the journal that somebody logged in.
	check.Must(m.Run(ctx, "runuser", "-u", "deploy", "--", "logger", "-t", "sshd", "Accepted password for deploy from 10.0.0.1 port 1 ssh2"))(t)
	login()
	found(5)
}

// TestRealSshd: a real sshd in a systemd of its own logs what certificates log in
// with, and the journal tells it. The one that is used as it should raises nothing.
func TestRealSshd(t *testing.T) {
	ctx := check.Within(t, 2*time.Minute)
	start := time.Now()
	m := startSshd(ctx, t)
	out, err := m.Run(ctx, "sh", "-ec", sshdLogin+`
login stolen 127.0.0.9 deploy
login honest 127.0.0.9 'deploy from 10.0.0.1 port 1 ssh2' || true
journalctl --sync
journalctl -o json
`)
	check.Nil(t, err)
	journal := filepath.Join(folder(t), "journal.json")
	check.Nil(t, os.WriteFile(journal, out, 0o600))
	short := check.Must(m.Run(ctx, "journalctl", "-o", "short-iso"))(t)
	plain := filepath.Join(folder(t), "auth.log")
	check.Nil(t, os.WriteFile(plain, short, 0o600))
	var ledger strings.Builder
	for n := 1; n <= 2; n++ {
		fmt.Fprintf(&ledger, `{"id":"L%d","scope":"deploy-ssh","host":"h%d","subject":{"boot":"b","user":"deploy","exe":"/opt/deploy","sha256":"aa"},"kind":"vault","names":{"ssh_key_id":"deploy@billing-%d","ssh_serial":"7100000000000000%d"},"sources":["127.0.0.1"],"audience":[],"issued":%q,"expires":%q}`+"\n",
			n, n, n, n, start.Add(-time.Minute).UTC().Format(time.RFC3339), start.Add(time.Hour).UTC().Format(time.RFC3339))
	}
	name := filepath.Join(folder(t), "ledger.jsonl")
	check.Nil(t, os.WriteFile(name, []byte(ledger.String()), 0o600))
	bin := check.Must(lab.Program("countersign", false))(t)
	for _, log := range []string{journal, plain} {
		out, err := exec.CommandContext(ctx, bin, "watch", "replay", "--ledger", name, "--source", "sshd="+log, "-o", "json").Output()
		check.Nil(t, err)
		var found []string
		for line := range strings.Lines(string(out)) {
			var f reported
			check.Nil(t, json.Unmarshal([]byte(line), &f))
			found = append(found, fmt.Sprint(f.Detector, " ", f.Lease, " ", f.Count))
		}
		if !slices.Equal(found, []string{"foreign-source L2 1"}) {
			text, _ := os.ReadFile(log)
			t.Errorf("%s: found %v in\n%.20000s", log, found, text)
		}
	}
}
