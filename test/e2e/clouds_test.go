package e2e_test

import (
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// The recipes in docs/CLOUDS.md run as they stand there, with command lines in
// the clouds' places that answer as theirs do of one VM with a TPM of the lab.
// The VM then joins by its EK alone.
func TestCloudRecipes(t *testing.T) {
	b := newBroker(t, softScope, false)
	doc := string(check.Must(os.ReadFile("../../docs/CLOUDS.md"))(t))
	for _, c := range []struct {
		from, heading, command, host string
		labels                       map[string]string
		fake                         func(t *testing.T, dir, socket string, eks map[tpm.KeyAlgorithm]string) string
	}{
		{"gce", "Google Compute Engine", "gcloud", "web-1", map[string]string{"cloud": "gce", "zone": "europe-west3-a"}, fakeGcloud},
		{"aws", "AWS", "aws", "i-0123456789abcdef0", map[string]string{"cloud": "aws"}, fakeAWS},
		{"azure", "Azure", "az", "web-2", map[string]string{"cloud": "azure", "resource_group": "prod"}, fakeAz},
	} {
		t.Run(c.from, func(t *testing.T) {
			ctx := check.Within(t, time.Minute)
			dir := folder(t)
			vm := check.Must(lab.StartTPM(ctx, filepath.Join(dir, "tpm"), services.TPMCA, lab.TPMOptions{NoCertificates: true}))(t)
			t.Cleanup(vm.Stop)
			eks := map[tpm.KeyAlgorithm]string{}
			for _, ek := range check.Must(check.Must(collect.Open(vm.Path()))(t).EKs(ctx))(t) {
				key := check.Must(x509.ParsePKIXPublicKey(ek.Public))(t)
				eks[check.Must(tpm.AlgorithmOf(crypto.PublicKey(key)))(t)] = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: ek.Public}))
			}
			check.Nil(t, os.WriteFile(filepath.Join(dir, c.command), []byte("#!/bin/sh\n"+c.fake(t, dir, vm.Socket, eks)), 0o700))

			// All but the import itself, which has no flag for the lab's socket.
			recipe, rest, found := strings.Cut(codeOf(t, doc, c.heading), "countersign host import")
			if !found || strings.TrimSpace(rest) != "-f "+c.from+".json --from "+c.from {
				t.Fatalf("the recipe ends in %q", rest)
			}
			sh := exec.CommandContext(ctx, "sh", "-euc", recipe)
			sh.Dir, sh.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			if out, err := sh.CombinedOutput(); err != nil || len(out) > 0 {
				t.Fatalf("%v\n%s", err, out)
			}
			file := filepath.Join(dir, c.from+".json")
			check.Must(b.broker.CLI(ctx, "host", "import", "-f", file, "--from", c.from))(t)

			agent := check.Must(lab.NewAgent(filepath.Join(dir, "agent"), b.broker, vm.Path(), "", false))(t)
			var joined struct {
				HostID string `json:"host_id"`
			}
			check.Nil(t, json.Unmarshal(check.Must(agent.Join(ctx, ""))(t), &joined))
			var h struct {
				Name, State, Tier string
				Labels            map[string]string
			}
			check.Nil(t, b.broker.JSON(ctx, &h, "host", "show", joined.HostID))
			if h.Name != c.host || h.State != "trusted" || h.Tier != "known" || !maps.Equal(h.Labels, c.labels) {
				t.Errorf("the VM joined as %+v", h)
			}
		})
	}
}

// codeOf is the first shell block under a heading.
func codeOf(t *testing.T, doc, heading string) string {
	t.Helper()
	_, section, found := strings.Cut(doc, "\n## "+heading+"\n")
	if !found {
		t.Fatalf("no heading %q", heading)
	}
	_, code, _ := strings.Cut(section, "\n```sh\n")
	code, _, _ = strings.Cut(code, "\n```\n")
	return code
}

// heredoc is a shell command that prints the text.
func heredoc(text string) string { return "cat <<'END'\n" + text + "\nEND\n" }

func fakeGcloud(t *testing.T, _, _ string, eks map[tpm.KeyAlgorithm]string) string {
	identity := check.Must(json.MarshalIndent(map[string]any{
		"kind":                 "compute#shieldedInstanceIdentity",
		"encryptionKey":        map[string]string{"ekPub": eks[tpm.RSA2048]},
		"eccP256EncryptionKey": map[string]string{"ekPub": eks[tpm.P256]},
	}, "", "  "))(t)
	return "case \"$3\" in\nlist)\n" + heredoc("web-1,europe-west3-a") + ";;\nget-shielded-identity)\n[ \"$4\" = web-1 ]\n" + heredoc(string(identity)) + ";;\nesac\n"
}

func fakeAWS(t *testing.T, _, _ string, eks map[tpm.KeyAlgorithm]string) string {
	script := "case \"$*\" in\n*describe-instances*)\n" + heredoc("i-0123456789abcdef0") + ";;\n"
	for name, alg := range map[string]tpm.KeyAlgorithm{"rsa-2048": tpm.RSA2048, "ecc-sec-p384": tpm.P384} {
		block, _ := pem.Decode([]byte(eks[alg]))
		if block == nil {
			t.Fatalf("the TPM has no %s key: %v", name, slices.Collect(maps.Keys(eks)))
		}
		answer := check.Must(json.MarshalIndent(map[string]string{"InstanceId": "i-0123456789abcdef0", "KeyType": name, "KeyFormat": "der",
			"KeyValue": base64.StdEncoding.EncodeToString(block.Bytes)}, "", "    "))(t)
		script += "*--key-type*" + name + "*)\n" + heredoc(string(answer)) + ";;\n"
	}
	return script + "esac\n"
}

// fakeAz runs the script that is meant for the VM against its TPM, and prints
// what Azure's agent does around its output.
func fakeAz(_ *testing.T, dir, socket string, _ map[tpm.KeyAlgorithm]string) string {
	return fmt.Sprintf(`case "$2" in
list) printf 'web-2\tprod\t6f1c0a52-5c1e-4b8e-9f0d-2b7a3c4d5e6f\n' ;;
run-command)
	while [ "$1" != --scripts ]; do shift; done
	echo 'Enable succeeded: '
	echo '[stdout]'
	TMPDIR=%q TPM2TOOLS_TCTI='cmd:socat - UNIX-CONNECT:%s' sh -c "$2"
	printf '\n[stderr]\n\n'
	;;
esac
`, dir, socket)
}
