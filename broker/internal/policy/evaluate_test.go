package policy

import (
	"strings"
	"testing"
	"time"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

func billing(t *testing.T) *Set {
	t.Helper()
	set, err := Parse(load(t, "testdata/good"), options)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// Every one starts from the subject that is allowed and changes one fact.
func TestSelectors(t *testing.T) {
	set := billing(t)
	if r := set.Evaluate("billing-db", subject(), noon); r.Outcome != Allowed || len(r.Selectors) != 11 {
		t.Fatalf("the twin is %+v", r)
	}
	risk := int64(50)
	for _, c := range []struct {
		name, selector, saw string
		change              func(f *appraise.Facts)
	}{
		{"another label", "host.labels.env", "test", func(f *appraise.Facts) { f.Host.Labels["env"] = "test" }},
		{"no label", "host.labels.role", "(none)", func(f *appraise.Facts) { delete(f.Host.Labels, "role") }},
		{"tier", "host.tier", "forged", func(f *appraise.Facts) { f.Host.Tier = "forged" }},
		{"another reference", "host.reference", "lab", func(f *appraise.Facts) { f.Host.Reference = "lab" }},
		{"no reference", "host.reference", "(none)", func(f *appraise.Facts) { f.Host.Reference = "" }},
		{"user", "process.user", "root", func(f *appraise.Facts) { f.Program.User = "root" }},
		{"unit", "process.unit", "other.service", func(f *appraise.Facts) { f.Program.Linux.Unit = "other.service" }},
		{"no unit", "process.unit", "(none)", func(f *appraise.Facts) { f.Program.Linux.Unit = "" }},
		{"exe", "process.exe", "/bin/sh", func(f *appraise.Facts) { f.Program.Executables[0].Path = "/bin/sh" }},
		{"digest", "process.sha256", evidence.Sum([]byte("other")).String(), func(f *appraise.Facts) { f.Program.Executables[0].SHA256 = evidence.Sum([]byte("other")) }},
		{"preload", "process.mappings", "/tmp/evil.so", func(f *appraise.Facts) {
			f.Program.Mappings = append(f.Program.Mappings, process.Mapping{Path: "/tmp/evil.so"})
		}},
		{"risk", "when", "false, with a subject.risk of 50", func(f *appraise.Facts) { f.Subject.Risk = &risk }},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := subject()
			c.change(&f)
			r := set.Evaluate("billing-db", f, noon)
			got := find(r, c.selector)
			if r.Outcome != Refused || got.Result != fail || got.Saw != c.saw {
				t.Errorf("%s, %+v; want refused, saw %q", r.Outcome, got, c.saw)
			}
			if r.Reason != "not as the scope wants: "+c.selector {
				t.Errorf("reason is %q", r.Reason)
			}
			if len(r.Selectors) != 11 {
				t.Errorf("%d selectors were evaluated", len(r.Selectors))
			}
		})
	}
}

// windowsProgram is subject with its program on another system.
func windowsProgram() appraise.Facts {
	f := subject()
	f.Program.Linux, f.Program.Windows = nil, &process.Windows{SID: "S-1-5-80-1", Service: "billing"}
	return f
}

func TestBeforeStart(t *testing.T) {
	set := billing(t)
	f := subject()
	if r := set.Evaluate("billing-tls", f, noon); r.Outcome != Allowed {
		t.Fatalf("the running twin is %+v", r)
	}
	f.Program.Starting, f.Program.PID, f.Program.Start, f.Program.Mappings, f.Program.Parent = true, 0, 0, nil, nil
	if r := set.Evaluate("billing-db", f, noon); r.Outcome != Allowed {
		t.Errorf("where the scope allows it: %+v", r)
	}
	if r := set.Evaluate("billing-tls", f, noon); r.Outcome != Refused || find(r, "process.before_start").Result != fail {
		t.Errorf("where the scope doesn't allow it: %+v", r)
	}
}

