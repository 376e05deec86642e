package e2e_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// TestTheftWhileTheBrokerIsAway: what the watch found while it could tell nobody is
// acted on when it can.
func TestTheftWhileTheBrokerIsAway(t *testing.T) {
	dir := folder(t)
	exe, file := copyExe(t, dir, "billingd"), filepath.Join(dir, "db.properties")
	b := newBench(t, fmt.Sprintf(billingScope, exe), fileCredential("billing-db", exe, file, ""), false)
	b.startWatch(t, fmt.Sprintf("sensor \"postgres-stderr\" \"db\" {\n  path            = %q\n  log_line_prefix = %q\n}\n", services.PG.Log, lab.LogLinePrefix))
	user, password := startLegacy(t, exe, file).getsIn(t, file)
	id := b.leaseOf(t, user).ID
	// The watch has heard of the lease before it is alone.
	time.Sleep(2 * time.Second)
	check.Nil(t, b.broker.Stop())
	check.Nil(t, services.PG.LoginFrom(check.Within(t, 10*time.Second), "127.0.0.9", user, password, "billing"))
	time.Sleep(5 * time.Second)
	if !roleExists(t, user) {
		t.Fatal("the role is gone without anybody's word")
	}
	check.Nil(t, b.broker.Start(check.Within(t, time.Minute)))
	check.Eventually(t, time.Minute, "the copied credential is revoked", func() (bool, string) {
		return !roleExists(t, user), "the role stands"
	})
	if got := b.findings(t, id); len(got) != 1 || got[0].Detector != "foreign-source" || got[0].Response != "revoke" {
		t.Errorf("found %+v, want one foreign-source that was acted on", got)
	}
}
