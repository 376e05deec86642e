package appraise

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"

	"github.com/countersign/countersign/test/check"
)

// attribute is security.ima as evmctl writes it: a version-2 header over the
// file's digest, or version 3 over fs-verity's.
func attribute(t *testing.T, key crypto.Signer, kind, version byte, digest []byte) []byte {
	t.Helper()
	signed := digest
	if version == 3 {
		sum := sha256.Sum256(append([]byte{kind, 4}, digest...))
		signed = sum[:]
	}
	sig := check.Must(key.Sign(rand.Reader, signed, crypto.SHA256))(t)
	b := append([]byte{kind, version, 4}, 0xde, 0xad, 0xbe, 0xef)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(sig))), sig...)
}

func publicPEM(t *testing.T, key crypto.Signer) string {
	t.Helper()
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: check.Must(x509.MarshalPKIXPublicKey(key.Public()))(t)}))
}

func TestPolicy(t *testing.T) {
	var rsaKey crypto.Signer = check.Must(rsa.GenerateKey(rand.Reader, 2048))(t)
	var ecKey crypto.Signer = check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	var stranger crypto.Signer = check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	sum := func(s string) []byte { d := sha256.Sum256([]byte(s)); return d[:] }
	text := func(s string) string { return fmt.Sprintf("sha256:%x", sum(s)) }
	rules := check.Must(Policy{
		Allow: []Allowed{
			{Path: "/usr/bin/app", Digests: []string{text("app 1"), text("app 2")}},
			{Path: "/usr/lib/**/*.so", Digests: []string{text("library")}},
			{Path: "/usr/bin/ap*", Digests: []string{text("app 3")}},
		},
		Exclude: []string{"/var/tmp/**"},
		Keys:    []string{publicPEM(t, rsaKey), publicPEM(t, ecKey)},
		Files:   "all",
	}.Compile())(t)
	for name, tt := range map[string]struct {
		m    Measurement
		says string // empty: allowed
	}{
		"the aggregate":               {Measurement{Index: 0, Name: "boot_aggregate", Digest: text("?")}, ""},
		"an allowed digest":           {Measurement{Name: "/usr/bin/app", Digest: text("app 1")}, ""},
		"the other generation":        {Measurement{Name: "/usr/bin/app", Digest: text("app 2")}, ""},
		"by a glob beside its path":   {Measurement{Name: "/usr/bin/app", Digest: text("app 3")}, ""},
		"another digest":              {Measurement{Name: "/usr/bin/app", Digest: text("app 4")}, "none of its path's allowed digests"},
		"its digest elsewhere":        {Measurement{Name: "/tmp/app", Digest: text("app 1")}, "of no allowed path"},
		"a library by a glob":         {Measurement{Name: "/usr/lib/a/b/x.so", Digest: text("library")}, ""},
		"another library":             {Measurement{Name: "/usr/lib/a/b/x.so", Digest: text("rootkit")}, "none of its path's"},
		"an excluded path":            {Measurement{Name: "/var/tmp/a/b", Digest: text("anything")}, ""},
		"a violation":                 {Measurement{Violation: true, Name: "/usr/bin/app", Digest: text("app 1")}, "a violation"},
		"an excluded one's violation": {Measurement{Violation: true, Name: "/var/tmp/a"}, "a violation"},
		"signed by RSA":               {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, rsaKey, 3, 2, sum("x"))}, ""},
		"signed by ECDSA":             {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, ecKey, 3, 2, sum("x"))}, ""},
		"fs-verity, signed":           {Measurement{Name: "/x", Digest: "verity:" + text("x"), Signature: attribute(t, ecKey, 6, 3, sum("x"))}, ""},
		"verity's as a file's":        {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, ecKey, 6, 3, sum("x"))}, "by none of the policy's keys"},
		"a file's as verity's":        {Measurement{Name: "/x", Digest: "verity:" + text("x"), Signature: attribute(t, ecKey, 3, 2, sum("x"))}, "by none of the policy's keys"},
		"signed by a stranger":        {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, stranger, 3, 2, sum("x"))}, "by none of the policy's keys"},
		"another file's signature":    {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, rsaKey, 3, 2, sum("y"))}, "by none of the policy's keys"},
		"of another algorithm":        {Measurement{Name: "/x", Digest: fmt.Sprintf("sha512:%x%x", sum("x"), sum("x")), Signature: attribute(t, rsaKey, 3, 2, sum("x"))}, "by none of the policy's keys"},
		"a signature cut":             {Measurement{Name: "/x", Digest: text("x"), Signature: attribute(t, rsaKey, 3, 2, sum("x"))[:40]}, "by none of the policy's keys"},
		"no signature":                {Measurement{Name: "/x", Digest: text("x")}, "is not signed"},
		"escapes in a name":           {Measurement{Name: "/x\x1b[2J", Digest: text("x")}, `"/x\x1b[2J"`},
	} {
		t.Run(name, func(t *testing.T) {
			if name != "the aggregate" {
				tt.m.Index = 7
			}
			why := rules.Judge(tt.m)
			if (why == "") != (tt.says == "") || !strings.Contains(why, tt.says) {
				t.Errorf("%q, want %q", why, tt.says)
			}
		})
	}
	lax := check.Must(Policy{Violations: "ignore", Mode: "observe"}.Compile())(t)
	if why := lax.Judge(Measurement{Index: 3, Violation: true}); why != "" || !lax.Observes() || rules.Observes() {
		t.Errorf("violations ignored: %q", why)
	}
	for files, holds := range map[string]bool{"": false, "root": false, "all": true} {
		r := check.Must(Policy{Files: files}.Compile())(t)
		strict := check.Must(Policy{Files: files, Violations: "reject"}.Compile())(t)
		violation := Measurement{Index: 3, PCR: 10, Violation: true}
		if r.Holds(Measurement{PCR: 15}) != holds || !r.Holds(Measurement{PCR: 10}) || (r.Judge(violation) != "") != holds || strict.Judge(violation) == "" {
			t.Errorf("files = %q", files)
		}
	}
	none := check.Must(Policy{Files: "programs"}.Compile())(t)
	if m := (Measurement{PCR: 10}); none.Holds(m) || !none.Counts(m) || check.Must(Policy{}.Compile())(t).Counts(Measurement{PCR: 15}) {
		t.Error("files = programs")
	}
	_, err := Policy{Allow: []Allowed{{Path: "/a[", Digests: []string{"abc"}}}, Exclude: []string{"/b["}, Keys: []string{"no key"}, Violations: "maybe", Mode: "no", Files: "some"}.Compile()
	for _, says := range []string{`"abc" is no digest`, `"/a[" is not a valid pattern`, `"/b[" is not a valid pattern`, "key 1: no PEM block", `"maybe" is neither`, `"some" is neither`, `"no" is neither`} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("all errors at once: %v, want %q", err, says)
		}
	}
}

