package e2e_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/process"
)

// A package update replaces the files of units that run: in each sandbox that
// systemd makes of mounts they are told as before, by an agent in a sandbox of
// its own too. Where a unit has users of its own as well as other mounts than
// the agent, it is told again after its restart.
func TestUpdatedUnitsInSandboxes(t *testing.T) {
	m := newMachine(t, unitScope, fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	const sandboxed = "-p PrivateTmp=yes -p ProtectSystem=strict -p ProtectHome=yes"
	for i, tt := range []struct {
		unit          string
		told, byBoxed bool // while it runs the file that was replaced
	}{
		{"", true, true},
		{sandboxed, true, true},
		{sandboxed + " -p User=billing -p NoNewPrivileges=yes", true, true},
		{"-p PrivateUsers=yes", true, false},
		{sandboxed + " -p PrivateUsers=yes", false, false},
	} {
		name := fmt.Sprintf("sandbox%d.service", i)
		for agent, told := range map[string]bool{"": tt.told, "systemd-run -q --pipe --wait -p PrivateTmp=yes -p ProtectSystem=full ": tt.byBoxed} {
			m.sh(t, "mkdir -p /opt/sandbox/bin && cp /bin/sleep /opt/sandbox/bin/napd")
			m.sh(t, fmt.Sprintf("systemd-run -q --collect -p Type=exec --unit=%s %s /opt/sandbox/bin/napd 600", name, tt.unit))
			pid := strings.TrimSpace(m.sh(t, "systemctl show -P MainPID "+name))
			var before, after process.Program
			inspect := agent + "countersign-agent inspect " + pid + " -o json 2>&1"
			if err := json.Unmarshal([]byte(m.sh(t, inspect)), &before); err != nil || before.Main().Path != "/opt/sandbox/bin/napd" || before.Unit() != name {
				t.Errorf("%q, agent %q: %+v, %v", tt.unit, agent, before, err)
			}
			m.sh(t, "cp /bin/cat /opt/sandbox/bin/new && mv /opt/sandbox/bin/new /opt/sandbox/bin/napd")
			out, err := m.try(t, inspect)
			if told && (json.Unmarshal([]byte(out), &after) != nil || after.Main() != before.Main() || after.Unit() != name) {
				t.Errorf("%q, agent %q, updated: %s, before it %+v", tt.unit, agent, out, before)
			}
			if !told && (err == nil || !strings.Contains(out, "a user namespace of its own")) {
				t.Errorf("%q, agent %q, updated: %s, %v", tt.unit, agent, out, err)
			}
			m.sh(t, "systemctl stop "+name)
		}
	}
}
