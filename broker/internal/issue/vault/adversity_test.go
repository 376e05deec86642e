package vault

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/test/check"
)

func wantConfig(t *testing.T, err error, words ...string) {
	t.Helper()
	fails(t, err, words...)
	if !errors.Is(err, issue.ErrConfig) {
		t.Errorf("%v is no configuration error", err)
	}
}

func wantFault(t *testing.T, err error, words ...string) {
	t.Helper()
	fails(t, err, words...)
	if errors.Is(err, issue.ErrConfig) || errors.Is(err, issue.ErrGone) {
		t.Errorf("%v is no fault", err)
	}
}

// appRole makes an AppRole for the broker.
func appRole(t *testing.T, name string, settings map[string]any) config.Vault {
	t.Helper()
	body := map[string]any{"token_policies": BrokerPolicy, "token_no_default_policy": true, "token_ttl": "1h"}
	for k, v := range settings {
		body[k] = v
	}
	put(t, "auth/approle/role/"+name, body)
	id, err := root.Logical().ReadWithContext(within(t, time.Minute), "auth/approle/role/"+name+"/role-id")
	if err != nil {
		t.Fatal(err)
	}
	secretID := put(t, "auth/approle/role/"+name+"/secret-id", map[string]any{}).Data["secret_id"].(string)
	issued.secret(secretID)
	file := filepath.Join(t.TempDir(), "secret-id")
	if err := os.WriteFile(file, []byte(secretID+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return config.Vault{Address: testVault.Addr, CAFile: testVault.CACert,
		AppRole: &config.AppRole{RoleID: id.Data["role_id"].(string), SecretIDFile: file}}
}

func (s *session) current() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	issued.secret(s.own.value)
	return s.own.value
}

func TestAppRoleSurvivesItsTokensRevocation(t *testing.T) {
	cfg := appRole(t, "broker", nil)
	i := newIssuer(t, cfg)
	if i.Ready() == nil || !strings.Contains(i.Status(), "not logged in yet") {
		t.Errorf("before any login: %s", i.Status())
	}
	first := mustIssue(t, i, "billing-db", "approle1")
	if err := i.Ready(); err != nil || !strings.Contains(i.Status(), "by AppRole until") {
		t.Errorf("%v, %s", err, i.Status())
	}
	put(t, "auth/token/revoke", map[string]any{"token": i.session.current()})
	second := mustIssue(t, i, "billing-db", "approle2")
	for _, c := range []issue.Credential{first, second} {
		v := values(c)
		if err := login(t, v["username"], v["password"]); err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile(cfg.AppRole.SecretIDFile, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, "auth/token/revoke", map[string]any{"token": i.session.current()})
	_, err := i.issue(within(t, time.Minute), scope("billing-db"), order("approle3"))
	wantConfig(t, err, "login by AppRole", "invalid role or secret ID")
}

// The session outlives its tokens without any request that asks for it.
func TestLoginKeepsItself(t *testing.T) {
	i := newIssuer(t, appRole(t, "brief", map[string]any{"token_ttl": "2s", "token_max_ttl": "5s"}))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "a first login", func() bool { return i.session.current() != "" })
	first := i.session.current()
	eventually(t, "a second login", func() bool { now := i.session.current(); return now != "" && now != first })
	if err := i.Ready(); err != nil {
		t.Error(err)
	}
	mustIssue(t, i, "billing-kv", "brief")
}

func TestTokenFileIsReadAnew(t *testing.T) {
	token := brokerToken(t, nil)
	cfg := tokenConfig(t, token)
	i := newIssuer(t, cfg)
	mustIssue(t, i, "billing-kv", "file1")
	put(t, "auth/token/revoke", map[string]any{"token": token})
	_, err := i.issue(within(t, time.Minute), scope("billing-kv"), order("file2"))
	wantConfig(t, err, "token")
	if i.Ready() == nil {
		t.Errorf("ready with a dead token: %s", i.Status())
	}
	if err := os.WriteFile(cfg.TokenFile, []byte(brokerToken(t, nil)), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new token is used", func() bool {
		c, err := i.issue(within(t, time.Minute), scope("billing-kv"), order("file3"))
		values(c)
		return err == nil
	})
}

