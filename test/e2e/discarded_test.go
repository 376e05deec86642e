package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A broker that is owned empties its store, takes a new key for its audit log, and lets its hosts in
// again under the CA that they have pinned. A host goes with nothing of it until a person on the host
// accepts it, and keeps what the old log had shown.
func TestADiscardedLog(t *testing.T) {
	b := newBench(t, softScope, "", false)
	ctx := check.Within(t, 3*time.Minute)
	status := func() (st struct {
		Proved    time.Time `json:"proved"`
		Problem   string    `json:"problem"`
		Attention string    `json:"attention"`
	}) {
		t.Helper()
		check.Nil(t, json.Unmarshal(check.Must(b.agent.CLI(ctx, "status", "-o", "json"))(t), &st))
		return st
	}
	green := func(since time.Time) {
		t.Helper()
		check.Eventually(t, time.Minute, "the host proves itself", func() (bool, string) {
			st := status()
			return st.Proved.After(since) && st.Problem == "" && st.Attention == "", st.Problem + st.Attention
		})
	}
	green(time.Time{})
	state := filepath.Join(b.agent.Dir, "state")
	held := string(check.Must(os.ReadFile(filepath.Join(state, "host.json")))(t))

	// Another broker's store and audit key, under the same CAs.
	other := check.Must(lab.NewBroker(ctx, filepath.Join(b.dir, "other"), lab.BrokerOptions{}))(t)
	check.Nil(t, b.broker.Stop())
	for _, name := range []string{"store.db", "audit.key", "audit.pub"} {
		for _, left := range []string{"-wal", "-shm"} {
			_ = os.Remove(filepath.Join(b.broker.State(), name+left))
		}
		check.Nil(t, os.Rename(filepath.Join(other.State(), name), filepath.Join(b.broker.State(), name)))
	}
	for _, denials := range check.Must(filepath.Glob(filepath.Join(b.broker.State(), "denials*")))(t) {
		check.Nil(t, os.RemoveAll(denials))
	}
	check.Nil(t, b.broker.Start(ctx))
	discarded := time.Now()
	check.Nil(t, b.agent.Stop())
	check.Nil(t, b.agent.Start(ctx))
	var host string
	check.Eventually(t, time.Minute, "the host asks to be let in", func() (bool, string) {
		var list struct {
			Hosts []struct{ ID string }
		}
		if err := b.broker.JSON(ctx, &list, "host", "list"); err != nil || len(list.Hosts) == 0 {
			return false, status().Problem
		}
		host = list.Hosts[0].ID
		return true, ""
	})
	check.Must(b.broker.CLI(ctx, "host", "approve", host, "role=billing"))(t)
	check.Eventually(t, time.Minute, "the host says that it is another log", func() (bool, string) {
		st := status()
		return strings.Contains(st.Problem, "audit log: it is signed by another key") && strings.Contains(st.Problem, "--accept-new-log"), st.Problem
	})
	if st := status(); st.Proved.After(discarded) {
		t.Errorf("it proved itself to the other log's broker: %+v", st)
	}
	if now := string(check.Must(os.ReadFile(filepath.Join(state, "host.json")))(t)); now != held {
		t.Errorf("the host's state changed:\n%s\n%s", held, now)
	}

	accepted := time.Now()
	check.Must(b.agent.CLI(ctx, "join", "--accept-new-log"))(t)
	green(accepted)
	kept := string(check.Must(os.ReadFile(filepath.Join(state, "abandoned-checkpoints.json")))(t))
	var was struct {
		AuditKey   string `json:"audit_key"`
		Checkpoint []byte `json:"checkpoint"`
	}
	var list []struct {
		AuditKey   string `json:"audit_key"`
		Checkpoint string `json:"checkpoint"`
	}
	check.Nil(t, json.Unmarshal([]byte(held), &was), json.Unmarshal([]byte(kept), &list))
	if len(list) != 1 || list[0].AuditKey != was.AuditKey || list[0].Checkpoint != string(was.Checkpoint) {
		t.Errorf("kept: %s, want of %s", kept, held)
	}
}
