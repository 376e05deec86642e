package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	ledgerFile = "ledger.jsonl"
	labelsFile = "labels.jsonl"
)

// recorded is how long the logs run, up to the start of the day of the seed.
const recorded = 40 * time.Hour

// A lease is a line of the ledger.
type lease struct {
	ID       string    `json:"id"`
	Scope    string    `json:"scope"`
	Host     string    `json:"host"`
	Subject  *subject  `json:"subject,omitempty"`
	Machine  *machine  `json:"machine,omitempty"`
	Kind     string    `json:"kind"`
	Names    names     `json:"names"`
	Sources  []string  `json:"sources,omitempty"`
	Audience []string  `json:"audience,omitempty"`
	Issued   time.Time `json:"issued"`
	Expires  time.Time `json:"expires"`
	Revoked  time.Time `json:"revoked,omitzero"`

	app  *app
	host *host
}

// until is when it ended, or will.
func (l *lease) until() time.Time {
	if !l.Revoked.IsZero() && l.Revoked.Before(l.Expires) {
		return l.Revoked
	}
	return l.Expires
}

// A machine is how a host had booted.
type machine struct {
	SecureBoot  bool   `json:"secure_boot"`
	CommandLine string `json:"kernel_command_line,omitempty"`
	Reference   string `json:"reference,omitempty"`
}

type names struct {
	DBUsername        string `json:"db_username,omitempty"`
	VaultLease        string `json:"vault_lease,omitempty"`
	VaultAccessor     string `json:"vault_accessor,omitempty"`
	VaultPath         string `json:"vault_path,omitempty"`
	CertificateSerial string `json:"certificate_serial,omitempty"`
	SSHKeyID          string `json:"ssh_key_id,omitempty"`
	SSHSerial         string `json:"ssh_serial,omitempty"`
	SecretHMAC        string `json:"secret_hmac,omitempty"`
}

type subject struct {
	Boot       string  `json:"boot"`
	PID        int     `json:"pid"`
	Start      uint64  `json:"start"`
	Unit       string  `json:"unit,omitempty"`
	Invocation string  `json:"invocation,omitempty"`
	User       string  `json:"user"`
	Parent     *parent `json:"parent,omitempty"`
	Exe        string  `json:"exe"`
	SHA256     string  `json:"sha256"`
}

type parent struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
	Exe   string `json:"exe"`
}

// A label is what one story must and may lead to.
type label struct {
	Story   string   `json:"story"`
	Wants   []string `json:"wants,omitempty"`   // detectors: one finding of each
	Targets []string `json:"targets,omitempty"` // leases or accounts, of which the finding names one
	Also    []string `json:"also,omitempty"`    // detectors that are right too
	Owns    []string `json:"owns,omitempty"`    // every lease, account, host and sensor of the story
}

// A host is a machine with an agent.
type host struct {
	id, name, ip, boot string
}

// A source is one log.
type source struct {
	kind, file string
}

// A log gathers what happened and writes it down as its program would.
type log interface {
	source() source
	render(w *world) []byte
}

type world struct {
	rng        *rand.Rand
	start, end time.Time
	hosts      int
	addresses  int
	apps       int

	ledger   []*lease
	labels   []label
	postgres []*pgServer
	vault    *vaultLog
	ssh      []*sshLog
	windows  *eventLog
	ocsf     *eventLog
	logs     []log
}

func newWorld(seed uint64, stories int) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 0x636f72707573)), end: time.Unix(int64(seed/perDay)*86400, 0).UTC()}
	w.start = w.end.Add(-recorded)
	w.servers()
	w.tell(stories)
	w.everyday()
	slices.SortFunc(w.ledger, func(a, b *lease) int { return strings.Compare(a.ID, b.ID) })
	return w
}

