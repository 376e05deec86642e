// Package doctor says what of a host is wrong or missing for an agent, and how
// to mend it. It changes nothing, and needs neither a joined host nor a
// running agent.
package doctor

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/boot"
	bootlog "github.com/countersign/countersign/attestors/boot/collect"
	"github.com/countersign/countersign/attestors/ima"
	imalist "github.com/countersign/countersign/attestors/ima/collect"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/ekcert"
	"github.com/countersign/countersign/hostagent/internal/openmon"
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/hostagent/internal/program/kinds"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/faults"
)

// Results of a check.
const (
	OK      = "ok"
	Warning = "warning" // works, with less than it could
	Wrong   = "wrong"
)

// A Finding is one check's result.
type Finding struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"`
}

// A Report is all findings, in the order of the checks.
type Report struct {
	Findings []Finding    `json:"findings"`
	EKHashes []string     `json:"ek_hashes,omitempty"` // what `countersign host add` wants
	EKs      []ekcert.Key `json:"eks,omitempty"`
}

// Healthy says whether nothing is wrong.
func (r Report) Healthy() bool {
	for _, f := range r.Findings {
		if f.Result == Wrong {
			return false
		}
	}
	return true
}

func (r *Report) add(check, result, detail, mend string) {
	r.Findings = append(r.Findings, Finding{check, result, detail, mend})
}

// Examine checks a host for the config in file.
func Examine(ctx context.Context, file string) Report {
	r := &Report{}
	c, err := config.Load(file)
	if err != nil {
		r.add("config", Wrong, err.Error(), "mend the file; `countersign-agent config check` reports all mistakes")
		c = &config.Agent{TPM: "/dev/tpmrm0"} // the rest can still be looked at
	} else {
		r.add("config", OK, file, "")
	}
	r.privileges()
	r.tpm(ctx, c.TPM, c.StateDir)
	r.measurements(attest.Logs(c.EventLog, c.IMAList))
	r.clock()
	r.network(ctx, c.Broker)
	r.certificate(c.StateDir)
	if c.Witness {
		r.witness()
	}
	r.programs(ctx, c.Credentials)
	return *r
}

func (r *Report) privileges() {
	if runtime.GOOS != "windows" && os.Geteuid() != 0 {
		r.add("privileges", Wrong, "not root", "run as root: the agent reads other programs' /proc and writes files for other users")
		return
	}
	r.add("privileges", OK, "root", "")
}

func (r *Report) tpm(ctx context.Context, path, stateDir string) {
	device, err := collect.Open(path)
	if err != nil {
		r.add("tpm", Wrong, err.Error(), "set tpm in the config")
		return
	}
	info, err := device.Info(ctx)
	if err != nil {
		r.add("tpm", Wrong, tpmError(err, ccelTable), "switch the TPM on in the firmware's settings, or add a virtual TPM 2.0 to the VM; "+path+" must be there")
		return
	}
	r.add("tpm", OK, fmt.Sprintf("%s %s, firmware %s", info.Manufacturer, info.Vendor, info.Firmware), "")
	if !info.SHA256Bank {
		r.add("pcr-bank", Wrong, fmt.Sprintf("active banks: %v", info.PCRBanks), "activate the SHA-256 bank in the firmware's settings; SHA-1 alone proves nothing")
	} else {
		r.add("pcr-bank", OK, "SHA-256 is active", "")
	}
	if info.OwnerAuth {
		r.add("tpm-owner", Wrong, "the owner hierarchy has a password", "clear it: keys are made under the owner's storage root")
	}
	if info.InLockout {
		r.add("tpm-lockout", Wrong, fmt.Sprintf("in lockout, %d failures of %d", info.LockoutCount, info.LockoutMax), fmt.Sprintf("wait %v, or tpm2_dictionarylockout -c", info.LockoutHeal))
	}
	eks, err := device.EKs(ctx)
	if err != nil {
		r.add("ek", Wrong, err.Error(), "the TPM has no usable endorsement key; ask its vendor")
		return
	}
	for _, ek := range eks {
		r.EKHashes = append(r.EKHashes, ek.Hash().String())
	}
	r.EKs = ekcert.List(stateDir, info.Manufacturer, eks)
	r.ekCertificates(info.Manufacturer)
}

