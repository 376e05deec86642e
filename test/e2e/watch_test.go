package e2e_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

type reported struct {
	ID       string
	Detector string
	Severity string
	Lease    string
	Host     string
	Account  string
	Status   string
	Count    int
	Response string
	Evidence []json.RawMessage
}

// findings are those about a lease, or all.
func (b *bench) findings(t *testing.T, lease string) (out []reported) {
	t.Helper()
	text := check.Must(b.broker.CLI(check.Within(t, 10*time.Second), "finding", "list", "--status", "all", "-o", "json"))(t)
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		if line == "" {
			continue
		}
		var f reported
		check.Nil(t, json.Unmarshal([]byte(line), &f))
		if lease == "" || f.Lease == lease {
			out = append(out, f)
		}
	}
	return out
}

var inFile = regexp.MustCompile(`user=(\S+)\npassword=(\S+)`)

// getsIn waits until the program that reads file is in, and gives what it is in by.
func (l *legacy) getsIn(t *testing.T, file string) (user, password string) {
	t.Helper()
	check.Eventually(t, 30*time.Second, "the program gets in", func() (bool, string) {
		st := l.last(t)
		text, _ := os.ReadFile(file)
		if m := inFile.FindSubmatch(text); m != nil {
			user, password = string(m[1]), string(m[2])
		}
		return st.Queries > 10 && user != "" && st.User == user, fmt.Sprintf("%+v", st)
	})
	return user, password
}

// leaseOf is the lease of a database user.
func (b *bench) leaseOf(t *testing.T, user string) (found lease) {
	t.Helper()
	for _, l := range b.leases(t) {
		if l.Names["db_username"] == user {
			found = l
		}
	}
	return found
}

// startWatch is lab.StartWatch beside the broker, until the test ends.
func (b *bench) startWatch(t *testing.T, config string) *lab.Watch {
	t.Helper()
	w := check.Must(lab.StartWatch(filepath.Join(b.dir, "watch"), b.broker, config))(t)
	t.Cleanup(func() {
		_ = w.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(w.Log())
			t.Logf("watch.log:\n%s", text)
		}
	})
	return w
}

// A credential that was copied and is used from another address is found, and its
// lease revoked; the program it was issued to raises nothing. The watch is killed on
// the way.
func TestCopiedCredential(t *testing.T) {
	dir := folder(t)
	exe := copyExe(t, dir, "billingd")
	file := filepath.Join(dir, "db.properties")
	b := newBench(t, fmt.Sprintf(billingScope, exe), fileCredential("billing-db", exe, file, ""), false)
	// One receiver refuses everything, which holds up nothing; the other checks what
	// it gets.
	key := filepath.Join(b.dir, "webhook-key")
	check.Nil(t, os.WriteFile(key, []byte("a key\n"), 0o600))
	received := make(chan string, 100)
	hook := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		mac := hmac.New(sha256.New, []byte("a key"))
		mac.Write(body)
		if err != nil || r.URL.Path != "/good" || r.Header.Get("Countersign-Signature") != hex.EncodeToString(mac.Sum(nil)) {
			rw.WriteHeader(http.StatusBadRequest)
			return
		}
		received <- string(body)
	}))
	t.Cleanup(hook.Close)
	w := b.startWatch(t, fmt.Sprintf(`
sensor "postgres-stderr" "db" {
  path            = %q
  log_line_prefix = %q
}
sensor "vault-audit" "vault" {
  path = %q
}
webhook "%s/bad?token=s3cret" {
  key_file = %q
}
webhook "%s/good" {
  key_file = %q
  format   = "ocsf"
}
`, services.PG.Log, lab.LogLinePrefix, services.Vault.AuditLog, hook.URL, key, hook.URL, key))
	user, password := startLegacy(t, exe, file).getsIn(t, file)
	id := b.leaseOf(t, user).ID
	// A wrong password, from elsewhere: user names are no secret.
	if err := services.PG.LoginFrom(check.Within(t, 10*time.Second), "127.0.0.9", user, "wrong", "billing"); err == nil {
		t.Fatal("a wrong password gets in")
	}
	time.Sleep(5 * time.Second)
	if got := b.findings(t, id); len(got) != 0 {
		t.Fatalf("honest use raised %+v", got)
	}
	check.Nil(t, w.Kill())
	check.Nil(t, services.PG.LoginFrom(check.Within(t, 10*time.Second), "127.0.0.9", user, password, "billing"))
	start := time.Now()
	check.Nil(t, w.Start())
	check.Eventually(t, time.Minute, "the copied credential is revoked", func() (bool, string) {
		for _, l := range b.leases(t) {
			if l.ID == id {
				return false, fmt.Sprintf("%+v", l)
			}
		}
		return !roleExists(t, user), "the role stands"
	})
	t.Logf("found and revoked %v after the login", time.Since(start).Round(10*time.Millisecond))
	got := b.findings(t, id)
	if len(got) != 1 || got[0].Detector != "foreign-source" || got[0].Count != 1 || got[0].Status != "open" || got[0].Response != "revoke" || got[0].Account != user || got[0].Host != b.host {
		t.Errorf("found %+v, want one foreign-source", got)
	}
	for _, f := range got {
		for _, e := range f.Evidence {
			if !strings.Contains(string(e), "127.0.0.9") || strings.Contains(string(e), password) {
				t.Errorf("evidence %s", e)
			}
		}
	}
	for told := false; !told; {
		select {
		case body := <-received:
			told = strings.Contains(body, id) && strings.Contains(body, `"class_uid":2004`)
		case <-time.After(30 * time.Second):
			t.Fatal("the webhook wasn't told")
		}
	}
	check.Eventually(t, 30*time.Second, "the refusal is in the watch's log", func() (bool, string) {
		text := check.Must(os.ReadFile(w.Log()))(t)
		return strings.Contains(string(text), "it answered 400"), "nothing of it"
	})
	if text := check.Must(os.ReadFile(w.Log()))(t); strings.Contains(string(text), "s3cret") {
		t.Error("the watch's log has the webhook's token")
	}
	// Somebody who reads the same path in Vault by himself.
	client := check.Must(services.Vault.Client())(t)
	secret := check.Must(client.Logical().ReadWithContext(check.Within(t, 10*time.Second), "database/creds/billing-ro"))(t)
	check.Eventually(t, time.Minute, "a read past the broker is found", func() (bool, string) {
		for _, f := range b.findings(t, "") {
			if f.Detector == "out-of-band-read" && f.Account == "database/creds/billing-ro" && strings.Contains(string(f.Evidence[0]), secret.LeaseID) {
				return true, ""
			}
		}
		return false, "no such finding"
	})
	for _, path := range []string{w.Log(), filepath.Join(w.Dir, "state", "state.json"), filepath.Join(w.Dir, "state", "ledger.jsonl"), b.broker.Log()} {
		if text := check.Must(os.ReadFile(path))(t); strings.Contains(string(text), password) {
			t.Errorf("%s holds the password", path)
		}
	}
}
