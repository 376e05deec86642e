package config_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/internal/hclread"
)

const good = `
broker {
  addresses = ["https://[2001:db8::1]:8443", "https://b.example.com:8443"]
  ca_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
}
credential "billing-db" {
  process { unit = "billing.service" }
  file "/etc/billing/db" { template = "x" }
  on_change {
    restart = true
    timeout = "5s"
  }
}
`

func TestDefaults(t *testing.T) {
	a, err := config.Parse("x.hcl", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	c := a.Credentials[0]
	if a.TPM != "/dev/tpmrm0" || a.Key != "p256" || c.Scope != "billing-db" || c.Files[0].Owner != "root" || c.Files[0].FileMode() != 0o400 || c.OnChange.Limit() != 5*time.Second || a.Witness {
		t.Errorf("%+v %+v %+v", a, c, c.Files[0])
	}
}

func TestTheExampleIsValid(t *testing.T) {
	b, err := os.ReadFile("../../../docs/examples/agent.hcl")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Parse("agent.hcl", b); err != nil {
		t.Error(err)
	}
}

func TestMistakes(t *testing.T) {
	for _, tt := range []struct{ old, new, want string }{
		{`"https://b.example.com:8443"`, `"http://b.example.com:8443"`, "not https://HOST:PORT"},
		{`unit = "billing.service"`, ``, "one of unit"},
		{`unit = "billing.service"`, `pid = 7`, "restart and reload need"},
		{`/etc/billing/db`, `/etc/../x`, "not an absolute, clean path"},
		{`template = "x"`, `template = "x" mode = "0644"`, ""}, // not HCL on one line
		{`restart = true`, "restart = true\n    signal = \"SIGHUP\"", "one of signal"},
		{`timeout = "5s"`, `timeout = "5h"`, "not a duration from"},
		{`credential "billing-db"`, `credential "Billing DB"`, "a name is"},
		{`process {`, `proces {`, "Blocks of type"},
	} {
		_, err := config.Parse("x.hcl", []byte(strings.Replace(good, tt.old, tt.new, 1)))
		var p hclread.Problems
		if !errors.As(err, &p) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s → %s: %v, want %q", tt.old, tt.new, err, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = config.Parse("x.hcl", b) })
}
