package deliver

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"encoding/xml"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
)

func one(value string) map[string]secret.Bytes {
	return map[string]secret.Bytes{"password": secret.New([]byte(value)), "db-user": secret.New([]byte("u"))}
}

// values are such as a password generator, or an attacker, comes up with.
var values = []string{
	"s3cret", "", " s3cret ", "a:b\\c", `"q'q"` + "`$(id)`$HOME", "new\nline: x", "cr\rlf\r\n", "tab\t", "#!=:", "ünïcode €", "😀", "\u2028\u2029\u0085\ufeff",
	"\x7f\x1b[31m", "{{ .password }}", "<a>&amp;]]>", "- yes", "~", "%s%d", `\`, `\\n`, "a\x00b", "\ufffe", "\ufffd",
}

// TestEncoders writes each value and has the format's own reader read it.
func TestEncoders(t *testing.T) {
	for _, tt := range []struct {
		encoder string
		cannot  func(value string) bool
		read    func(t *testing.T, encoded string) string
	}{
		{"json", nil, func(t *testing.T, s string) (v string) {
			check.Nil(t, json.Unmarshal([]byte(s), &v))
			return v
		}},
		{"yaml", nil, func(t *testing.T, s string) string {
			var v map[string]string
			check.Nil(t, yaml.Unmarshal([]byte("a: "+s+"\nb: c\n"), &v))
			if v["b"] != "c" || len(v) != 2 {
				t.Errorf("%d keys", len(v))
			}
			return v["a"]
		}},
		{"xml", func(v string) bool { return strings.ContainsAny(v, "\x00\x1b\ufffe") }, func(t *testing.T, s string) string {
			var v struct {
				A    string `xml:"a,attr"`
				Text string `xml:",chardata"`
			}
			check.Nil(t, xml.Unmarshal([]byte(`<x a="`+s+`">`+s+`</x>`), &v))
			if v.A != v.Text {
				t.Errorf("attribute %q, text %q", v.A, v.Text)
			}
			return v.Text
		}},
		{"shell", func(v string) bool { return strings.Contains(v, "\x00") }, func(t *testing.T, s string) string {
			cmd := exec.Command("sh")
			cmd.Stdin = strings.NewReader("A=" + s + "\nprintf %s \"$A\"")
			out, err := cmd.Output()
			check.Nil(t, err)
			return string(out)
		}},
		{"properties", nil, readProperties},
		{"pgpass", func(v string) bool { return strings.ContainsAny(v, "\x00\r\n") }, readPgpass},
		{"plain", func(v string) bool { return strings.ContainsFunc(v, control) }, func(_ *testing.T, s string) string { return s }},
	} {
		t.Run(tt.encoder, func(t *testing.T) {
			for _, v := range values {
				got, err := Render("{{ .password | "+tt.encoder+" }}", one(v))
				if tt.cannot != nil && tt.cannot(v) {
					if err == nil {
						t.Errorf("%q was written", v)
					} else if !strings.Contains(err.Error(), `field "password"`) || len(v) > 3 && strings.Contains(err.Error(), v) {
						t.Errorf("error %q", err)
					}
					continue
				}
				if err != nil {
					t.Errorf("%q: %v", v, err)
				} else if v == "" && tt.encoder == "pgpass" {
					continue // no password to libpq
				} else if read := tt.read(t, string(got.Reveal())); read != v {
					t.Errorf("%q was read as %q from %q", v, read, got.Reveal())
				}
			}
		})
	}
}

// readProperties follows the rules of java.util.Properties.load for the value
// of one line.
func readProperties(t *testing.T, s string) string {
	t.Helper()
	var units []rune
	s = strings.TrimLeft(s, " \t\f")
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 0x7f || c < 0x20 {
			t.Fatalf("byte %#x in a properties file", c)
		}
		if c != '\\' {
			units = append(units, rune(c))
			continue
		}
		i++
		switch s[i] {
		case 'n':
			units = append(units, '\n')
		case 'r':
			units = append(units, '\r')
		case 't':
			units = append(units, '\t')
		case 'u':
			var v string // JSON's \u is the same, surrogates too
			end := i + 5
			if strings.HasPrefix(s[end:], `\uD`) && s[i+1] == 'D' {
				end += 6
			}
			check.Nil(t, json.Unmarshal([]byte(`"`+s[i-1:end]+`"`), &v))
			units = append(units, []rune(v)...)
			i = end - 1
		default:
			units = append(units, rune(s[i]))
		}
	}
	return string(units)
}

// readPgpass has psql look the password up in a file, and takes it from what it
// sends.
func readPgpass(t *testing.T, s string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check.Nil(t, err)
	defer func() { _ = listener.Close() }()
	file := filepath.Join(t.TempDir(), "pgpass")
	check.Nil(t, os.WriteFile(file, []byte("*:*:*:other:wrong\n*:*:*:u:"+s+"\n"), 0o600))
	got := make(chan string, 1)
	go func() {
		defer close(got)
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		b := make([]byte, 4096)
		if _, err := c.Read(b); err != nil {
			return
		}
		_, _ = c.Write([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 3}) // the password in clear, please
		n, err := c.Read(b)
		if err == nil && n > 6 && b[0] == 'p' {
			got <- string(b[5 : n-1])
		}
	}()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	cmd := exec.Command("psql", "-w", "-c", "select", "postgres://u@127.0.0.1:"+port+"/db?sslmode=disable&gssencmode=disable")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "PGPASSFILE=" + file, "HOME=" + t.TempDir()}
	if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState == nil {
		t.Fatalf("psql (install postgresql-client): %v: %s", err, out)
	}
	_ = listener.Close()
	return <-got
}

func TestTemplate(t *testing.T) {
	key := make([]byte, 100)
	_, _ = rand.Read(key)
	block := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	fields := map[string]secret.Bytes{"username": secret.New([]byte("u1")), "password": secret.New([]byte("s3cret:x")), "line": secret.New([]byte("s3cret\nx")),
		"private_key": secret.New([]byte(block)), "chain": secret.New([]byte(block + block)), "latin1": secret.New([]byte("s3cret\xe9")),
		"half": secret.New([]byte(block[:60])), "after": secret.New([]byte(block + "s3cret")), "broken": secret.New([]byte("-----BEGIN s3cret\n" + block)), "db-user": secret.New([]byte("u2"))}
	for _, tt := range []struct{ template, want, err string }{
		{"user={{ .username }}\n", "user=u1\n", ""},
		{"{{- .username -}} \n{{ .password | pgpass }}", `u1s3cret\:x`, ""},
		{"{{ pgpass .password }}", `s3cret\:x`, ""},
		{"{{ .line | json | shell }}", `'"s3cret\u000ax"'`, ""},
		{`{{ index . "db-user" | json }}{{/* why */}}{{ "{{" }}`, `"u2"{{`, ""},
		{"", "", ""}, {"no field\n", "no field\n", ""}, {"{{/* nothing */}}", "", ""},
		{"{{ .private_key | pem }}{{ .chain | pem }}", block + block + block, ""},
		{"{{ .private_key | yaml }}", `"` + strings.ReplaceAll(block, "\n", `\u000a`) + `"`, ""},

		{"{{ .private_key }}", "", "through pem"},
		{"\n\n{{ .line }}", "", `line 3: field "line"`},
		{"{{ .line | pgpass }}", "", "line break"},
		{"{{ .latin1 | json }}", "", "not UTF-8"},
		{"{{ .password | pem }}", "", "not PEM"}, {"{{ .half | pem }}", "", "not whole PEM"}, {"{{ .after | pem }}", "", "not PEM"}, {"{{ .broken | pem }}", "", "not whole PEM"},
		{"{{ .nothing }}", "", "none of this name; it has after, broken"},
	} {
		got, err := Render(tt.template, fields)
		if tt.err != "" {
			check.Silent(t, err, "s3cret", tt.err)
			if strings.Contains(err.Error(), block[40:60]) {
				t.Errorf("%s: the key is in the error", tt.template)
			}
			continue
		}
		if err != nil || string(got.Reveal()) != tt.want {
			t.Errorf("%s: %q, %v", tt.template, got.Reveal(), err)
		}
	}
	fields["password"] = secret.New(bytes.Repeat([]byte("s3cret:"), 100_000))
	if _, err := Render("{{ .password }}", fields); err != nil {
		t.Error(err)
	}
	_, err := Render("{{ .password }}{{ .password }}", fields)
	check.Silent(t, err, "s3cret", "larger than")
	_, err = Render("{{ .password | json | json | json | json | json }}{{ .password | pgpass}}", fields)
	check.Silent(t, err, "s3cret", "larger than")
}

// TestValidate: nothing that could leak, read or loop is part of a template.
func TestValidate(t *testing.T) {
	if err := Validate("a\n{{ .password | json }}"); err != nil {
		t.Fatal(err)
	}
	for template, words := range map[string]string{
		"\n\n{{ .a | upper }}":            `:3: function "upper" not defined`,
		"{{ .a":                           "unclosed action",
		"{{ .db-user }}":                  `index . "db-password"`,
		"\n{{ if .a }}x{{ end }}":         "line 2: only fields",
		"{{ range 1000000000 }}{{ end }}": "only fields",
		"{{ range .a }}{{ end }}":         "only fields",
		"{{ with .a }}{{ . }}{{ end }}":   "only fields",
		"{{ template \"x\" }}":            "only fields",
		`{{ define "x" }}{{ end }}`:       "define and block",
		`{{ block "x" . }}{{ end }}`:      "define and block",
		"{{ $x := .a }}":                  "variables",
		"{{ .a.b }}":                      "one name",
		"{{ . }}":                         "a value is a field",
		"{{ 7 }}":                         "a value is a field",
		"{{ nil }}":                       "a value is a field",
		"{{ (.a) }}":                      "a value is a field",
		"{{ json .a .b }}":                "takes one value",
		"{{ json }}":                      "takes one value",
		"{{ .a | json .b }}":              "after |",
		"{{ .a | index }}":                "after |",
		"{{ index .a 0 }}":                "index is written",
		"{{ .a .b }}":                     "one name",
		`{{ "x" | json }}`:                "needs no encoder",
	} {
		check.Silent(t, Validate(template), "s3cret", words)
	}
	for _, builtin := range []string{"printf", "print", "println", "html", "js", "urlquery", "call", "slice", "len", "eq", "and", "or", "not", "file", "env", "exec"} {
		check.Silent(t, Validate("{{ "+builtin+" .a }}"), "s3cret", "not defined", builtin)
	}
	check.Silent(t, Validate(strings.Repeat("x", MaxContent+1)), "s3cret", "at most")
}

// FuzzRender: whatever a value holds, it stays inside its place.
func FuzzRender(f *testing.F) {
	for _, v := range values {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		out, err := Render(`{{ .password }}`, one(v))
		if err == nil && (string(out.Reveal()) != v || strings.ContainsFunc(v, control)) {
			t.Errorf("plain: %q from %q", out.Reveal(), v)
		}
		if !utf8.ValidString(v) {
			if err == nil {
				t.Errorf("%q was written", v)
			}
			return
		}
		out, err = Render(`{"a":{{ .password | json }},"b":1}`, one(v))
		check.Nil(t, err)
		var j map[string]any
		check.Nil(t, json.Unmarshal(out.Reveal(), &j))
		if j["a"] != v || len(j) != 2 {
			t.Errorf("json: %q", out.Reveal())
		}
		out, err = Render("a: {{ .password | yaml }}\nb: 1\n", one(v))
		check.Nil(t, err)
		var y map[string]any
		check.Nil(t, yaml.Unmarshal(out.Reveal(), &y))
		if y["a"] != v || len(y) != 2 {
			t.Errorf("yaml: %q", out.Reveal())
		}
		if out, err = Render(`<x a="{{ .password | xml }}"/>`, one(v)); err == nil {
			var x struct {
				A string `xml:"a,attr"`
			}
			check.Nil(t, xml.Unmarshal(out.Reveal(), &x))
			if x.A != v {
				t.Errorf("xml: %q", out.Reveal())
			}
		}
		out, err = Render(`{{ .password | properties }}`, one(v))
		check.Nil(t, err)
		if read := readProperties(t, string(out.Reveal())); read != v {
			t.Errorf("properties: %q from %q", read, out.Reveal())
		}
		if out, err = Render(`{{ .password | pgpass }}`, one(v)); err == nil && bytes.ContainsAny(out.Reveal(), "\r\n\x00") {
			t.Errorf("pgpass: %q", out.Reveal())
		}
		if out, err = Render(`{{ .password | pem }}`, one(v)); err == nil && strings.ContainsFunc(strings.ReplaceAll(string(out.Reveal()), "\n", ""), control) {
			t.Errorf("pem: %q", out.Reveal())
		}
	})
}
