package appraise

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"slices"

	"github.com/countersign/countersign/attestors/boot"
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
func (b *bootLog) secureBoot(f *Facts) error {
	seen := map[string]bool{}
	state := map[string]bool{}
	for i := range b.before(pcrSecureBoot) {
		m := &b.pcr[pcrSecureBoot][i]
		v, ok := parseVariable(m.Data)
		if !ok {
			if m.Type == boot.VariableDriverConfig || m.Type == boot.VariableAuthority {
				return reject(CheckStructure, "%v: its data is no variable", m)
			}
			f.SecureBootNotes = append(f.SecureBootNotes, note(m))
			continue
		}
		isState := states[v.name] == v.guid && v.guid == guidGlobal
		isDatabase := databases[v.name] == v.guid && (v.guid == guidGlobal || v.guid == guidSecurity)
		switch {
		case (isState || isDatabase) && !seen[v.name]:
			seen[v.name] = true
			if m.Type != boot.VariableDriverConfig {
				return reject(CheckStructure, "%v holds %s under another type", m, v.name)
			}
			if isDatabase {
				if f.Databases == nil {
					f.Databases = map[string]*SignatureDatabase{}
				}
				f.Databases[v.name] = parseDatabase(v.data)
				continue
			}
			if len(v.data) > 1 || len(v.data) == 1 && v.data[0] > 1 {
				return reject(CheckStructure, "%v: %s is neither 0 nor 1", m, v.name)
			}
			state[v.name] = len(v.data) == 1 && v.data[0] == 1
		case isState || v.name == "PK" || v.name == "KEK":
			return reject(CheckStructure, "%v measures %s a second time", m, v.name)
		case m.Type == boot.VariableDriverConfig && isDatabase:
			return reject(CheckStructure, "%v measures %s a second time", m, v.name)
		default:
			f.Authorities = append(f.Authorities, authority(m, v))
		}
	}
	if seen["SecureBoot"] {
		on := state["SecureBoot"]
		f.SecureBoot = &on
	}
	if pk := f.Databases["PK"]; pk != nil {
		f.SecureBootMode = mode(pk, state)
	}
	var sbat []string
	for i := range b.after(pcrSecureBoot) {
		m := &b.after(pcrSecureBoot)[i]
		v, ok := parseVariable(m.Data)
		if !ok {
			return reject(CheckStructure, "%v: its data is no variable", m)
		}
		if _, is := states[v.name]; is || v.name == "PK" || v.name == "KEK" {
			return reject(CheckStructure, "%v measures %s behind the separator", m, v.name)
		}
		f.Authorities = append(f.Authorities, authority(m, v))
		if v.guid == guidShim && v.name == "SbatLevel" {
			sbat = append(sbat, string(v.data))
		}
	}
	if len(sbat) == 1 && printable(sbat[0]) {
		f.SbatLevel = &sbat[0]
	}
	return nil
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

// note is what firmware says in PCR 7 beside variables, such as that DMA
// protection was off.
func note(m *measurement) string {
	if len(m.Data) <= maxText && printable(string(m.Data)) {
		return string(m.Data)
	}
	return "sha256:" + m.digest.String()
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
