package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/ima"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A measuredHost is a software TPM that was extended as a recorded boot did it,
// with the logs of that boot, and an agent that reads them.
type measuredHost struct {
	*bench
	exe, file    string
	log, imaList string // files
}

const measuredScope = `
scope "billing-db" {
  reprove = "5s"
  grace   = "1h"
  host {
    labels      = { role = "billing" }
    secure_boot = true
    reference   = "prod"
    ima         = "required"
    kernel_command_line = ["/vmlinuz root=/dev/* rw console=ttyS0 ima_policy=tcb panic=-1 quiet init=/sbin/init"]
  }
  process { exe = %q }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

func newMeasuredHost(t *testing.T, scope string) *measuredHost {
	t.Helper()
	ctx := check.Within(t, 2*time.Minute)
	dir := folder(t)
	h := &measuredHost{exe: copyExe(t, dir, "billingd"), file: filepath.Join(dir, "db.properties"), log: filepath.Join(dir, "log"), imaList: filepath.Join(dir, "ima")}
	h.bench = newBroker(t, fmt.Sprintf(scope, h.exe), false)
	const clean = "../vectors/boots/clean/"
	events := check.Must(os.ReadFile(clean + "binary_bios_measurements"))(t)
	check.Nil(t, os.WriteFile(h.log, events, 0o600))
	for _, e := range check.Must(boot.Parse(events))(t).Events {
		for _, d := range e.Digests {
			if d.Algorithm == boot.SHA256 && e.Type != boot.NoAction {
				check.Nil(t, h.tpm.ExtendDigest(int(e.PCR), [32]byte(d.Value)))
			}
		}
	}
	list := check.Must(os.ReadFile(clean + "ima_binary_runtime_measurements"))(t)
	for r := ima.NewReader(list, 0); r.More(); {
		e, _, err := r.Next()
		check.Nil(t, err)
		h.extend(t, e)
	}
	h.measure(t, h.exe, check.Must(os.ReadFile(h.exe))(t))
	h.agent = check.Must(lab.NewAgent(filepath.Join(h.dir, "agent"), h.broker, h.tpm.Path(), fmt.Sprintf(`