func TestTLSCertificateLogin(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "broker"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	own := &config.VaultTLSAuth{Role: "broker", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	if err := errors.Join(os.WriteFile(own.CertFile, certPEM, 0o600),
		os.WriteFile(own.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	put(t, "auth/cert/certs/broker", map[string]any{"certificate": string(certPEM), "token_policies": BrokerPolicy, "token_no_default_policy": true, "token_ttl": "1h"})
	cfg := config.Vault{Address: testVault.Addr, CAFile: testVault.CACert, Certificate: own}
	i := newIssuer(t, cfg)
	mustIssue(t, i, "billing-db", "cert1")
	put(t, "auth/token/revoke", map[string]any{"token": i.session.current()})
	mustIssue(t, i, "billing-db", "cert2")

	stranger := *own
	stranger.Role = "another"
	cfg.Certificate = &stranger
	_, err = newIssuer(t, cfg).issue(within(t, time.Minute), scope("billing-db"), order("cert3"))
	wantConfig(t, err, "login by TLS certificate")
}

func TestSealedThenDown(t *testing.T) {
	i := newIssuer(t, appRole(t, "sealed", nil))
	ctx := within(t, 2*time.Minute)
	c := mustIssue(t, i, "billing-db", "sealed1")
	v := values(c)
	if err := testVault.Seal(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = testVault.Start(context.Background()) })
	_, err := i.issue(ctx, scope("billing-db"), order("sealed2"))
	wantFault(t, err, "503", "sealed")
	_, err = i.Extend(ctx, c.Handle, time.Hour)
	wantFault(t, err, "sealed")
	wantFault(t, i.Revoke(ctx, c.Handle), "sealed")
	if i.Ready() == nil || !strings.Contains(i.Status(), "sealed") {
		t.Errorf("status: %s", i.Status())
	}
	if err := login(t, v["username"], v["password"]); err != nil {
		t.Errorf("the credential broke with the seal: %v", err)
	}
	if err := testVault.Unseal(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := i.session.keepOnce(ctx); err != nil || i.Ready() != nil {
		t.Errorf("after unsealing: %v, %s", err, i.Status())
	}
	if _, err := i.Extend(ctx, c.Handle, time.Hour); err != nil {
		t.Fatal(err)
	}

	if err := testVault.Stop(); err != nil {
		t.Fatal(err)
	}
	late := newIssuer(t, i.session.cfg) // starts while Vault is down
	_, err = late.issue(ctx, scope("billing-db"), order("down1"))
	wantFault(t, err, "login by AppRole", "no answer")
	wantFault(t, i.Revoke(ctx, c.Handle), "no answer")
	if err := testVault.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it logs in", func() bool {
		c, err := late.issue(ctx, scope("billing-db"), order("down2"))
		values(c)
		return err == nil
	})
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Fatal(err)
	}
	if roleExists(t, v["username"]) {
		t.Error("the role is still there")
	}
}

func TestPolicyTakenAway(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-db", "taken1")
	t.Cleanup(func() { setUp(t) })

	writePolicy(t, "countersign-billing-db", `path "kv/data/other" { capabilities = ["read"] }`)
	_, err := i.issue(ctx, scope("billing-db"), order("taken2"))
	wantConfig(t, err, `Vault policy countersign-billing-db lacks "read" on database/creds/billing-ro`, "vault setup")

	writePolicy(t, BrokerPolicy, `path "auth/token/lookup-self" { capabilities = ["read"] }`)
	_, err = i.issue(ctx, scope("billing-db"), order("taken3"))
	wantConfig(t, err, `the broker's Vault policy lacks "update" on auth/token/create/countersign-billing-db`)
	wantConfig(t, i.Revoke(ctx, c.Handle), `lacks "update" on sys/leases/revoke/`+known(c).Lease)
	_, err = i.Extend(ctx, c.Handle, time.Hour)
	wantConfig(t, err, `lacks "update" on auth/token/renew-accessor`)
	if v := values(c); login(t, v["username"], v["password"]) != nil {
		t.Error("the credential broke with the policy")
	}
	setUp(t)
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Error(err)
	}
}

func TestUnknownRoles(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	t.Cleanup(func() { setUp(t) })
	remove(t, "auth/token/roles/countersign-billing-kv")
	_, err := i.issue(ctx, scope("billing-kv"), order("role1"))
	wantConfig(t, err, "token role countersign-billing-kv", "unknown role")

	other := *scope("billing-db")
	source := *other.Source.(*Source)
	source.Path = "database/creds/nobody"
	other.Source = &source
	writePolicy(t, "countersign-billing-db", `path "database/creds/nobody" { capabilities = ["read"] }`)
	_, err = i.issue(ctx, &other, order("role2"))
	wantConfig(t, err, "database/creds/nobody", "unknown role")

	source.Path = "kv/data/nothing"
	writePolicy(t, "countersign-billing-db", `path "kv/data/nothing" { capabilities = ["read"] }`)
	_, err = i.issue(ctx, &other, order("role3"))
	wantConfig(t, err, "nothing at kv/data/nothing")
}

func TestRateLimit(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, 2*time.Minute)
	mustIssue(t, i, "billing-db", "quota0")
	t.Cleanup(func() { remove(t, "sys/quotas/rate-limit/tight") })
	put(t, "sys/quotas/rate-limit/tight", map[string]any{"path": "database/", "rate": 2, "interval": "1s"})
	for n := range 5 { // more than the quota allows at once: waited out
		mustIssue(t, i, "billing-db", fmt.Sprint("quota", n+1))
	}
	put(t, "sys/quotas/rate-limit/tight", map[string]any{"path": "database/", "rate": 1, "interval": "10m"})
	brief, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := i.issue(brief, scope("billing-db"), order("quota6"))
	if err == nil { // the quota's one
		_, err = i.issue(brief, scope("billing-db"), order("quota7"))
	}
	wantFault(t, err, "429", "rate limit")
}

