package process_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

func sample() process.Program {
	return process.Program{
		Boot: "2f0c0d5e-0000-4000-8000-000000000001", PID: 412, Start: 90210, User: "billing",
		Executables: []process.Executable{{Path: "/opt/billing/bin/billingd", Role: process.Main, SHA256: evidence.Sum([]byte("billingd"))}},
		Linux: &process.Linux{UID: 990, GID: 990, Groups: []uint32{990, 4},
			Cgroup: "/system.slice/billing.service", Unit: "billing.service", Invocation: strings.Repeat("ab", 16)},
		Mappings: []process.Mapping{{Path: "/lib/x86_64-linux-gnu/libc.so.6"}, {Path: process.Anonymous}},
		Parent:   &process.Parent{PID: 1, Start: 3, Exe: "/usr/lib/systemd/systemd"},
	}
}

// samples are programs of each kind that has a place in the encoding.
func samples() map[string]process.Program {
	scripted := sample()
	scripted.Executables = append(scripted.Executables, process.Executable{Path: "/opt/billing/run.py", Role: process.Script, SHA256: evidence.Sum([]byte("run"))})
	scripted.Mappings[0].Device, scripted.Mappings[0].Inode = "fd:01", 1<<63
	windows := sample()
	windows.Linux, windows.Windows = nil, &process.Windows{SID: "S-1-5-80-1", Service: "billing"}
	windows.Executables[0].Path = `C:\Program Files\Billing & Co\billingd.exe`
	starting := windows
	starting.PID, starting.Start, starting.Starting = 0, 0, true
	return map[string]process.Program{"a unit": sample(), "a script": scripted, "a Windows service": windows, "one that starts": starting}
}

func TestOneEncoding(t *testing.T) {
	for _, version := range []int{1, process.Version} {
		b, err := sample().EncodeAs(version)
		if err != nil {
			t.Fatal(err)
		}
		p, err := process.Parse(b)
		if err != nil {
			t.Fatalf("the honest twin: %v", err)
		}
		if p.Main() != sample().Main() || p.Instance() != sample().Instance() {
			t.Errorf("version %d: %+v", version, p)
		}
		for name, forged := range map[string][]byte{
			"trailing space":      append(bytes.Clone(b), ' '),
			"trailing value":      append(bytes.Clone(b), "{}"...),
			"doubled field":       bytes.Replace(b, []byte(`"pid":412`), []byte(`"pid":1,"pid":412`), 1),
			"other case":          bytes.Replace(b, []byte(`"pid":412`), []byte(`"PID":412`), 1),
			"both cases":          bytes.Replace(b, []byte(`{"boot":`), []byte(`{"Boot":"x","boot":`), 1),
			"a letter that folds": bytes.Replace(b, []byte(`"version":2`), []byte(`"version":2,"ſtarting":true`), 1),
			"another order":       bytes.Replace(b, []byte(`"pid":412,"start":90210`), []byte(`"start":90210,"pid":412`), 1),
			"null":                bytes.Replace(b, []byte(`"pid":412`), []byte(`"pid":null`), 1),
			"null as a part":      bytes.Replace(b, []byte(`"parent":{"exe":"/usr/lib/systemd/systemd","pid":1,"start":3}`), []byte(`"parent":null`), 1),
			"another escape":      bytes.Replace(b, []byte(`"billing"`), []byte(`"\u0062illing"`), 1),
			"relative exe":        bytes.Replace(b, []byte("/opt/billing/bin"), []byte("opt/billing/bin"), 1),
			"unclean exe":         bytes.Replace(b, []byte("/opt/billing/bin"), []byte("/opt/x/../billing/bin"), 1),
			"newline in unit":     bytes.Replace(b, []byte(`"unit":"b`), []byte(`"unit":"\n`), 1),
			"no pid":              bytes.Replace(b, []byte(`"pid":412,`), nil, 1),
			"short digest":        bytes.Replace(b, []byte(`"sha256":"`), []byte(`"sha256":"0`), 1),
			"no invocation":       bytes.Replace(b, []byte(`"invocation":"`+strings.Repeat("ab", 16)+`",`), nil, 1),
			"another version":     bytes.Replace(b, []byte(`"version":2`), []byte(`"version":3`), 1),
			"version as text":     bytes.Replace(b, []byte(`"version":2`), []byte(`"version":"2"`), 1),
			"no main":             bytes.Replace(b, []byte(`"role":"main"`), []byte(`"role":"script"`), 1),
			"no executables":      regexp.MustCompile(`"executables":\[.*?\],`).ReplaceAll(b, nil),
			"on two systems":      bytes.Replace(b, []byte(`"version":2`), []byte(`"version":2,"windows":{"sid":"S-1-5"}`), 1),
			"empty":               nil,
			"null alone":          []byte("null"),
			"a list":              []byte("[]"),
		} {
			if bytes.Equal(forged, b) {
				if version == process.Version && name != "no invocation" {
					t.Errorf("%s: not forged", name)
				}
				continue
			}
			if p, err := process.Parse(forged); err == nil {
				t.Errorf("version %d: %s: accepted as %+v", version, name, p)
			}
		}
	}
	b, err := sample().EncodeAs(1)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := process.Parse(bytes.Replace(b, []byte(`"pid":412`), []byte(`"pid":412,"argv":"x"`), 1)); err == nil {
		t.Errorf("the first version has an unknown fact: %+v", p)
	}
}