// A path with brackets is escaped where it is learned, and is one path: however
// many there are, none is tried as a glob.
func TestEscapedPaths(t *testing.T) {
	text := fmt.Sprintf("sha256:%x", sha256.Sum256(nil))
	var p Policy
	for i := range maxGlobs + 1 {
		p.Allow = append(p.Allow, Allowed{Path: fmt.Sprintf(`/srv/\[id\]\*\\/%d.js`, i), Digests: []string{text}})
	}
	rules := check.Must(p.Compile())(t)
	for name, allowed := range map[string]bool{`/srv/[id]*\/7.js`: true, `/srv/i*\/7.js`: false, `/srv/[id]x\/7.js`: false, `/srv/\[id\]\*\\/7.js`: false} {
		if why := rules.Judge(Measurement{Index: 1, Name: name, Digest: text}); (why == "") != allowed {
			t.Errorf("%s: %q", name, why)
		}
	}
	for _, glob := range []string{`/a\`, `/a[`, `/{a`} {
		if _, err := (Policy{Allow: []Allowed{{Path: glob}}}).Compile(); err == nil {
			t.Errorf("%s is taken", glob)
		}
	}
	p.Allow = nil
	for range maxGlobs + 1 {
		p.Allow = append(p.Allow, Allowed{Path: "/srv/*"})
	}
	if _, err := p.Compile(); err == nil || !strings.Contains(err.Error(), "4097 globs") {
		t.Errorf("many globs: %v", err)
	}
}