func TestReplyLost(t *testing.T) {
	f, behind := newFront(t)
	i := newIssuer(t, behind)
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-db", "lost0")

	before := users(t)
	f.LoseReply("database/creds/")
	_, err := i.issue(ctx, scope("billing-db"), order("lost1"))
	wantFault(t, err, "no answer to read database/creds/billing-ro")
	eventually(t, "the user that nobody knows is gone", func() bool { return len(users(t)) == len(before) })

	f.LoseReply("sys/leases/revoke/")
	wantFault(t, i.Revoke(ctx, c.Handle), "no answer")
	f.LoseReply("auth/token/revoke-accessor")
	wantFault(t, i.Revoke(ctx, c.Handle), "no answer")
	f.Set(nil)
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Error(err)
	}

	// Of a token whose creation wasn't answered, nothing is known: it dies.
	i.provisional = 2 * time.Second
	accessors := tokens(t)
	f.LoseReply("auth/token/create/")
	_, err = i.issue(ctx, scope("billing-db"), order("lost2"))
	wantFault(t, err, "no answer")
	if len(tokens(t)) <= len(accessors) {
		t.Fatal("Vault made no token: the test proves nothing")
	}
	eventually(t, "the token is gone", func() bool { return len(tokens(t)) <= len(accessors) })
}

func users(t *testing.T) []string {
	t.Helper()
	names, err := testPG.Query(within(t, 10*time.Second), "postgres", "SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%'")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func tokens(t *testing.T) []string {
	t.Helper()
	s, err := root.Logical().ListWithContext(within(t, 10*time.Second), "auth/token/accessors")
	if err != nil {
		t.Fatal(err)
	}
	return texts(s.Data["keys"])
}

func TestHostileAnswers(t *testing.T) {
	f, behind := newFront(t)
	i := newIssuer(t, behind)
	ctx := within(t, time.Minute)
	mustIssue(t, i, "billing-db", "hostile0")
	const echoed = "echoed-secret-0815"
	issued.secret(echoed)
	for name, with := range map[string]http.HandlerFunc{
		"error with a secret": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprintf(w, `{"errors": ["syntax error near '%s' (SQLSTATE 42601): failed to connect"]}`, echoed)
		},
		"a page": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadGateway)
			fmt.Fprintf(w, "<html>%s</html>", echoed)
		},
		"broken JSON": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"data": {"password": "%s"`, echoed) },
		"wrong JSON":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"data": "%s"}`, echoed) },
		"no end": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"data": {"password": "`)
			for range 6 << 10 {
				fmt.Fprint(w, strings.Repeat("a", 1<<10))
			}
			fmt.Fprint(w, `"}}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f.Answer("database/creds/", with)
			_, err := i.issue(ctx, scope("billing-db"), order("hostile"))
			fails(t, err, "database/creds/billing-ro")
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
	f.Answer("sys/leases/lookup", func(w http.ResponseWriter, _ *http.Request) { http.NotFound(w, nil) })
	_, err := i.lookupLease(ctx, "database/creds/billing-ro/x")
	if unknown(err) {
		t.Error("a proxy's 404 counts as Vault's word that a lease is over")
	}
}

func TestRedirectKeepsMethod(t *testing.T) {
	f, behind := newFront(t)
	i := newIssuer(t, behind)
	redirected := 0
	f.Set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		redirected++
		http.Redirect(w, r, testVault.Addr+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	})
	c := mustIssue(t, i, "billing-pki", "redirect")
	if err := i.Revoke(within(t, time.Minute), c.Handle); err != nil {
		t.Error(err)
	}
	if redirected == 0 {
		t.Error("nothing was redirected")
	}
}

// A lease that Vault can't end outlives its time: it is not gone before
// PostgreSQL says so.
func TestDatabaseDown(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, 2*time.Minute)
	c := mustIssue(t, i, "billing-db", "pgdown1")
	i.provisional = 2 * time.Second
	brief := mustIssue(t, i, "billing-db", "pgdown2")
	if err := testPG.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = testPG.Start(context.Background()) })
	_, err := i.issue(ctx, scope("billing-db"), order("pgdown3"))
	wantFault(t, err, "500", "database/creds/billing-ro")
	wantFault(t, i.Revoke(ctx, c.Handle), "sys/leases/revoke/")
	eventually(t, "the brief token is gone", func() bool { return !tokenLives(t, known(brief).Accessor) })
	_, err = i.Extend(ctx, brief.Handle, time.Hour)
	wantFault(t, err, "its end is not confirmed")
	if err := testPG.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Extend(ctx, brief.Handle, time.Hour); !errors.Is(err, issue.ErrGone) {
		t.Errorf("extended after its time: %v", err)
	}
	for _, c := range []issue.Credential{c, brief} {
		if roleExists(t, values(c)["username"]) {
			t.Errorf("role of %s is still there", c.Lease)
		}
	}
}

func TestConnectionsUsedUp(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	mustIssue(t, i, "billing-db", "full1")
	release := check.Must(testPG.TakeConnections(ctx))(t)
	_, err := i.issue(ctx, scope("billing-db"), order("full2"))
	release()
	wantFault(t, err, "database/creds/billing-ro", "too many clients")
	mustIssue(t, i, "billing-db", "full3")
}