func (w *world) servers() {
	for _, kind := range []string{"postgres-stderr", "postgres-csv", "postgres-json"} {
		for range 1 + w.rng.IntN(3) {
			w.postgres = append(w.postgres, w.newPostgres(kind))
		}
	}
	w.vault = &vaultLog{}
	w.logs = append(w.logs, w.vault)
	for _, short := range []bool{true, false} {
		l := &sshLog{file: fmt.Sprintf("auth%d.log", len(w.ssh)), short: short}
		w.ssh, w.logs = append(w.ssh, l), append(w.logs, l)
	}
	w.windows = &eventLog{at: source{"windows-json", "windows.json"}, form: w.rng.IntN(len(windowsForms)), offset: w.clock()}
	w.ocsf = &eventLog{at: source{"ocsf", "siem.json"}, offset: w.clock()}
	w.logs = append(w.logs, w.windows, w.ocsf)
}

// clock is how wrong a server's clock is: at most 30 s.
func (w *world) clock() time.Duration {
	switch w.rng.IntN(4) {
	case 0:
		return w.span(-30*time.Second, 30*time.Second)
	case 1:
		return []time.Duration{-30 * time.Second, 30 * time.Second}[w.rng.IntN(2)]
	}
	return w.span(-50*time.Millisecond, 50*time.Millisecond)
}

func (w *world) span(least, most time.Duration) time.Duration {
	return least + time.Duration(w.rng.Int64N(int64(most-least)+1))
}

// between is a time in [from, to].
func (w *world) between(from, to time.Time) time.Time { return from.Add(w.span(0, to.Sub(from))) }

func (w *world) chance(percent int) bool { return w.rng.IntN(100) < percent }

func pick[T any](w *world, of ...T) T { return of[w.rng.IntN(len(of))] }

func (w *world) text(n int, alphabet string) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabet[w.rng.IntN(len(alphabet))]
	}
	return string(b)
}

const alnum = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

func (w *world) hex(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(w.rng.Uint32())
	}
	return hex.EncodeToString(b)
}

func (w *world) uuid() string {
	h := w.hex(16)
	return h[:8] + "-" + h[8:12] + "-4" + h[13:16] + "-a" + h[17:20] + "-" + h[20:]
}

func (w *world) id() string { return w.text(16, "abcdefghijklmnopqrstuvwxyz234567") }

// address is of a network that no host and no stranger is in unless it is asked
// for: 0 hosts, 1 poolers and NAT, 2 people, 3 strangers.
func (w *world) address(network int) string {
	w.addresses++
	n := w.addresses
	switch network {
	case 0:
		if w.chance(10) {
			return fmt.Sprintf("2001:db8:10::%x:%x", n/4096+1, n%4096+16)
		}
		return fmt.Sprintf("10.1%d.%d.%d", n/60000, n/240%250, n%240+5)
	case 1:
		return fmt.Sprintf("10.20%d.%d", n/60000, n/240%250)
	case 2:
		return fmt.Sprintf("10.3%d.%d.%d", n/60000, n/240%250, n%240+5)
	}
	if w.chance(50) {
		return fmt.Sprintf("10.4%d.%d.%d", n/60000, n/240%250, n%240+5)
	}
	return fmt.Sprintf("203.0.%d.%d", n/240%250, n%240+5)
}

func (w *world) newHost() *host {
	w.hosts++
	h := &host{id: w.id(), ip: w.address(0), boot: w.uuid()}
	h.name = fmt.Sprintf("%s%d", pick(w, "app", "web", "batch", "vm", "node"), w.hosts)
	return h
}

// write leaves ledger, labels and logs in dir and says which logs there are.
func (w *world) write(dir string) ([]source, error) {
	err := writeLines(filepath.Join(dir, ledgerFile), w.ledger)
	err = errors.Join(err, writeLines(filepath.Join(dir, labelsFile), w.labels))
	var sources []source
	for _, l := range w.logs {
		s := l.source()
		s.file = filepath.Join(dir, s.file)
		sources = append(sources, s)
		err = errors.Join(err, os.WriteFile(s.file, l.render(w), 0o644))
	}
	return sources, err
}

func writeLines[T any](name string, lines []T) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	b := bufio.NewWriter(f)
	e := json.NewEncoder(b)
	for _, l := range lines {
		if err := e.Encode(l); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(b.Flush(), f.Close())
}