event_log = %q
ima_list  = %q
credential "billing-db" {
  process { exe = %q }
  file %q {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "nobody"
  }
}`, h.log, h.imaList, h.exe, h.file), false))(t)
	var joined struct {
		HostID string `json:"host_id"`
	}
	check.Nil(t, json.Unmarshal(check.Must(h.agent.Join(ctx, check.Must(h.broker.JoinToken(ctx, "role=billing"))(t)))(t), &joined))
	h.host = joined.HostID
	t.Cleanup(func() {
		_ = h.agent.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(h.agent.Log())
			t.Logf("agent.log:\n%s", text)
		}
	})
	return h
}

// extend does what the kernel does when it measures: list first, then the TPM.
func (h *measuredHost) extend(t *testing.T, e ima.Entry) {
	t.Helper()
	f := check.Must(os.OpenFile(h.imaList, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600))(t)
	check.Must(f.Write(e.Append(nil)))(t)
	check.Nil(t, f.Close())
	check.Nil(t, h.tpm.ExtendDigest(e.PCR, sha256.Sum256(e.Data)))
}

// measure has the kernel measure a file.
func (h *measuredHost) measure(t *testing.T, path string, content []byte) {
	t.Helper()
	digest := sha256.Sum256(content)
	e := ima.Entry{PCR: 10, Template: "ima-ng"}
	for _, field := range [][]byte{append([]byte("sha256:\x00"), digest[:]...), []byte(path + "\x00")} {
		e.Data = append(binary.LittleEndian.AppendUint32(e.Data, uint32(len(field))), field...)
	}
	sum := sha1.Sum(e.Data)
	e.TemplateDigest = sum[:]
	h.extend(t, e)
}

// cli is an operator's command.
func (h *measuredHost) cli(t *testing.T, args ...string) string {
	t.Helper()
	return string(check.Must(h.broker.CLI(check.Within(t, time.Minute), args...))(t))
}

func (h *measuredHost) state(t *testing.T) (state, reason string) {
	t.Helper()
	var out struct {
		State  string `json:"state"`
		Reason string `json:"state_reason"`
	}
	check.Nil(t, h.broker.JSON(check.Within(t, time.Minute), &out, "host", "show", h.host))
	return out.State, out.Reason
}

// proven waits until the host has proven itself with its logs.
func (h *measuredHost) proven(t *testing.T, fact string) {
	t.Helper()
	check.Eventually(t, 30*time.Second, "the host is proven with "+fact, func() (bool, string) {
		out, err := h.broker.CLI(check.Within(t, time.Minute), "scope", "facts", "--host", h.host)
		var compact bytes.Buffer
		return err == nil && json.Compact(&compact, out) == nil && strings.Contains(compact.String(), fact), fmt.Sprintf("%s %v", out, err)
	})
}

// trusted learns the host as it is, and waits for its credential.
func (h *measuredHost) trusted(t *testing.T) (l *legacy, user string) {
	t.Helper()
	ctx := check.Within(t, time.Minute)
	check.Nil(t, h.agent.Start(ctx))
	h.proven(t, `"secure_boot":true`)
	h.cli(t, "reference", "learn", "--host", h.host, "prod")
	h.cli(t, "reference", "approve", "prod")
	check.Nil(t, h.agent.Stop())
	check.Nil(t, h.agent.Start(ctx))
	l = startLegacy(t, h.exe, h.file)
	check.Eventually(t, 30*time.Second, "the program gets in", func() (bool, string) {
		st := l.last(t)
		user = st.User
		return st.Queries > 10 && strings.HasPrefix(user, "v-"), fmt.Sprintf("%+v\n%s", st, h.why())
	})
	return l, user
}

func (h *measuredHost) why() string {
	out, err := h.broker.CLI(context.Background(), "why", h.host, "billing-db")
	return fmt.Sprint(string(out), err)
}

// A host is trusted by its boot and by what ran on it. A file that nobody
// allowed runs, and within an interval it is failed, and what depended on it
// revoked, with the file's name.
func TestMeasuredHost(t *testing.T) {
	h := newMeasuredHost(t, measuredScope)
	_, user := h.trusted(t)
	for _, fact := range []string{`"kernel_command_line":"/vmlinuz root=/dev/nvme0n1p2`, `"ima":"verified"`, `"proven":44`, `"reference":"prod"`} {
		h.proven(t, fact)
	}
	// why lists the same of each PCR for a person and for a program.
	var why struct {
		PCRs []struct {
			Index              uint32
			Events             string // a uint64 in JSON
			Proven, Understood bool
		}
	}
	check.Nil(t, h.broker.JSON(check.Within(t, time.Minute), &why, "why", h.host, "billing-db"))
	table := strings.Join(strings.Fields(h.cli(t, "why", h.host, "billing-db")), " ")
	seen := map[uint32]bool{}
	for _, p := range why.PCRs {
		seen[p.Index] = p.Proven
		if row := fmt.Sprintf(" %d %s %t %t ", p.Index, p.Events, p.Proven, p.Understood); !strings.Contains(table, row) {
			t.Errorf("the table lacks %q:\n%s", row, table)
		}
	}
	for _, pcr := range []uint32{0, 4, 7, 14} {
		if !seen[pcr] {
			t.Errorf("PCR %d isn't proven: %+v", pcr, why.PCRs)
		}
	}
	if out := h.cli(t, "lease", "export"); !strings.Contains(out, `"machine":{"secure_boot":true,"kernel_command_line":"/vmlinuz root=/dev/nvme0n1p2`) || !strings.Contains(out, `"reference":"prod"}`) {
		t.Errorf("the ledger doesn't tell how the host booted:\n%s", out)
	}
	// What releases announce is expected.
	id := h.leases(t)[0].ID
	manifest := filepath.Join(h.dir, "manifest")
	content := []byte("billingd 2")
	check.Nil(t, os.WriteFile(manifest, fmt.Appendf(nil, "%x  /opt/billing/bin/billingd\n", sha256.Sum256(content)), 0o600))
	h.cli(t, "release", "add", "billingd", "--manifest", manifest)
	h.measure(t, "/opt/billing/bin/billingd", content)
	h.proven(t, `"proven":45`)
	// In maintenance what isn't allowed is told, and let be.
	h.cli(t, "reference", "maintenance", "prod", "--for", "1h")
	h.measure(t, "/usr/bin/updated", []byte("new"))
	h.proven(t, `"unexpected":1`)
	if l := h.leases(t); len(l) != 1 || l[0].ID != id || l[0].State != "live" {
		t.Fatalf("leases: %+v, want %s live", l, id)
	}
	// Restarts of both sides send everything again, and take nothing.
	ctx := check.Within(t, time.Minute)
	check.Nil(t, h.broker.Stop())
	check.Nil(t, h.broker.Start(ctx))
	// Learned and approved, it is allowed when maintenance ends. Until the host
	// has shown its logs to the new broker, there is nothing to learn from.
	check.Eventually(t, 20*time.Second, "it is learned from again", func() (bool, string) {
		out, err := h.broker.CLI(ctx, "reference", "learn", "--host", h.host, "prod")
		if err != nil && !strings.Contains(err.Error(), "has not proven itself since") {
			t.Fatal(err)
		}
		return err == nil, fmt.Sprint(string(out), err)
	})
	h.proven(t, `"unexpected":1`)
	if diff := h.cli(t, "reference", "diff", "prod@1", "prod@2"); !strings.Contains(diff, "/usr/bin/updated is new, with sha256:") {
		t.Errorf("diff: %s", diff)
	}
	h.cli(t, "reference", "approve", "prod")
	h.cli(t, "reference", "maintenance", "prod", "--for", "0s")
	h.proven(t, `"unexpected":0`)

	h.measure(t, "/usr/local/bin/evil", []byte("evil"))
	check.Eventually(t, 10*time.Second, "the host is failed, and its user gone", func() (bool, string) {
		state, reason := h.state(t)
		return state == "failed" && strings.Contains(reason, `"/usr/local/bin/evil"`) && !roleExists(t, user), state + ": " + reason
	})
	h.ended(t, id)
	check.Eventually(t, 10*time.Second, "the file is gone", func() (bool, string) {
		_, err := os.Stat(h.file)
		return os.IsNotExist(err), fmt.Sprint(err)
	})
	// A list that leaves the entry out does not help.
	list := check.Must(os.ReadFile(h.imaList))(t)
	check.Nil(t, os.WriteFile(h.imaList, list[:len(list)-100], 0o600))
	check.Nil(t, h.agent.Stop())
	check.Nil(t, h.agent.Start(ctx))
	check.Eventually(t, 20*time.Second, "the host is failed for the list", func() (bool, string) {
		state, reason := h.state(t)
		return state == "failed" && strings.HasPrefix(reason, "ima-"), state + ": " + reason
	})
}

