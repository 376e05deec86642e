package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/test/check"
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

// With the rights that its unit has, the agent tells a library that an update replaced from one that
// a user put in its place.
func TestMappedFilesWithTheUnitsRights(t *testing.T) {
	m := newMachine(t, unitScope, fmt.Sprintf(unitCredential, `signal = "SIGHUP"`))
	unit := string(check.Must(os.ReadFile("../../packaging/systemd/countersign-agent.service"))(t))
	_, rest, _ := strings.Cut(unit, "\nCapabilityBoundingSet=")
	rights, _, _ := strings.Cut(rest, "\n")

	const lib = "/opt/sandbox/lib/libplain.so"
	m.sh(t, "mkdir -p /opt/sandbox/bin /opt/sandbox/lib && cp /bin/sleep /opt/sandbox/bin/napd && cp /lib/x86_64-linux-gnu/libm.so.6 "+lib)
	mapped := func(name string) (of []process.Mapping) {
		t.Helper()
		var p process.Program
		pid := strings.TrimSpace(m.sh(t, "systemctl show -P MainPID "+name))
		out := m.sh(t, fmt.Sprintf("systemd-run -q --pipe --wait -p CapabilityBoundingSet='%s' -p NoNewPrivileges=yes -p ProtectKernelModules=yes countersign-agent inspect %s -o json", rights, pid))
		check.Nil(t, json.Unmarshal([]byte(out), &p))
		if p.Main().Path != "/opt/sandbox/bin/napd" {
			t.Fatalf("%+v", p)
		}
		for _, one := range p.Mappings {
			if strings.Contains(one.Path, "libplain") {
				of = append(of, one)
			}
		}
		return of
	}
	wants := func(what string, got []process.Mapping, path string, deleted bool) {
		t.Helper()
		if len(got) != 1 || got[0].Path != path || got[0].Deleted != deleted {
			t.Errorf("%s: %+v, want %s, deleted %v", what, got, path, deleted)
		}
	}
	for i, how := range []string{"", "-p PrivateTmp=yes -p ProtectSystem=strict -p ProtectHome=yes -p User=billing"} {
		name := fmt.Sprintf("mapped%d.service", i)
		m.sh(t, fmt.Sprintf("systemd-run -q --collect -p Type=exec --unit=%s -p Environment=LD_PRELOAD=%s %s /opt/sandbox/bin/napd 600; sleep 0.3", name, lib, how))
		wants(how, mapped(name), lib, false)
		m.sh(t, "cp "+lib+" /opt/sandbox/lib/new && mv /opt/sandbox/lib/new "+lib)
		wants(how+", updated", mapped(name), lib, true)
		m.sh(t, "systemctl stop "+name)
	}

	const attack = "mount -t tmpfs x /opt/sandbox/lib && cp /lib/x86_64-linux-gnu/libm.so.6 " + lib + " && LD_PRELOAD=" + lib + " exec /opt/sandbox/bin/napd 600"
	m.sh(t, fmt.Sprintf("systemd-run -q --collect --unit=attack.service -p User=billing unshare -Urm sh -c %q; sleep 1", attack))
	wants("a tmpfs of a user's", mapped("attack.service"), process.Foreign+lib, false)
}