// ekCertificates looks at who vouches for the endorsement keys, and names where
// a certificate can be had.
func (r *Report) ekCertificates(manufacturer string) {
	const (
		check   = "ek-certificate"
		without = "without one the host's tier will be known, not certified: register its EK hash by `countersign host add`"
	)
	var urls []string
	certified, kept := 0, 0
	for _, k := range r.EKs {
		if k.Problem != "" {
			r.add(check, Warning, k.Problem, "")
		}
		switch {
		case k.Source == ekcert.InFile:
			kept++
			certified++
		case k.Source == ekcert.InTPM:
			certified++
		case k.URL != "":
			urls = append(urls, fmt.Sprintf("%s (%s)", k.URL, k.Algorithm))
		}
	}

	switch {
	case certified > 0:
		r.add(check, OK, fmt.Sprintf("%d endorsement keys, %d with a certificate (%d in the TPM, %d kept)", len(r.EKs), certified, certified-kept, kept), "")
	case len(urls) > 0:
		r.add(check, Warning, fmt.Sprintf("%d endorsement keys, none with a certificate; %s may serve it at %s", len(r.EKs), ekcert.Maker(manufacturer), strings.Join(urls, ", ")),
			"`countersign-agent ek fetch` asks there (with --proxy URL by a proxy), or `countersign-agent ek import FILE` takes one from a file; "+without)
	default:
		r.add(check, Warning, fmt.Sprintf("%d endorsement keys, none with a certificate; %v", len(r.EKs), &ekcert.NoServiceError{Manufacturer: manufacturer}),
			"if you have one in a file, `countersign-agent ek import FILE`; "+without)
	}
}

// ccelTable is there where the firmware measures into the registers of a
// confidential VM (ACPI's CCEL table).
const ccelTable = "/sys/firmware/acpi/tables/CCEL"

// tpmError is the text of an error of the TPM. It adds why the TPM may be missing:
// a confidential VM has registers of its own, which this agent can't quote.
func tpmError(err error, ccel string) string {
	text := err.Error()
	if _, missing := os.Stat(ccel); missing == nil && errors.Is(err, os.ErrNotExist) {
		text += "; this is a confidential VM without a vTPM: its firmware has a table of CC measurements (CCEL)"
	}
	return text
}

// measurements looks for the logs that explain PCRs.
func (r *Report) measurements(logs attest.LogPaths) {
	const noLog = "boot by UEFI; with GRUB's `linux` and Secure Boot off, some distributions expose no log"
	if events, err := readEvents(logs.Event); err != nil {
		r.add("firmware-log", Warning, err.Error(), noLog)
	} else {
		r.add("firmware-log", OK, fmt.Sprintf("%s, %d events", logs.Event, events), "")
	}
	const noPolicy = "load an IMA policy that measures what is run (docs/MACHINE_STATE.md has one), or add ima_policy=tcb to the kernel's command line"
	switch entries, err := readList(logs.IMA); {
	case err != nil:
		r.add("ima", Warning, err.Error(), noPolicy)
	case entries <= 1: // the list's own first
		r.add("ima", Warning, logs.IMA+" measures no file", noPolicy)
	default:
		r.add("ima", OK, fmt.Sprintf("%s, %d entries", logs.IMA, entries), "")
	}
	policy, _ := bounded.ReadFile(imalist.PolicyPath, maxPolicy) // many kernels show none
	if rules := imalist.UsersRules(string(policy)); len(rules) > 0 {
		r.add("ima-policy", Warning, fmt.Sprintf("measures what any user runs among what root runs, by %q: where a reference set is enforced, each user can end this host's credentials", rules[0]),
			"measure by euid=0, and other users by a rule with pcr=15 (docs/MACHINE_STATE.md)")
	}
}

// maxPolicy bounds what is read of an IMA policy.
const maxPolicy = 1 << 20

func readEvents(path string) (events int, err error) {
	b, err := bootlog.Read(path)
	if err != nil {
		return 0, err
	}
	if b == nil {
		return 0, fmt.Errorf("%s: %w", path, os.ErrNotExist)
	}
	log, err := boot.Parse(b)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if err := log.Unsuited(); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return len(log.Events), nil
}

