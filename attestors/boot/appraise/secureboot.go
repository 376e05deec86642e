package appraise

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
)

// GUIDs as they stand in memory: the first three fields are little-endian.
var (
	guidGlobal   = guid("61dfe48bca93d211aa0d00e098032b8c") // EFI_GLOBAL_VARIABLE
	guidSecurity = guid("cbb219d73a3d9645a3bcdad00e67656f") // EFI_IMAGE_SECURITY_DATABASE
	guidShim     = guid("50ab5d6046e00043abb63dd810dd8b23") // shim's lock
	guidX509     = guid("a159c0a5e494a74a87b5ab155c2bf072") // EFI_CERT_X509
	guidSHA256   = guid("2616c4c14c509240aca941f936934328") // EFI_CERT_SHA256
)

func guid(s string) (g [16]byte) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(g) {
		panic("a GUID in the source has 32 hex digits")
	}
	return [16]byte(b)
}

// databases are the variables that hold signature lists, states those that hold
// one byte.
var (
	databases = map[string][16]byte{
		"PK": guidGlobal, "KEK": guidGlobal,
		"db": guidSecurity, "dbx": guidSecurity, "dbt": guidSecurity, "dbr": guidSecurity,
	}
	states = map[string][16]byte{
		"SecureBoot": guidGlobal, "SetupMode": guidGlobal, "AuditMode": guidGlobal, "DeployedMode": guidGlobal,
	}
)

// secureBoot reads PCR 7. Everything in it hashes its data, so an event can't
// call itself another variable; db's content and an entry of db that verified an
// image are both named db, and told apart by coming first.
//
// An event before the separator that can't be read may be any variable, Secure
// Boot's state measured again after a change among them: no fact is made then.
// One behind the separator may be an authority, or shim's SBAT level.
func (b *bootLog) secureBoot(f *Facts) {
	events := b.pcr[pcrSecureBoot]
	end := cut(events)
	switch {
	case len(events) == 0:
		return
	case end < 0:
		b.limit(pcrSecureBoot, nil, "it has no separator")
		b.state[pcrSecureBoot].withheld = true
		return
	case events[end].digest == separatorError:
		b.limit(pcrSecureBoot, events[end].Event, "firmware measured that it failed")
		b.state[pcrSecureBoot].withheld = true
		return
	}

	before := secureBootVariables{}
	for i := range events[:end] {
		if why := before.add(&events[i]); why != "" {
			b.limit(pcrSecureBoot, events[i].Event, why)
			b.state[pcrSecureBoot].withheld = true
		}
	}
	if b.state[pcrSecureBoot].withheld {
		return
	}
	before.facts(f)

	after := secureBootVariables{loaders: true}
	for i := range events[end+1:] {
		m := &events[end+1+i]
		if separators[m.digest] {
			continue // some firmware measures all of them twice
		}
		if why := after.add(m); why != "" {
			b.limit(pcrSecureBoot, m.Event, why)
			b.state[pcrSecureBoot].withheld = true
		}
	}
	for _, m := range slices.Concat(before.odd, after.odd) {
		b.limit(pcrSecureBoot, m.Event, "its data is neither a variable nor a text")
	}
	if !b.state[pcrSecureBoot].withheld {
		f.Authorities = append(before.authorities, after.authorities...)
		f.SecureBootNotes = append(before.notes, after.notes...)
		if len(after.sbat) == 1 && printable(after.sbat[0]) {
			f.SbatLevel = &after.sbat[0]
		}
	}
	for fact, there := range map[string]bool{
		"secure_boot": f.SecureBoot != nil, "secure_boot_mode": f.SecureBootMode != "", "signature_databases": f.Databases != nil,
		"authorities": f.Authorities != nil, "secure_boot_notes": f.SecureBootNotes != nil, "sbat_level": f.SbatLevel != nil,
	} {
		if there {
			b.took(fact, pcrSecureBoot)
		}
	}
}

// secureBootVariables is what one side of PCR 7's separator holds.
type secureBootVariables struct {
	loaders     bool // behind the separator, where nothing is Secure Boot's own state
	states      map[string]bool
	databases   map[string]*SignatureDatabase
	authorities []Authority
	notes       []string
	sbat        []string
	odd         []*measurement // their bytes are proven, and neither a variable nor a text
}

// add takes one event, or says why it isn't understood.
func (s *secureBootVariables) add(m *measurement) (why string) {
	v, ok := parseVariable(m.proven)
	switch {
	case messages[m.digest] != "":
		s.notes = append(s.notes, messages[m.digest])
		return ""
	case m.opaque():
		return "the digest isn't of the data, as everything in PCR 7 is"
	case !ok && message(m):
		s.notes = append(s.notes, strings.TrimSuffix(string(m.proven), "\x00"))
		return ""
	case !ok && s.loaders: // whatever it is, it is listed
		s.odd, s.authorities = append(s.odd, m), append(s.authorities, Authority{SHA256: m.digest})
		return ""
	case !ok: // its bytes are proven, and no variable
		s.odd, s.notes = append(s.odd, m), append(s.notes, "sha256:"+m.digest.String())
		return ""
	case s.loaders:
		s.authorities = append(s.authorities, authority(m, v))
		if v.guid == guidShim && v.name == "SbatLevel" {
			s.sbat = append(s.sbat, string(v.data))
		}
		return ""
	case states[v.name] == v.guid && v.guid == guidGlobal:
		return s.state(v)
	case databases[v.name] == v.guid && v.guid != [16]byte{}:
		return s.database(m, v)
	}
	s.authorities = append(s.authorities, authority(m, v))
	return ""
}

