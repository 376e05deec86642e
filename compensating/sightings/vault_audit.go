package sightings

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// VaultAudit reads the audit log of Vault or OpenBao, as its file and its socket
// device write it: JSON, an object a line. Only answers are read, for what was
// given; the broker's own are known by the lease in their token's metadata.
type VaultAudit struct{ single }

// NewVaultAudit makes a reader.
func NewVaultAudit(source string) *VaultAudit { return &VaultAudit{single{source: source}} }

// maxAudit bounds one entry: Vault puts requests of up to 32 MiB into its log.
const maxAudit = 4 << 20

var (
	auditAnswer  = []byte(`"type":"response"`)
	auditAnswer2 = []byte(`"type": "response"`)
)

type auditEntry struct {
	Time  string `json:"time"`
	Type  string `json:"type"`
	Error string `json:"error"`
	Auth  struct {
		DisplayName string            `json:"display_name"`
		EntityID    string            `json:"entity_id"`
		Accessor    string            `json:"accessor"`
		Metadata    map[string]string `json:"metadata"`
	} `json:"auth"`
	Request struct {
		Operation string `json:"operation"`
		Path      string `json:"path"`
		MountType string `json:"mount_type"`
		Remote    string `json:"remote_address"`
	} `json:"request"`
	Response struct {
		Secret *struct {
			LeaseID string `json:"lease_id"`
		} `json:"secret"`
		Data jsontext.Value `json:"data"`
	} `json:"response"`
}

// Line takes one entry.
func (v *VaultAudit) Line(number int64, line []byte, emit func(Sighting)) {
	v.health.Lines++
	if len(line) == 0 {
		return
	}
	if len(line) > maxAudit {
		v.health.unreadable(fmt.Sprintf("line %d of %d bytes is longer than %d", number, len(line), maxAudit))
		return
	}
	// A request is written before it is answered, with all that its answer repeats.
	if !bytes.Contains(line, auditAnswer) && !bytes.Contains(line, auditAnswer2) {
		if line[0] != '{' {
			v.health.unreadable(fmt.Sprintf("line %d of %d bytes is no JSON of Vault's", number, len(line)))
		}
		return
	}
	var e auditEntry
	if parse(line, &e) != nil {
		v.health.unreadable(fmt.Sprintf("line %d of %d bytes is no JSON of Vault's", number, len(line)))
		return
	}
	if e.Type != "response" {
		return
	}
	t, err := time.Parse(time.RFC3339Nano, e.Time)
	t, ok := plausible(t)
	if err != nil || !ok {
		v.health.unreadable(fmt.Sprintf("line %d has no time that can be read", number))
		return
	}
	v.health.saw(t)
	if e.Error != "" || !reads(e) {
		return
	}
	seen := Sighting{Time: t, Kind: Read, Source: v.source, Line: number, VaultPath: cut(e.Request.Path), Lease: cut(e.Auth.Metadata["grant"]), Actor: actor(e)}
	if s := e.Response.Secret; s != nil {
		seen.VaultLease = cut(s.LeaseID)
	}
	if a, err := netip.ParseAddr(e.Request.Remote); err == nil {
		seen.From = a.Unmap().WithZone("")
	}
	emit(seen)
}

// reads says whether an answer gave somebody a secret: of an engine, not of Vault's
// own paths. What is written to a KV path answers with data, too, but none of it
// is secret.
func reads(e auditEntry) bool {
	for _, own := range []string{"sys/", "auth/", "identity/", "cubbyhole/"} {
		if strings.HasPrefix(e.Request.Path, own) {
			return false
		}
	}
	leased := e.Response.Secret != nil && e.Response.Secret.LeaseID != ""
	switch e.Request.Operation {
	case "read":
		return leased || len(e.Response.Data) > len("null")
	case "update", "create":
		return leased || e.Request.MountType == "pki" || e.Request.MountType == "ssh"
	}
	return false
}

func actor(e auditEntry) string {
	for _, s := range []string{e.Auth.EntityID, e.Auth.DisplayName, e.Auth.Accessor} {
		if s != "" {
			return cut(s)
		}
	}
	return ""
}

func cut(s string) string { return s[:min(len(s), maxText)] }