// Each kind comes back as it was, over the wire and in what a broker records.
func TestRoundTrip(t *testing.T) {
	for name, p := range samples() {
		b, err := p.Encode()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		read, err := process.Parse(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		again, err := read.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: %s came back as %s, %v", name, b, again, err)
		}
		recorded, err := json.Marshal(map[string]process.Program{"program": read})
		if err != nil {
			t.Fatal(err)
		}
		var back map[string]process.Program
		if err := json.Unmarshal(recorded, &back); err != nil || !reflect.DeepEqual(back["program"], p) {
			t.Errorf("%s: recorded %s, read as %+v, %v", name, recorded, back["program"], err)
		}
	}
}

// What a newer agent adds is kept byte for byte, and changes nothing else.
func TestFactsOfANewerAgent(t *testing.T) {
	plain, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, add := range map[string][2]string{
		"of the program":      {`"boot":`, `"a_new_fact":{"deep":[1,2.50,{"x":"\u003c\u0026\u003e\u2028"}]},"boot":`},
		"of Linux":            {`"cgroup":`, `"capabilities":["cap_chown"],"cgroup":`},
		"of an executable":    {`"role":"main",`, `"role":"main","seal":true,`},
		"of a mapping":        {`{"path":"[anonymous]"}`, `{"path":"[anonymous]","size":4096}`},
		"of the parent":       {`"pid":1,`, `"pid":1,"sid":7,`},
		"a role":              {`}],"linux"`, `},{"path":"/x","role":"container_image","sha256":"` + strings.Repeat("a1", 32) + `"}],"linux"`},
		"of another system":   {`"version":2`, `"version":2,"zos":{"job":"x"}`},
		"a number of its own": {`"version":2`, `"version":2,"x":1e400`},
	} {
		b := []byte(strings.Replace(string(plain), add[0], add[1], 1))
		p, err := process.Parse(b)
		if err != nil || bytes.Equal(b, plain) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if again, err := p.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: came back as %s, %v", name, again, err)
		}
		if p.Main() != sample().Main() || p.Instance() != sample().Instance() || !reflect.DeepEqual(p.Linux, sample().Linux) || !reflect.DeepEqual(p.Mappings, sample().Mappings) {
			t.Errorf("%s: read as %+v", name, p)
		}
	}
}

