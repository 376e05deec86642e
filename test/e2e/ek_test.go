package e2e_test

import (
	"crypto/x509"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A host whose TPM holds no EK certificate joins as known. With the one that the
// maker serves it joins again, without a token, and is certified: the broker
// judges it as one out of a TPM.
func TestFetchedEKCertificates(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, 2*time.Minute)
	dir := folder(t)
	real := check.Must(lab.StartTPM(ctx, filepath.Join(dir, "tpm"), services.TPMCA, lab.TPMOptions{NoCertificates: true}))(t)
	t.Cleanup(real.Stop)
	path := check.Must(real.Disguise(t.Context(), filepath.Join(dir, "amd.sock"), "AMD\x00"))(t)

	// AMD's server knows the keys of this TPM, by the last part of the URL.
	var serials sync.Map // to DER
	makers := check.Must(lab.NewMakers(filepath.Join(dir, "makers"), func(w http.ResponseWriter, r *http.Request) {
		if der, ok := serials.Load(filepath.Base(r.URL.Path)); ok {
			_, _ = w.Write(der.([]byte))
			return
		}
		http.NotFound(w, r)
	}, "ftpm.amd.com"))(t)
	t.Cleanup(makers.Close)
	t.Setenv("SSL_CERT_FILE", makers.CAFile)
	t.Setenv("HTTPS_PROXY", makers.Proxy)

	agent := check.Must(lab.NewAgent(filepath.Join(dir, "agent"), b.broker, path, "", false))(t)
	join := func(token string) (id string) {
		t.Helper()
		var answer struct {
			HostID string `json:"host_id"`
		}
		check.Nil(t, json.Unmarshal(check.Must(agent.Join(ctx, token))(t), &answer))
		return answer.HostID
	}
	tier := func(id string) string {
		t.Helper()
		var h struct{ Tier string }
		check.Nil(t, b.broker.JSON(ctx, &h, "host", "show", id))
		return h.Tier
	}

	id := join(check.Must(b.broker.JoinToken(ctx))(t))
	if got := tier(id); got != "known" {
		t.Fatalf("without a certificate the tier is %q", got)
	}

	var list struct {
		Keys []struct {
			Hash string `json:"ek_hash"`
			URL  string `json:"url"`
		} `json:"keys"`
	}
	check.Nil(t, json.Unmarshal(check.Must(agent.CLI(ctx, "ek", "list", "-o", "json"))(t), &list))
	if _, err := agent.CLI(ctx, "ek", "fetch"); err == nil || !strings.Contains(err.Error(), "the maker has no certificate") {
		t.Errorf("a maker that has none: %v", err)
	}
	for i, ek := range check.Must(check.Must(collect.Open(real.Path()))(t).EKs(ctx))(t) {
		key := check.Must(x509.ParsePKIXPublicKey(ek.Public))(t)
		serials.Store(filepath.Base(list.Keys[i].URL), check.Must(services.TPMCA.IssueEK(key))(t))
	}
	check.Must(agent.CLI(ctx, "ek", "fetch"))(t)
	if again := join(""); again != id || tier(id) != "certified" {
		t.Errorf("with the maker's certificate host %s is %s, %q; it was %s", again, tier(again), tier(again), id)
	}

	// Kept files that can't be used cost the tier and not the host.
	for _, k := range list.Keys {
		check.Nil(t, os.WriteFile(filepath.Join(agent.Dir, "state", "ek-"+k.Hash+".der"), []byte("garbage"), 0o600))
	}
	if again := join(""); again != id || tier(id) != "known" {
		t.Errorf("with damaged files host %s is %q; it was %s", again, tier(again), id)
	}

	// One of a maker that the broker doesn't trust counts as none for a host that it
	// knows.
	stranger := check.Must(lab.NewTPMCA(filepath.Join(dir, "stranger")))(t)
	var files []string
	for _, ek := range check.Must(check.Must(collect.Open(real.Path()))(t).EKs(ctx))(t) {
		key := check.Must(x509.ParsePKIXPublicKey(ek.Public))(t)
		file := filepath.Join(dir, ek.Hash().String())
		check.Nil(t, os.WriteFile(file, check.Must(stranger.IssueEK(key))(t), 0o600))
		files = append(files, file)
	}
	check.Must(agent.CLI(ctx, append([]string{"ek", "import"}, files...)...))(t)
	if again := join(""); again != id || tier(id) != "known" {
		t.Errorf("with a stranger's certificate host %s is %q; it was %s", again, tier(again), id)
	}
}

// A TPM whose maker's CA is inside the machine holds the certificates between its
// key and the root itself. A new host with one is certified, though the broker's
// ek_roots have none of them.
func TestOnDieCA(t *testing.T) {
	b := newBroker(t, softScope, false)
	ctx := check.Within(t, time.Minute)
	dir := folder(t)
	vm := check.Must(lab.StartTPM(ctx, filepath.Join(dir, "tpm"), services.TPMCA, lab.TPMOptions{NoCertificates: true}))(t)
	t.Cleanup(vm.Stop)
	inside, chain, err := services.TPMCA.OnDie()
	check.Nil(t, err)
	for _, ek := range check.Must(check.Must(collect.Open(vm.Path()))(t).EKs(ctx))(t) {
		key := check.Must(x509.ParsePKIXPublicKey(ek.Public))(t)
		if alg := check.Must(tpm.AlgorithmOf(key))(t); alg == tpm.RSA2048 {
			check.Nil(t, vm.WriteNV(0x01c00002, check.Must(inside.IssueEK(key))(t)))
		}
	}

	agent := check.Must(lab.NewAgent(filepath.Join(dir, "agent"), b.broker, vm.Path(), "", false))(t)
	token := check.Must(b.broker.JoinToken(ctx))(t)
	if _, err := agent.Join(ctx, token); err == nil || !strings.Contains(err.Error(), "ek-chain") {
		t.Errorf("without the certificates between: %v", err)
	}
	check.Nil(t, vm.WriteNV(0x01c00100, chain[:1500]))
	check.Nil(t, vm.WriteNV(0x01c00101, chain[1500:]))
	var joined struct {
		HostID string `json:"host_id"`
	}
	check.Nil(t, json.Unmarshal(check.Must(agent.Join(ctx, token))(t), &joined))
	var h struct{ State, Tier string }
	check.Nil(t, b.broker.JSON(ctx, &h, "host", "show", joined.HostID))
	if h.State != "trusted" || h.Tier != "certified" {
		t.Errorf("the host is %+v", h)
	}
}
