package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// fsck runs it and returns what it reports.
func (b *bench) fsck(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command(check.Must(lab.Program("countersign", false))(t), "fsck", "-c", b.broker.Config(), "-o", "json").Output()
	var report struct {
		Violations []struct{ Invariant, Detail string }
	}
	if jsonErr := json.Unmarshal(out, &report); jsonErr != nil {
		t.Fatalf("fsck: %v: %s", err, out)
	}
	var found []string
	for _, v := range report.Violations {
		found = append(found, v.Invariant+": "+v.Detail)
	}
	if (err != nil) != (len(found) > 0) {
		t.Errorf("fsck: %v with %v", err, found)
	}
	return found
}

// Whoever can write to the store can't say otherwise than the log: each change behind the
// broker's back is found, in a store where everything was done that operators do.
func TestFsckFindsPlantedChanges(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 4*time.Minute)
	cli := func(args ...string) string { t.Helper(); return string(check.Must(b.broker.CLI(ctx, args...))(t)) }
	fresh := func() *lab.SoftHost { return joinerFrom(t, b) }
	join := func(h *lab.SoftHost, token string) *lab.SoftHost {
		t.Helper()
		check.Must(h.Join(ctx, token))(t)
		return h
	}
	issue := func(h *lab.SoftHost, pid int) string {
		t.Helper()
		return check.Must(h.Issue(ctx, dial(t, h), h.IssueBody("soft", check.Must(h.Program(softExe, "billing", pid))(t))))(t).GetLeaseId()
	}

	one, two, three, four, five := joined(t, b, services.TPMCA), joined(t, b, services.TPMCA), fresh(), fresh(), fresh()
	join(three, "") // waits
	join(four, "")
	cli("host", "approve", four.ID, "role=billing")
	join(four, "")
	cli("host", "add", "expected", "a=b", "--ek-hash", five.TPM.EK.Hash().String())
	join(five, "")
	cli("host", "label", one.ID, "x=y")
	cli("host", "label", one.ID, "x-")
	cli("host", "quarantine", two.ID, "--reason", "lost")
	cli("host", "release", two.ID)
	cli("host", "quarantine", two.ID, "--reason", "lost again")
	cli("host", "remove", four.ID)
	cli("host", "reenrol", four.ID)
	anew := check.Must(reimaged(four, b))(t)
	join(anew, "")
	cli("host", "reenrol", five.ID)
	lease, ended := issue(one, 7), issue(one, 8)
	cli("lease", "revoke", ended)
	b.ended(t, ended)
	check.Must(b.broker.JoinToken(ctx, "role=billing"))(t) // nobody spends it
	spent := check.Must(b.broker.JoinToken(ctx, "role=billing"))(t)
	join(fresh(), spent)
	cli("operator", "add", "alice", "--role", "admin", "--out", filepath.Join(b.dir, "alice"))
	cli("operator", "add", "bob", "--role", "viewer", "--out", filepath.Join(b.dir, "bob"))
	cli("operator", "add", "carol", "--role", "viewer", "--out", filepath.Join(b.dir, "carol"))
	cli("operator", "remove", "carol")
	set := filepath.Join(b.dir, "set.json")
	check.Nil(t, os.WriteFile(set, []byte(`{"pcrs": {"0": "`+strings.Repeat("ab", 32)+`"}}`), 0o600))
	cli("reference", "add", "web", "-f", set)
	cli("reference", "add", "web", "-f", set)
	cli("reference", "approve", "web@1")
	cli("reference", "approve", "web@2")
	cli("reference", "maintenance", "web", "--for", "1h")
	finding := b.report(t, seen(func(f *v1.Finding) { f.Host = one.ID })).GetFinding().GetId()
	closed := b.report(t, seen(func(f *v1.Finding) { f.Host, f.Cause = one.ID, "another" })).GetFinding().GetId()
	check.Must(b.operators().CloseFinding(ctx, connect.NewRequest(&v1.CloseFindingRequest{Finding: closed, Reason: "a test"})))(t)
	check.Must(one.Prove(ctx, dial(t, one), nil, &v1.LeaseProof{LeaseId: lease, Scope: "soft", Program: check.Must(one.Program(softExe, "billing", 7))(t)}))(t)

	if found := b.fsck(t); len(found) > 0 {
		t.Fatalf("nothing was planted: %q", found)
	}
	check.Nil(t, b.broker.Stop())
	if found := b.fsck(t); len(found) > 0 {
		t.Fatalf("nothing was planted, and the broker is stopped: %q", found)
	}
	store := filepath.Join(b.broker.State(), "store.db")
	plant(t, store, `SELECT 1`) // its log is in it
	whole := check.Must(os.ReadFile(store))(t)

	for name, statement := range map[string]string{
		"labels":                       `UPDATE hosts SET labels = '{"role":"billing","env":"prod"}' WHERE id = '` + one.ID + `'`,
		"a dropped label":              `UPDATE hosts SET labels = '{}' WHERE id = '` + one.ID + `'`,
		"un-quarantined, to trusted":   `UPDATE hosts SET state = 'trusted', state_reason = '' WHERE id = '` + two.ID + `'`,
		"un-quarantined, to stale":     `UPDATE hosts SET state = 'stale' WHERE id = '` + two.ID + `'`,
		"quarantined":                  `UPDATE hosts SET state = 'quarantined' WHERE id = '` + one.ID + `'`,
		"approved":                     `UPDATE hosts SET state = 'registered', admitted = 1 WHERE id = '` + three.ID + `'`,
		"admitted and trusted":         `UPDATE hosts SET state = 'trusted', admitted = 1 WHERE id = '` + three.ID + `'`,
		"allowed other keys":           `UPDATE hosts SET reenrolling = 1 WHERE id = '` + one.ID + `'`,
		"tier":                         `UPDATE hosts SET tier = 'known' WHERE id = '` + one.ID + `'`,
		"reference set of a host":      `UPDATE hosts SET reference = 'web' WHERE id = '` + one.ID + `'`,
		"AK":                           `UPDATE hosts SET ak_public = x'00' WHERE id = '` + one.ID + `'`,
		"TLS key":                      `UPDATE hosts SET tls_key_hash = '` + strings.Repeat("ab", 32) + `' WHERE id = '` + one.ID + `'`,
		"an EK more":                   `INSERT INTO host_eks (ek_hash, host_id) VALUES ('` + strings.Repeat("ab", 32) + `', '` + one.ID + `')`,
		"an EK less":                   `DELETE FROM host_eks WHERE host_id = '` + two.ID + `'`,
		"an EK that moved":             `UPDATE host_eks SET host_id = '` + three.ID + `' WHERE host_id = '` + two.ID + `'`,
		"a host more":                  `INSERT INTO hosts (id, name, state, admitted, created) VALUES ('planted', 'planted', 'trusted', 1, 1)`,
		"a host less":                  `DELETE FROM hosts WHERE id = '` + two.ID + `'`,
		"an admin":                     `INSERT INTO operators (key_hash, name, role, created, expires) VALUES ('ab', 'mallory', 'admin', 1, 99999999999999)`,
		"a role":                       `UPDATE operators SET role = 'admin' WHERE name = 'bob'`,
		"an operator's key":            `UPDATE operators SET key_hash = 'ab' WHERE name = 'bob'`,
		"an operator's end":            `UPDATE operators SET expires = expires + 1000 WHERE name = 'bob'`,
		"an operator less":             `DELETE FROM operators WHERE name = 'alice'`,
		"a lease less":                 `DELETE FROM grants WHERE id = '` + lease + `'`,
		"an ended lease less":          `DELETE FROM grants WHERE id = '` + ended + `'`,
		"a lease that is live again":   `UPDATE grants SET state = 'live', due = 99999999999999 WHERE id = '` + ended + `'`,
		"a lease that ended":           `UPDATE grants SET state = 'gone', due = 0 WHERE id = '` + lease + `'`,
		"a lease of another host":      `UPDATE grants SET host_id = '` + two.ID + `' WHERE id = '` + ended + `'`,
		"a lease of another scope":     `UPDATE grants SET scope = 'other' WHERE id = '` + lease + `'`,
		"a token that is good again":   `UPDATE join_tokens SET used = 0, used_by = '' WHERE used > 0`,
		"a token more":                 `INSERT INTO join_tokens (hash, name, labels, reference, expires) VALUES ('ab', '', '{}', '', 99999999999999)`,
		"scopes":                       `UPDATE policies SET files = replace(files, 'ontent":"', 'ontent":"Cgoj')`,
		"scopes, a version more":       `INSERT INTO policies SELECT version + 1, files, applied, by_whom FROM policies`,
		"scopes, a version less":       `DELETE FROM policies`,
		"a reference set":              `UPDATE reference_sets SET content = replace(content, 'abab', 'cdcd') WHERE version = 1`,
		"a version approved":           `UPDATE reference_sets SET ends = 0 WHERE version = 1`,
		"a version less":               `DELETE FROM reference_sets WHERE version = 2`,
		"maintenance":                  `UPDATE reference_maintenance SET ends = ends + 3600000`,
		"a finding that is closed":     `UPDATE findings SET status = 'closed' WHERE id = '` + finding + `'`,
		"a finding that is gone":       `DELETE FROM findings WHERE id = '` + finding + `'`,
		"a finding that is open again": `UPDATE findings SET status = 'open' WHERE id = '` + closed + `'`,
	} {
		check.Nil(t, os.WriteFile(store, whole, 0o600))
		plant(t, store, statement)
		found := fmt.Sprint(b.fsck(t))
		if !strings.Contains(found, "as-recorded") && !strings.Contains(found, "nothing-lost") && !strings.Contains(found, "ends-recorded") {
			t.Errorf("%s: found %s", name, found)
		}
	}
}