// A program that the kernel never measured is refused, with all else in order.
func TestUnmeasuredProgram(t *testing.T) {
	h := newMeasuredHost(t, measuredScope)
	l, _ := h.trusted(t)
	l.stop()
	check.Eventually(t, 10*time.Second, "the file is gone with its program", func() (bool, string) {
		_, err := os.Stat(h.file)
		return os.IsNotExist(err), fmt.Sprint(err)
	})
	b := check.Must(os.ReadFile(h.exe))(t)
	check.Nil(t, os.Remove(h.exe))
	check.Nil(t, os.WriteFile(h.exe, append(b, 0), 0o755))
	startLegacy(t, h.exe, h.file)
	check.Eventually(t, 20*time.Second, "`why` says that it wasn't measured", func() (bool, string) {
		said := h.why()
		return strings.Contains(said, "process.measured") && strings.Contains(said, "not in the IMA list"), said
	})
	if _, err := os.Stat(h.file); !os.IsNotExist(err) {
		t.Errorf("the file stands: %v", err)
	}
	if state, _ := h.state(t); state != "trusted" {
		t.Errorf("the host is %s", state)
	}
}

// A boot that differs fails the host by the words of the difference.
func TestAnotherBoot(t *testing.T) {
	h := newMeasuredHost(t, measuredScope)
	_, user := h.trusted(t)
	check.Nil(t, h.tpm.ExtendDigest(7, sha256.Sum256([]byte("a change after boot"))))
	check.Eventually(t, 10*time.Second, "the host is failed, and its user gone", func() (bool, string) {
		state, reason := h.state(t)
		return state == "failed" && strings.Contains(reason, "event-log-replay") && strings.Contains(reason, "PCR 7") && !roleExists(t, user), state + ": " + reason
	})
}