func TestMappings(t *testing.T) {
	set := billing(t)
	for _, c := range []struct {
		scope, exe string
		m          process.Mapping
		ok         bool
	}{
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/lib/x86_64-linux-gnu/libc.so.6"}, true},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/usr/lib/libz.so.1", Deleted: true}, true},
		{"default", "/opt/app/bin/app", process.Mapping{Path: process.Anonymous}, true},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/opt/app/bin/plugins/a.so"}, true},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/opt/app/lib/server/libjvm.so"}, true},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/opt/app/lib/libjvm.so", Deleted: true}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/opt/other/lib/a.so"}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: process.Foreign + "/usr/lib/a.so", Device: "00:27", Inode: 3}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: process.Foreign + "/usr/lib/a.so", Deleted: true}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: process.Private + "/opt/app/bin/a.so"}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: process.Foreign + "/usr/lib/nginx/modules/a.so"}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/opt/app/bin-evil/a.so"}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/usr/library/a.so"}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/memfd:a", Deleted: true}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/dev/shm/a.so"}, false},
		{"default", "/opt/app/bin/app", process.Mapping{Path: "/var/tmp/a.so"}, false},
		{"default", "/home/u/bin/app", process.Mapping{Path: "/home/u/bin/a.so"}, false},
		{"default", "/tmp/app", process.Mapping{Path: "/tmp/a.so"}, false},
		{"default", "/app", process.Mapping{Path: "/srv/a.so"}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/usr/lib/nginx/modules/a.so"}, true},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/lib/x86_64-linux-gnu/libc.so.6"}, true},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/lib/x/y/libc.so.6"}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/lib/x/libc.so.66"}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/usr/lib/a.so", Deleted: true}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: process.Anonymous}, false},
		{"listed", "/usr/sbin/nginx", process.Mapping{Path: "/usr/sbin/a.so"}, false},
	} {
		f := subject()
		f.Program.User = "www-data"
		f.Program.Executables[0].Path = c.exe
		f.Program.Mappings = []process.Mapping{c.m}
		scope := map[string]string{"default": "billing-tls", "listed": "web-pki"}[c.scope]
		r := set.Evaluate(scope, f, noon)
		if got := find(r, "process.mappings"); (got.Result == pass) != c.ok || (r.Outcome == Allowed) != c.ok {
			t.Errorf("%s, %s with %+v: %s, %+v", c.scope, c.exe, c.m, r.Outcome, got)
		} else if !c.ok && !strings.Contains(got.Saw, c.m.Path) {
			t.Errorf("%+v is not named: %+v", c.m, got)
		}
	}
}

func TestManyMappingsAreSummed(t *testing.T) {
	f := subject()
	for range 100 {
		f.Program.Mappings = append(f.Program.Mappings, process.Mapping{Path: "/tmp/a.so"})
	}
	if got := find(billing(t).Evaluate("billing-tls", f, noon), "process.mappings"); !strings.HasSuffix(got.Saw, "and 95 more") {
		t.Errorf("saw %q", got.Saw)
	}
}

const shim, kernel = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"

// A release that announced the program stands for its digest.
func TestRelease(t *testing.T) {
	set, err := Parse([]File{{"a.hcl", []byte("scope \"a\" {\n host { }\n process { release = \"billingd\" }\n certificate { ttl = \"1h\" }\n}\n")}}, options)
	if err != nil {
		t.Fatal(err)
	}
	f := subject()
	for want, releases := range map[Outcome][]string{Allowed: {"other", "billingd"}, Refused: {"other"}} {
		f.Releases = releases
		if r := set.Evaluate("a", f, time.Now()); r.Outcome != want {
			t.Errorf("%v: %+v, want %s", releases, r, want)
		}
	}
}

// with is a scope of one condition.
func with(host, when string) string {
	text := "scope \"a\" {\n host {\n" + host + "\n}\n process { user = \"billing\" }\n certificate { ttl = \"1h\" }\n"
	if when != "" {
		text += "when = <<EOT\n" + when + "\nEOT\n"
	}
	return text + "}\n"
}

