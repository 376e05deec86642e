package main

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"
)

// A vaultLog is the file audit device of a Vault 1.21.
type vaultLog struct {
	entries []vaultEntry
}

type vaultEntry struct {
	at   time.Time
	line []byte
}

func (v *vaultLog) source() source { return source{"vault-audit", "vault.json"} }

func (v *vaultLog) render(w *world) []byte {
	slices.SortStableFunc(v.entries, func(a, b vaultEntry) int { return a.at.Compare(b.at) })
	var out bytes.Buffer
	for _, e := range v.entries {
		if !e.at.Before(w.start) && !e.at.After(w.end) {
			out.Write(e.line)
		}
	}
	return out.Bytes()
}

type object = map[string]any

// A call is one request to Vault and its answer.
type call struct {
	at              time.Time
	who             *identity
	operation, path string
	from            string
	correlation     string
	request, answer object // data; the answer's strings are hmac'd
	lease           string // lease_id in the answer
	auth            object // of the answer
	denied          bool
	mount           string // its type
}

// An identity is a token.
type identity struct {
	display, entity, accessor, token string
	policies                         []string
	metadata                         object
}

func (w *world) identity(display string, metadata object, policies ...string) *identity {
	id := &identity{display: display, accessor: w.hmac(), token: w.hmac(), policies: append([]string{"default"}, policies...), metadata: metadata}
	if len(metadata) > 0 && metadata["grant"] == nil {
		id.entity = w.uuid()
	}
	return id
}

func (w *world) hmac() string { return "hmac-sha256:" + w.hex(32) }

// vaultCall writes the request and the response.
func (w *world) vaultCall(c call) {
	auth := object{"accessor": c.who.accessor, "client_token": c.who.token, "display_name": c.who.display, "policies": c.who.policies,
		"policy_results": object{"allowed": !c.denied}, "token_policies": c.who.policies, "token_issue_time": c.at.Truncate(time.Second).Format(time.RFC3339),
		"token_ttl": 3600, "token_type": "service"}
	if len(c.who.metadata) > 0 {
		auth["metadata"] = c.who.metadata
	}
	if c.who.entity != "" {
		auth["entity_id"] = c.who.entity
	}
	if !c.denied {
		auth["policy_results"] = object{"allowed": true, "granting_policies": []object{{"type": ""}, {"name": c.who.policies[len(c.who.policies)-1], "namespace_id": "root", "type": "acl"}}}
	}
	mount, _, _ := bytes.Cut([]byte(c.path), []byte("/"))
	headers := object{"user-agent": []string{pick(w, "Go-http-client/2.0", "hvac/2.1.0", "Vault/1.21.0")}}
	if c.correlation != "" {
		headers["x-correlation-id"] = []string{c.correlation}
	}
	request := object{"client_id": w.text(43, alnum) + "=", "client_token": c.who.token, "client_token_accessor": c.who.accessor, "headers": headers,
		"id": w.uuid(), "mount_class": "secret", "mount_point": string(mount) + "/", "mount_running_version": "v1.21.0+builtin.vault", "mount_type": c.mount,
		"namespace": object{"id": "root"}, "operation": c.operation, "path": c.path, "remote_address": c.from, "remote_port": 32768 + w.rng.IntN(28000)}
	if c.request != nil {
		request["data"] = c.request
	}
	response := object{"mount_class": "secret", "mount_point": string(mount) + "/", "mount_type": c.mount}
	entry := object{"time": c.at.Format(time.RFC3339Nano), "type": "request", "auth": auth, "request": request}
	if c.denied {
		entry["error"] = "1 error occurred:\n\t* permission denied\n\n"
		response["data"] = object{"error": w.hmac()}
	}
	w.vaultEntry(c.at, entry)
	if c.answer != nil {
		response["data"] = c.answer
	}
	if c.lease != "" {
		response["secret"] = object{"lease_id": c.lease}
	}
	if c.auth != nil {
		response["auth"] = c.auth
	}
	at := c.at.Add(w.span(300*time.Microsecond, 40*time.Millisecond))
	entry["time"], entry["type"], entry["response"] = at.Format(time.RFC3339Nano), "response", response
	w.vaultEntry(at, entry)
}

func (w *world) vaultEntry(at time.Time, entry object) {
	line, err := json.Marshal(entry)
	if err != nil {
		panic(err) // strings, numbers and maps
	}
	w.vault.entries = append(w.vault.entries, vaultEntry{at, append(line, '\n')})
}

// issue is what Vault logs of one grant: the broker makes a token for it, reads
// with that, renews now and then, and has it revoked.
func (w *world) issue(l *lease) {
	broker := w.identity("approle", object{"role_name": "countersign"}, "countersign-broker")
	token := w.identity("token-countersign-"+l.ID, object{"grant": l.ID, "host": l.Host, "scope": l.Scope}, "countersign-"+l.Scope)
	token.accessor = w.hmac()
	at := l.Issued.Add(-w.span(20*time.Millisecond, 200*time.Millisecond))
	w.vaultCall(call{at: at, who: broker, operation: "update", path: "auth/token/create/countersign-" + l.Scope, from: brokerAddress, correlation: l.ID, mount: "token",
		request: object{"display_name": w.hmac(), "meta": object{"grant": w.hmac(), "host": w.hmac(), "scope": w.hmac()}},
		auth:    object{"accessor": token.accessor, "client_token": token.token, "display_name": token.display, "metadata": token.metadata, "policies": token.policies, "token_type": "service"}})
	c := call{at: at.Add(10 * time.Millisecond), who: token, operation: "read", path: l.app.path, from: brokerAddress, correlation: l.ID, mount: "database",
		answer: object{"username": w.hmac(), "password": w.hmac()}, lease: l.Names.VaultLease}
	switch l.app.kind {
	case "ssh":
		c.operation, c.mount, c.answer = "update", "ssh", object{"serial_number": w.hmac(), "signed_key": w.hmac()}
	case "tls":
		c.operation, c.mount, c.answer = "update", "pki", object{"serial_number": w.hmac(), "certificate": w.hmac(), "private_key": w.hmac()}
	case "kv":
		c.mount, c.answer = "kv", object{"data": object{"password": w.hmac()}, "metadata": object{"created_time": w.hmac(), "custom_metadata": nil, "deletion_time": w.hmac(), "destroyed": false, "version": 3}}
	}
	w.vaultCall(c)
	for renewed := l.Issued.Add(time.Hour); renewed.Before(l.until()) && w.chance(60); renewed = renewed.Add(w.span(time.Hour, 4*time.Hour)) {
		path := "auth/token/renew-accessor"
		if l.Names.VaultLease != "" && w.chance(50) {
			path = "sys/leases/renew/" + l.Names.VaultLease
		}
		w.vaultCall(call{at: renewed, who: broker, operation: "update", path: path, from: brokerAddress, mount: "system"})
	}
	if !l.Revoked.IsZero() {
		w.vaultCall(call{at: l.Revoked.Add(-50 * time.Millisecond), who: broker, operation: "update", path: "auth/token/revoke-accessor", from: brokerAddress, mount: "token"})
	}
}