func TestBounds(t *testing.T) {
	for name, edit := range map[string]func(*process.Program){
		"executables": func(p *process.Program) {
			for range process.MaxExecutables {
				p.Executables = append(p.Executables, process.Executable{Path: "/x", Role: process.Script, SHA256: p.Main().SHA256})
			}
		},
		"mappings": func(p *process.Program) { p.Mappings = make([]process.Mapping, process.MaxMappings+1) },
		"groups":   func(p *process.Program) { p.Linux.Groups = make([]uint32, process.MaxGroups+1) },
		"a path":   func(p *process.Program) { p.Executables[0].Path = "/" + strings.Repeat("x", 5000) },
		"a SID":    func(p *process.Program) { p.Linux, p.Windows = nil, &process.Windows{SID: "S-1-5-x"} },
		"all of it": func(p *process.Program) {
			for range 200 {
				p.Mappings = append(p.Mappings, process.Mapping{Path: "/" + strings.Repeat("x", 4000)})
			}
		},
	} {
		p := sample()
		edit(&p)
		if b, err := p.Encode(); err == nil {
			t.Errorf("%s: encoded in %d bytes", name, len(b))
		}
	}
	long := []byte(`{"boot":"` + strings.Repeat("x", process.MaxEncoded) + `"}`)
	if _, err := process.Parse(long); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Error(err)
	}
}

func TestInstance(t *testing.T) {
	unit := sample()
	other := sample()
	other.PID, other.Start = 500, 91000
	if unit.Instance() != other.Instance() {
		t.Error("two processes of one invocation are two instances")
	}
	other.Linux.Invocation = strings.Repeat("cd", 16)
	if unit.Instance() == other.Instance() {
		t.Error("another invocation is the same instance")
	}
	unit.Linux.Unit, unit.Linux.Invocation = "", ""
	reused := unit
	reused.Start++
	if unit.Instance() == reused.Instance() {
		t.Error("a reused pid is the same instance")
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range samples() {
		b, err := p.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"boot":"b","pid":1,"start":1,"exe":"/x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := process.Parse(b)
		if err != nil {
			return
		}
		again, err := p.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q came back as %q, %v", b, again, err)
		}
	})
}

// What agents of the first version sent, and brokers keep with leases, is read
// for ever. The files in v1 were written by that version; those in v2 are the same
// programs in the second.
func TestFirstVersion(t *testing.T) {
	files, err := filepath.Glob("testdata/v1/*.json")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		p, err := process.Parse(b)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if again, err := p.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: came back as %s, %v", file, again, err)
		}

		// What the agents of today send to a broker of then.
		var made process.Program
		if err := json.Unmarshal(b, &made); err != nil {
			t.Fatal(err)
		}
		if again, err := made.EncodeAs(1); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: made anew as %s, %v", file, again, err)
		}
		// What they send to a broker of now.
		second, err := made.Encode()
		if err != nil {
			t.Fatal(err)
		}
		recorded := strings.Replace(file, "v1", "v2", 1)
		if want, err := os.ReadFile(recorded); err != nil || !bytes.Equal(second, want) {
			t.Errorf("%s: %s, %v", recorded, second, err)
		}
		// A broker keeps it inside of a lease.
		for _, b := range [][]byte{b, second} {
			inside, err := json.Marshal(json.RawMessage(b))
			if err != nil {
				t.Fatal(err)
			}
			var read process.Program
			if err := json.Unmarshal(inside, &read); err != nil || read.Main() != p.Main() || !reflect.DeepEqual(read.Linux, p.Linux) {
				t.Errorf("%s: kept as %s, read as %+v, %v", file, inside, read, err)
			}
			if bytes.Equal(b, second) && !bytes.Equal(inside, second) {
				t.Errorf("%s: kept as %s", file, inside)
			}
		}
		if same, err := process.Parse(second); err != nil || same.Instance() != p.Instance() || same.Main() != p.Main() || !reflect.DeepEqual(same.Linux, p.Linux) {
			t.Errorf("%s: in the second version %+v, in the first %+v, %v", file, same, p, err)
		}
	}
}

// A reader of the first version would take another system's program for one of uid 0.
func TestOtherSystemsAreNotToldAsLinux(t *testing.T) {
	p := process.Program{Boot: "0f0e0d0c-0b0a-4908-8706-050403020100", PID: 7, Start: 1, User: `CORP\svc`,
		Executables: process.OneFile("/c/app.exe", evidence.Sum([]byte("app"))), Windows: &process.Windows{SID: "S-1-5-21-1"}}
	if _, err := p.Encode(); err != nil {
		t.Fatal(err)
	}
	if b, err := p.EncodeAs(1); err == nil || !strings.Contains(err.Error(), "Linux") {
		t.Errorf("told as %s, %v", b, err)
	}
}