func TestFacts(t *testing.T) {
	yes, verified, risk := true, appraise.IMAVerified, int64(10)
	known := func() appraise.Facts {
		f := subject()
		f.Host.SecureBoot, f.Host.IMA, f.Subject.Risk = &yes, &verified, &risk
		f.Measured, f.Releases = &appraise.Measured{Exe: true}, []string{"billingd"}
		line := "/vmlinuz root=UUID=1234 ro quiet"
		f.Host.EventLog = &appraise.EventLog{SecureBootMode: "user", KernelCommandLine: &line, Images: []string{shim, kernel}, PCRs: []int{0, 4}, LinesComplete: true}
		f.Host.List = &appraise.List{Proven: 43, Violations: 1}
		return f
	}
	no, failed := false, "failed"
	for _, c := range []struct {
		name, host, when string
		facts            func() appraise.Facts
		want             Outcome
	}{
		{"secure boot", "secure_boot = true", "", known, Allowed},
		{"secure boot is off", "secure_boot = true", "", func() appraise.Facts { f := known(); f.Host.SecureBoot = &no; return f }, Refused},
		{"secure boot is absent", "secure_boot = true", "", subject, Fault},
		{"secure boot is absent and unwanted", "secure_boot = false", "", subject, Fault},
		{"ima", `ima = "required"`, "", known, Allowed},
		{"ima failed", `ima = "required"`, "", func() appraise.Facts { f := known(); f.Host.IMA = &failed; return f }, Refused},
		{"ima is absent", `ima = "required"`, "", subject, Fault},
		{"ima, and the program was never measured", `ima = "required"`, "", func() appraise.Facts { f := known(); f.Measured.Exe = false; return f }, Refused},
		{"ima, and code that was never measured", `ima = "required"`, "", func() appraise.Facts { f := known(); f.Measured.Unmeasured = []string{"/lib/x.so"}; return f }, Refused},
		{"a file of the program that the reference set doesn't allow", "", "", func() appraise.Facts { f := known(); f.Measured.Unlisted = []string{"/lib/x.so"}; return f }, Refused},
		{"ima, and nothing is known of the program", `ima = "required"`, "", func() appraise.Facts { f := known(); f.Measured = nil; return f }, Fault},
		{"images", `boot_images = ["` + shim + `", "` + kernel + `"]`, "", known, Allowed},
		{"an image more", `boot_images = ["` + shim + `"]`, "", known, Refused},
		{"images, without an event log", `boot_images = ["` + shim + `"]`, "", subject, Fault},
		{"images, of which none was measured", `boot_images = ["` + shim + `"]`, "", func() appraise.Facts { f := known(); f.Host.EventLog.Images = nil; return f }, Refused},
		{"images, and more that no log shows", `boot_images = ["` + shim + `", "` + kernel + `"]`, "", func() appraise.Facts { f := known(); f.Host.EventLog.Incomplete = []int{4}; return f }, Refused},
		{"a command line", `kernel_command_line = ["/vmlinuz root=UUID=* ro quiet"]`, "", known, Allowed},
		{"a word more", `kernel_command_line = ["/vmlinuz root=UUID=* ro"]`, "", known, Refused},
		{"a command line, and what may be another", `kernel_command_line = ["/vmlinuz root=UUID=* ro quiet"]`, "", func() appraise.Facts { f := known(); f.Host.EventLog.LinesComplete = false; return f }, Refused},
		{"two readings, one of them wrong", `kernel_command_line = ["/vmlinuz root=UUID=* ro quiet"]`, "", func() appraise.Facts {
			f := known()
			f.Host.EventLog.KernelCommandLine, f.Host.EventLog.KernelCommandLines = nil, []string{"/vmlinuz root=UUID=1 ro quiet", "/vmlinuz init=/bin/sh"}
			return f
		}, Refused},
		{"an understood PCR, by condition", "", "4 in host.pcrs_understood && !(7 in host.pcrs_understood)", func() appraise.Facts {
			f := known()
			f.Host.EventLog.States = []boot.PCR{{Index: 4, Understood: true}, {Index: 7}}
			return f
		}, Allowed},
		{"images that aren't all known, by condition", "", "host.boot_images.all(i, i == 'x')", func() appraise.Facts {
			f := known()
			f.Host.EventLog.Images, f.Host.EventLog.Incomplete = nil, []int{4}
			return f
		}, Fault},
		{"boot facts by condition", "", "host.kernel_command_line.contains('quiet') && host.secure_boot_mode == 'user' && host.boot_images.size() == 2 && 4 in host.pcrs_replayed && host.pcrs_incomplete.size() == 0", known, Allowed},
		{"a Windows' log", "", "!host.windows.test_signing && host.windows.hvci && !has(host.windows.vbs) && host.windows.bitlocker == [256] && host.windows.images.size() == 0", func() appraise.Facts {
			f := known()
			f.Host.EventLog.Windows = &boot.Windows{HVCI: &yes, BitLocker: []uint64{256}}
			return f
		}, Allowed},
		{"no Windows' log", "", "has(host.windows)", known, Refused},
		{"boot facts that are absent", "", "host.kernel_command_line != ''", subject, Fault},
		{"files by condition", "", "host.ima_entries == 43 && host.ima_violations == 1 && host.ima_unexpected == 0 && process.measured && 'billingd' in process.releases", known, Allowed},
		{"absent beside a definite no", "secure_boot = true\n tier = [\"known\"]", "", subject, Fault},

		{"risk", "", "subject.risk < 50", known, Allowed},
		{"risk is absent", "", "subject.risk < 50", subject, Fault},
		{"risk is asked for", "", "!has(subject.risk) || subject.risk < 50", subject, Allowed},
		{"secure boot that is off is there", "", "has(host.secure_boot) && !host.secure_boot", func() appraise.Facts { f := known(); f.Host.SecureBoot = &no; return f }, Allowed},
		{"secure boot that is absent is not", "", "has(host.secure_boot)", subject, Refused},
		{"ima by condition", "", "host.ima == 'verified'", known, Allowed},
		{"a parent", "", "process.parent.exe == '/usr/lib/systemd/systemd' && process.parent.pid == 1", subject, Allowed},
		{"no parent", "", "process.parent.pid == 1", func() appraise.Facts { f := subject(); f.Program.Parent = nil; return f }, Fault},
		{"no parent is asked for", "", "has(process.parent)", func() appraise.Facts { f := subject(); f.Program.Parent = nil; return f }, Refused},
		{"an empty unit is not there", "", "has(process.unit) || process.unit != ''", func() appraise.Facts { f := subject(); f.Program.Linux.Unit = ""; return f }, Refused},
		{"labels", "", "host.labels.env == 'prod' && 'role' in host.labels && !('x' in host.labels)", subject, Allowed},
		{"a label that is missing", "", "host.labels.nothing == 'x'", subject, Fault},
		{"pcrs", "", "host.pcrs[0] == '" + evidence.Sum([]byte("zero")).String() + "'", subject, Allowed},
		{"a PCR that was not quoted", "", "host.pcrs[23] == ''", subject, Fault},
		{"mappings", "", "process.mappings.all(m, m.path.startsWith('/usr/lib/') && !m.deleted)", subject, Allowed},
		{"groups", "", "990 in process.groups && process.uid == 990 && process.gid == 990", subject, Allowed},
		{"a program of another system", "", "process.user == 'billing' && process.exe != '' && !has(process.unit) && !has(process.uid) && !has(process.gid) && !has(process.groups) && !has(process.cgroup)", windowsProgram, Allowed},
		{"a fact that another system lacks", "", "process.uid != 0", windowsProgram, Fault},
		{"everything else", "", "host.id == 'h1' && host.name == 'db-client' && host.tier == 'certified' && host.address == '192.0.2.7'" +
			" && host.boot == 'boot' && !has(host.os) && process.exe == '/opt/billing/bin/billingd' && process.cgroup == '' && !process.starting", subject, Allowed},
		{"no program", "", "", func() appraise.Facts { f := subject(); f.Program = nil; return f }, Fault},

		{"UTC by default", "", "now.getHours() == 12", subject, Allowed},
		{"a time zone", "", "now.getHours('Pacific/Auckland') == 1 && now.getDayOfWeek('Pacific/Auckland') == 6", subject, Allowed},
		{"an offset", "", "now.getHours('+02:00') == 14", subject, Allowed},
		{"no such time zone", "", "now.getHours('Mars/' + host.name) == 1", subject, Fault},
		{"division by zero", "", "1 / (process.uid - 990) > 0", subject, Fault},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := parse(t, with(c.host, c.when)).Evaluate("a", c.facts(), noon)
			if r.Outcome != c.want {
				t.Errorf("%+v; want %s", r, c.want)
			}
			if (r.Outcome == Fault) != strings.HasPrefix(r.Reason, "could not be evaluated: ") {
				t.Errorf("%s with reason %q", r.Outcome, r.Reason)
			}
		})
	}
}

