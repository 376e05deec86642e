package process_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

func sample() process.Program {
	return process.Program{
		Boot: "2f0c0d5e-0000-4000-8000-000000000001", PID: 412, Start: 90210,
		Exe: "/opt/billing/bin/billingd", SHA256: evidence.Sum([]byte("billingd")),
		User: "billing", UID: 990, GID: 990, Groups: []uint32{990, 4},
		Cgroup: "/system.slice/billing.service", Unit: "billing.service", Invocation: strings.Repeat("ab", 16),
		Mappings: []process.Mapping{{Path: "/lib/x86_64-linux-gnu/libc.so.6"}, {Path: process.Anonymous}},
		Parent:   &process.Parent{PID: 1, Start: 3, Exe: "/usr/lib/systemd/systemd"},
	}
}

func TestOneEncoding(t *testing.T) {
	b, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := process.Parse(b); err != nil {
		t.Fatalf("the honest twin: %v", err)
	}
	for name, forged := range map[string][]byte{
		"trailing space":  append(bytes.Clone(b), ' '),
		"trailing value":  append(bytes.Clone(b), "{}"...),
		"doubled field":   bytes.Replace(b, []byte(`"pid":412`), []byte(`"pid":1,"pid":412`), 1),
		"unknown field":   bytes.Replace(b, []byte(`"pid":412`), []byte(`"pid":412,"argv":"x"`), 1),
		"other case":      bytes.Replace(b, []byte(`"pid":412`), []byte(`"PID":412`), 1),
		"relative exe":    bytes.Replace(b, []byte("/opt/billing/bin"), []byte("opt/billing/bin"), 1),
		"unclean exe":     bytes.Replace(b, []byte("/opt/billing/bin"), []byte("/opt/x/../billing/bin"), 1),
		"newline in unit": bytes.Replace(b, []byte(`"unit":"b`), []byte(`"unit":"\n`), 1),
		"no pid":          bytes.Replace(b, []byte(`"pid":412,`), nil, 1),
		"short digest":    bytes.Replace(b, []byte(`"sha256":"`), []byte(`"sha256":"0`), 1),
		"empty":           nil,
		"null":            []byte("null"),
	} {
		if p, err := process.Parse(forged); err == nil {
			t.Errorf("%s: accepted as %+v", name, p)
		}
	}
}

func TestInstance(t *testing.T) {
	unit := sample()
	other := sample()
	other.PID, other.Start = 500, 91000
	if unit.Instance() != other.Instance() {
		t.Error("two processes of one invocation are two instances")
	}
	other.Invocation = strings.Repeat("cd", 16)
	if unit.Instance() == other.Instance() {
		t.Error("another invocation is the same instance")
	}
	unit.Unit, unit.Invocation = "", ""
	reused := unit
	reused.Start++
	if unit.Instance() == reused.Instance() {
		t.Error("a reused pid is the same instance")
	}
}

func FuzzParse(f *testing.F) {
	b, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
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
// for ever. The files were written by that version.
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
	}
}
