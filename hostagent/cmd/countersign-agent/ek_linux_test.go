package main

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/hostagent/internal/ekcert"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// The ek scripts have a TPM of each maker without certificates, and the makers'
// servers behind a proxy: Intel's answers JSON, AMD's DER. The program is the one
// that hosts have; it finds the proxy and the servers' CA by the environment.
func TestEKScripts(t *testing.T) {
	ca := check.Must(lab.NewTPMCA(t.TempDir()))(t)
	real := check.Must(lab.StartTPM(t.Context(), filepath.Join(t.TempDir(), "tpm"), ca, lab.TPMOptions{NoCertificates: true}))(t)
	t.Cleanup(real.Stop)
	eks := check.Must(check.Must(collect.Open(real.Path()))(t).EKs(t.Context()))(t)

	s := &servers{answers: map[string][]byte{}}
	m := check.Must(lab.NewMakers(t.TempDir(), s.answer, "ekop.intel.com", "ftpm.amd.com"))(t)
	t.Cleanup(m.Close)

	files := t.TempDir()
	env := []string{"HTTPS_PROXY=" + m.Proxy, "SSL_CERT_FILE=" + m.CAFile, "PROXY=" + m.Proxy, "FILES=" + files}
	for maker, manufacturer := range map[string]string{"INTEL": "INTC", "AMD": "AMD\x00", "IBM": "IBM\x00"} {
		path := check.Must(real.Disguise(t.Context(), filepath.Join(t.TempDir(), "s"), manufacturer))(t)
		env = append(env, maker+"="+path)
	}
	for i, ek := range eks {
		key := check.Must(x509.ParsePKIXPublicKey(ek.Public))(t)
		der := check.Must(ca.IssueEK(key))(t)
		newer := check.Must(ca.IssueEK(key))(t)
		check.Nil(t, os.WriteFile(filepath.Join(files, fmt.Sprintf("ek%d.der", i)), der, 0o600))
		check.Nil(t, os.WriteFile(filepath.Join(files, fmt.Sprintf("newer%d.der", i)), newer, 0o600))
		s.certify(t, ek, der)
		env = append(env, fmt.Sprintf("HASH%d=%s", i, ek.Hash()), fmt.Sprintf("URL%d=%s", i, check.Must(ekcert.URL("INTC", ek))(t)))
	}
	other := check.Must(lab.NewSoftTPM(ca))(t)
	check.Nil(t, os.WriteFile(filepath.Join(files, "other.der"), other.EK.Certificate, 0o600))

	testscript.Run(t, testscript.Params{Dir: "testdata/ek",
		Setup: func(e *testscript.Env) error {
			e.Vars = append(e.Vars, env...)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// serve makes the makers' servers answer: all, none, first, garbage.
			"serve": func(ts *testscript.TestScript, _ bool, args []string) { s.set(args[0]) },
			// asked compares how many requests there were since it was last called.
			"asked": func(ts *testscript.TestScript, _ bool, args []string) {
				if got := fmt.Sprint(s.count(m)); got != args[0] {
					ts.Fatalf("%s requests, want %s: %v", got, args[0], m.Requests())
				}
			},
		},
	})
}

// servers are the makers'.
type servers struct {
	mu      sync.Mutex // guards what follows
	mode    string
	answers map[string][]byte // by address
	first   string            // the address of the first key at each maker
	seen    int
}

func (s *servers) certify(t *testing.T, ek tpm.EK, der []byte) {
	encoded := strings.ReplaceAll(base64.URLEncoding.EncodeToString(der), "=", "%3D")
	intel, amd := check.Must(ekcert.URL("INTC", ek))(t), check.Must(ekcert.URL("AMD", ek))(t)
	s.answers[intel] = []byte(`{"pubhash":"` + filepath.Base(intel) + `","certificate":"` + encoded + `"}`)
	s.answers[amd] = der
	if s.first == "" {
		s.first = intel + " " + amd
	}
}

func (s *servers) set(mode string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode = mode
}

func (s *servers) count(m *lab.Makers) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.seen
	s.seen = len(m.Requests())
	return s.seen - before
}

func (s *servers) answer(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	address := "https://" + r.Host + r.URL.EscapedPath()
	answer, ok := s.answers[address]
	switch {
	case s.mode == "garbage":
		fmt.Fprint(w, "<html>Please log in</html>")
	case !ok, s.mode == "none", s.mode == "first" && !strings.Contains(s.first, address):
		http.Error(w, "Certificate not found", http.StatusNotFound)
	default:
		_, _ = w.Write(answer)
	}
}