func TestTimeZonesAreEmbedded(t *testing.T) {
	t.Setenv("ZONEINFO", "/nonexistent")
	r := parse(t, with("", "now.getHours('Asia/Kathmandu') == 17")).Evaluate("a", subject(), noon)
	if r.Outcome != Allowed {
		t.Errorf("%+v", r)
	}
}

func TestCostLimit(t *testing.T) {
	const when = "process.mappings.all(a, process.mappings.all(b, process.mappings.all(c, a.path + b.path + c.path != '')))"
	set := parse(t, with("", when))
	f := subject()
	if r := set.Evaluate("a", f, noon); r.Outcome != Allowed {
		t.Fatalf("the cheap twin is %+v", r)
	}
	for range process.MaxMappings - 1 {
		f.Program.Mappings = append(f.Program.Mappings, process.Mapping{Path: "/usr/lib/libx.so"})
	}
	r := set.Evaluate("a", f, noon)
	if got := find(r, "when"); r.Outcome != Fault || got.Result != absent || !strings.Contains(got.Saw, "cost limit") {
		t.Errorf("%s, %+v", r.Outcome, got)
	}
	if r := parse(t, with("", "process.mappings.all(m, m.path.startsWith('/usr/lib/'))")).Evaluate("a", f, noon); r.Outcome != Allowed {
		t.Errorf("the most mappings that a program may have cost too much for a plain condition: %+v", find(r, "when"))
	}
}