// state takes one of the variables that hold one byte. Firmware measures one again
// where it is changed during boot.
func (s *secureBootVariables) state(v variable) (why string) {
	if len(v.data) > 1 || len(v.data) == 1 && v.data[0] > 1 {
		return v.name + " is neither 0 nor 1"
	}
	on := len(v.data) == 1 && v.data[0] == 1
	if was, again := s.states[v.name]; again && was != on {
		return v.name + " was measured before with another value"
	}
	if s.states == nil {
		s.states = map[string]bool{}
	}
	s.states[v.name] = on
	return ""
}

func (s *secureBootVariables) database(m *measurement, v variable) (why string) {
	db := parseDatabase(v.data)
	switch was := s.databases[v.name]; {
	case was == nil:
		if s.databases == nil {
			s.databases = map[string]*SignatureDatabase{}
		}
		s.databases[v.name] = db
	case v.name == "db":
		s.authorities = append(s.authorities, authority(m, v))
	case was.SHA256 != db.SHA256:
		return v.name + " was measured before with another content"
	}
	return ""
}

// facts writes down what firmware measured of Secure Boot itself.
func (s *secureBootVariables) facts(f *Facts) {
	if on, ok := s.states["SecureBoot"]; ok {
		f.SecureBoot = &on
	}
	f.Databases = s.databases
	if pk := f.Databases["PK"]; pk != nil {
		f.SecureBootMode = mode(pk, s.states)
	}
}

// mode is Secure Boot's mode by UEFI's rules. Where firmware doesn't measure
// DeployedMode, user stands for both.
func mode(pk *SignatureDatabase, state map[string]bool) string {
	switch {
	case state["AuditMode"]:
		return "audit"
	case len(pk.Certificates) == 0 && pk.HashCount == 0:
		return "setup"
	case state["DeployedMode"]:
		return "deployed"
	}
	return "user"
}

// parseDatabase reads EFI_SIGNATURE_LISTs.
func parseDatabase(b []byte) *SignatureDatabase {
	db := &SignatureDatabase{SHA256: evidence.Sum(b)}
	const header, owner = 16 + 4 + 4 + 4, 16
	for len(b) > 0 {
		if len(b) < header {
			db.Malformed = true
			return db
		}
		kind := [16]byte(b)
		list := uint64(binary.LittleEndian.Uint32(b[16:]))
		own := uint64(binary.LittleEndian.Uint32(b[20:]))
		size := uint64(binary.LittleEndian.Uint32(b[24:]))
		if list > uint64(len(b)) || list < header+own || size <= owner || (list-header-own)%size != 0 {
			db.Malformed = true
			return db
		}
		for entries := b[header+own : list]; len(entries) > 0; entries = entries[size:] {
			content := entries[owner:size]
			switch {
			case kind == guidX509:
				db.Certificates = append(db.Certificates, certificate(content))
			case kind == guidSHA256 && len(content) == len(evidence.Digest{}):
				db.Hashes = append(db.Hashes, evidence.Digest(content))
				db.HashCount++
			default:
				db.HashCount++
			}
		}
		b = b[list:]
	}
	return db
}

// maxCertificate bounds what is parsed for a name, in bytes: Go writes names in a
// time that grows with the square of their length.
const maxCertificate = 4096

func certificate(der []byte) Certificate {
	c := Certificate{SHA256: evidence.Sum(der)}
	if len(der) > maxCertificate {
		return c
	}
	if parsed, err := x509.ParseCertificate(der); err == nil {
		c.Subject = parsed.Subject.String()
	}
	return c
}

// authority reads what an image was verified by: an entry of db behind its
// owner's GUID, a bare certificate, or another variable's content.
func authority(m *measurement, v variable) Authority {
	a := Authority{Variable: v.name, SHA256: m.digest}
	for _, skip := range []int{0, 16} {
		if len(v.data) > skip && isDER(v.data[skip:]) {
			c := certificate(v.data[skip:])
			a.Certificate = &c
			break
		}
	}
	return a
}

// isDER says whether b is exactly one ASN.1 SEQUENCE of a certificate's size.
func isDER(b []byte) bool {
	return len(b) > 4 && slices.Equal(b[:2], []byte{0x30, 0x82}) && int(binary.BigEndian.Uint16(b[2:])) == len(b)-4
}