func readList(path string) (entries int, err error) {
	b, _, err := imalist.Read(path, 0)
	if err != nil {
		return 0, err
	}
	if b == nil {
		return 0, fmt.Errorf("%s: %w", path, os.ErrNotExist)
	}
	for r := ima.NewReader(b, 0); r.More(); entries++ {
		if _, _, err := r.Next(); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	return entries, nil
}

// earliest is before any release of this program.
var earliest = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (r *Report) clock() {
	if now := faults.Now(); now.Before(earliest) {
		r.add("clock", Wrong, now.UTC().Format(time.RFC3339), "set the clock: certificates are checked against it")
		return
	}
	r.add("clock", OK, faults.Now().UTC().Format(time.RFC3339), "")
}

// network connects to each broker as a host that wants to join would.
func (r *Report) network(ctx context.Context, b config.Broker) {
	cert, err := throwAway()
	if err != nil {
		r.add("network", Wrong, err.Error(), "")
		return
	}
	for _, address := range b.Addresses {
		s, err := api.Dial(ctx, api.Peer{Addresses: []string{address}, CASHA256: b.CASHA256, Certificate: cert, Now: faults.Now})
		var middlebox *api.MiddleboxError
		var clock *api.ClockError
		var name x509.HostnameError
		switch {
		case err == nil:
			_ = s.Close()
			r.add("network", OK, address, "")
		case errors.As(err, &middlebox):
			r.add("network", Wrong, err.Error(), "pass TLS to the broker through unopened, or correct ca_sha256")
		case errors.As(err, &clock):
			r.add("network", Wrong, err.Error(), "compare `date -u` here and on the broker's machine, and set the clock that is wrong")
		case errors.As(err, &name):
			r.add("network", Wrong, err.Error(), "add the name to names in the broker's config")
		default:
			r.add("network", Wrong, err.Error(), "is the broker running there, and no firewall between?")
		}
	}
}

// certificate looks at what the host shows to brokers, and at the CA that it
// trusts. Both were kept by the last join or proof.
func (r *Report) certificate(stateDir string) {
	if stateDir == "" {
		return
	}
	ends, err := attest.ReadEnds(stateDir)
	switch now := faults.Now(); {
	case err != nil:
		r.add("certificate", Wrong, err.Error(), "move the file away, and run `countersign-agent join`")
		return
	case ends.Certificate.IsZero():
		r.add("certificate", Warning, "this host has not joined", "`countersign-agent join` asks a broker to admit it")
		return
	case !now.Before(ends.Certificate), now.Before(ends.Begins):
		r.add("certificate", Warning, fmt.Sprintf("valid from %s to %s, and the clock says %s", stamp(ends.Begins), stamp(ends.Certificate), stamp(now)),
			"`countersign-agent serve` joins again by itself, without a token, when it reaches a broker; `countersign-agent status` says why where it can't")
	default:
		r.add("certificate", OK, "until "+stamp(ends.Certificate)+", renewed before that", "")
	}

	if text := ends.Attention(faults.Now()); ends.NewEpoch != "" {
		r.add("audit-log", Warning, text, "")
	} else if text != "" {
		r.add("broker-ca", Warning, text, "ask the broker's administrator for the new broker's address and ca_sha256")
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// throwAway is a certificate of a key that signs itself.
func throwAway() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// witness can only say what this process may; the service's log says what the
// service may.
func (r *Report) witness() {
	if err := openmon.Available(); err != nil {
		r.add("witness", Warning, err.Error(), "credentials work without it; what other programs open is not seen")
		return
	}
	r.add("witness", OK, "this kernel says who opens a file; the service needs its drop-in witness.conf for it", "")
}

func (r *Report) programs(ctx context.Context, credentials []*config.Credential) {
	finder := program.New(kinds.All()...)
	defer finder.Close()
	for _, c := range credentials {
		check := "credential " + c.Name
		if err := checkFiles(c); err != nil {
			r.add(check, Wrong, err.Error(), "make the folder, user or group, or mend the template")
			continue
		}
		if c.Process.Loose() {
			r.add(check, Warning, config.LooseWarning, "add user to process, or find the program by its unit")
		}
		limited, cancel := context.WithTimeout(ctx, time.Minute)
		p, err := finder.Find(limited, c.Process, "")
		cancel()
		switch {
		case err == nil:
			r.add(check, OK, fmt.Sprintf("%s, sha256 %s, user %s", p.Main().Path, p.Main().SHA256, p.User), "")
		case errors.Is(err, program.ErrNotRunning):
			r.add(check, OK, "its program does not run now", "")
		default:
			r.add(check, Wrong, err.Error(), "mend process in its block")
		}
	}
}