func TestUnknownScope(t *testing.T) {
	set := billing(t)
	r := set.Evaluate("biling-db", subject(), noon)
	if r.Outcome != Fault || r.Reason != `no scope "biling-db" is in force` || !strings.Contains(find(r, "scope").Saw, `did you mean "billing-db"?`) {
		t.Errorf("%+v", r)
	}
	if r := set.Evaluate(strings.Repeat("x", 1<<20), subject(), noon); r.Outcome != Fault || len(r.Reason)+len(r.Scope)+len(find(r, "scope").Saw) > 400 {
		t.Errorf("a long name is kept: %d bytes", len(r.Reason))
	}
}

// A host reads the reason: it must not learn what would be accepted.
func TestReasonsHoldNoValues(t *testing.T) {
	f := subject()
	f.Program.Linux.Unit, f.Host.Labels["env"] = "other.service", "test"
	r := billing(t).Evaluate("billing-db", f, noon)
	if r.Outcome != Refused || strings.Contains(r.Reason, "billing.service") || strings.Contains(r.Reason, "prod") {
		t.Errorf("%+v", r)
	}
}

func TestConditionsAreChecked(t *testing.T) {
	parse(t, with("", "host.tier == 'known'"))
	for name, c := range map[string]struct{ when, want string }{
		"misspelt fact":     {"host.teir == 'known'", `test.hcl:8: when: no fact is called "teir"; did you mean "tier"?`},
		"misspelt in lists": {"process.mappings.all(m, m.pth != '')", `"pth"; did you mean "path"?`},
		"misspelt variable": {"proces.user == 'x'", `"proces"; did you mean "process"?`},
		"second line":       {"host.tier == 'known' &&\nhost.nam == 'x'", `test.hcl:9: when: no fact is called "nam"; did you mean "name"?`},
		"no bool":           {"host.tier", "true or false; this one is a string"},
		"wrong type":        {"process.uid == 'x'", "no matching overload"},
		"regex":             {"host.name.matches('(')", "invalid matches"},
		"syntax":            {"host.tier ==", "Syntax error"},
		"unknown function":  {"host.name.lower() == 'x'", "lower"},
		"time zone":         {"true &&\nnow.getHours('Europe/Berln') == 1", `test.hcl:9: when: "Europe/Berln" is no time zone`},
		"too long":          {strings.Repeat("true && ", 600) + "true", "at most 4096"},
		"too deep":          {strings.Repeat("(", 500) + "true" + strings.Repeat(")", 500), "recursion limit"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]File{{Name: "test.hcl", Content: []byte(with("", c.when))}}, options)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v; want %q", err, c.want)
			}
		})
	}
}
