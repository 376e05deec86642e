package appraise

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
)

// secureBootVariable is what the booted system itself saw: four bytes of
// attributes and the value.
func secureBootVariable(t *testing.T, fixture string) bool {
	b := read(t, fixture, "SecureBoot.efivar")
	return b[len(b)-1] == 1
}

func TestRecordedBoots(t *testing.T) {
	for _, fixture := range []string{"clean", "cmdline", "tampered"} {
		t.Run(fixture, func(t *testing.T) {
			log, pcrs := recorded(t, fixture)
			f := accepted(t, log, pcrs)
			if f.SecureBoot == nil || *f.SecureBoot != secureBootVariable(t, fixture) || !*f.SecureBoot {
				t.Errorf("secure boot: %v", f.SecureBoot)
			}
			if f.SecureBootMode != "user" {
				t.Errorf("mode %q", f.SecureBootMode)
			}
			want := strings.TrimPrefix(strings.TrimSpace(string(read(t, fixture, "cmdline"))), "BOOT_IMAGE=")
			if f.KernelCommandLine == nil || *f.KernelCommandLine != want {
				t.Errorf("command line %v, want %q", f.KernelCommandLine, want)
			}
			if !slices.Equal(f.PCRsReplayed, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14}) || !slices.Equal(f.PCRsUnused, []int{11, 12, 13, 15}) || f.PCRsUnreplayed != nil || f.PCRsUnexplained != nil {
				t.Errorf("replayed %v, unreplayed %v, unexplained %v", f.PCRsReplayed, f.PCRsUnreplayed, f.PCRsUnexplained)
			}
			if f.SbatLevel == nil || *f.SbatLevel != "sbat,1,2025021800\nshim,4\ngrub,5\n" {
				t.Errorf("SBAT level %v", f.SbatLevel)
			}
			var images []string
			for i, c := range f.Components {
				if c.Kind == KindApplication {
					images = append(images, c.SHA256.String()[:12]+f.Asserted.Components[i])
				}
			}
			if !slices.Equal(images, []string{
				`80a66d53a945EV_EFI_BOOT_SERVICES_APPLICATION \EFI\BOOT\BOOTX64.EFI`,
				`a68f6d71ebddEV_EFI_BOOT_SERVICES_APPLICATION \EFI\BOOT\grubx64.efi`,
				`5f21ff2c0d5dEV_EFI_BOOT_SERVICES_APPLICATION `,
				`5f21ff2c0d5dEV_EFI_BOOT_SERVICES_APPLICATION `,
			}) {
				t.Errorf("images %q", images)
			}
			if len(f.MOK) != 3 || !slices.Equal(f.Asserted.MOK, []string{"MokList", "MokListX", "MokListTrusted"}) {
				t.Errorf("MOK %v %v", f.MOK, f.Asserted.MOK)
			}
			var authorities []string
			for _, a := range f.Authorities {
				subject := ""
				if a.Certificate != nil {
					subject = a.Certificate.Subject
				}
				authorities = append(authorities, a.Variable+" "+subject)
			}
			if len(authorities) != 3 || !strings.HasPrefix(authorities[0], "db CN=Microsoft Corporation UEFI CA 2011") ||
				authorities[1] != "SbatLevel " || authorities[2] != "MokListRT CN=Debian Secure Boot CA" {
				t.Errorf("authorities %q", authorities)
			}
			pk, kek, db, dbx := f.Databases["PK"], f.Databases["KEK"], f.Databases["db"], f.Databases["dbx"]
			if len(pk.Certificates) != 1 || len(kek.Certificates) != 2 || len(db.Certificates) != 2 || len(dbx.Certificates) != 0 {
				t.Errorf("certificates %v %v %v %v", pk, kek, db, dbx)
			}
			// OVMF's variable store revokes the digest of nothing.
			if dbx.HashCount != 1 || !dbx.Contains(evidence.Sum(nil)) || dbx.Contains(evidence.Sum([]byte("x"))) || db.Contains(evidence.Sum(nil)) {
				t.Errorf("dbx %v", dbx)
			}
			if f.FirmwareVersion == nil || *f.FirmwareVersion != "" {
				t.Errorf("firmware version %v", f.FirmwareVersion)
			}
			if f.Windows != nil || f.Userspace != nil {
				t.Error("facts of Windows or systemd, which weren't there")
			}
		})
	}
}

func TestDirectKernelBoot(t *testing.T) {
	log, pcrs := recorded(t, "direct-kernel")
	f := accepted(t, log, pcrs)
	if f.SecureBoot == nil || *f.SecureBoot || secureBootVariable(t, "direct-kernel") || f.SecureBootMode != "setup" {
		t.Errorf("secure boot %v, mode %q", f.SecureBoot, f.SecureBootMode)
	}
	// The kernel's stub measures the command line by digest alone.
	if f.KernelCommandLine != nil {
		t.Errorf("command line %q, which the log doesn't hold", *f.KernelCommandLine)
	}
	line := strings.TrimSpace(string(read(t, "direct-kernel", "cmdline")))
	if len(f.Components) != 2 || f.Components[1].SHA256 != evidence.Sum(utf16Bytes(line+"\x00")) || f.Components[0].Kind != KindApplication || f.Asserted.Components[0] != "EV_EFI_BOOT_SERVICES_APPLICATION kernel" ||
		f.Components[1].Kind != KindFile || f.Asserted.Components[1] != "EV_EVENT_TAG LOADED_IMAGE::LoadOptions" {
		t.Errorf("components %v %q", f.Components, f.Asserted.Components)
	}
}

// Two boots of which only the IMA list differs have the same facts; another
// command line is told from the first.
func TestBootsCompare(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	clean := accepted(t, log, pcrs)
	log, pcrs = recorded(t, "tampered")
	if tampered := accepted(t, log, pcrs); !reflect.DeepEqual(clean, tampered) {
		t.Error("clean and tampered differ before IMA")
	}
	log, pcrs = recorded(t, "cmdline")
	if other := accepted(t, log, pcrs); *other.KernelCommandLine == *clean.KernelCommandLine {
		t.Error("the command lines are told to be the same")
	}
}

func TestFactsAsJSON(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	b, err := json.Marshal(accepted(t, log, pcrs))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"secure_boot":true`, `"kernel_command_line":"/vmlinuz root=`, `"boot_components":[{"pcr":4,`, `"pcrs_replayed":[0,`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
}

// PCRs that weren't quoted prove nothing.
func TestUnquotedPCRs(t *testing.T) {
	log, pcrs := recorded(t, "clean")
	accepted(t, log, pcrs)
	delete(pcrs, 7)
	delete(pcrs, 8)
	f := accepted(t, log, pcrs)
	if f.SecureBoot != nil || f.SecureBootMode != "" || f.Databases != nil || f.Authorities != nil || f.KernelCommandLines != nil || f.GRUBCommands != nil {
		t.Errorf("facts of PCRs that weren't quoted: %+v", f)
	}
	if slices.Contains(f.PCRsReplayed, 7) || slices.Contains(f.PCRsReplayed, 8) {
		t.Errorf("replayed %v", f.PCRsReplayed)
	}
}

// A certificate is known by its digest, whatever its name; one of megabytes would
// take a minute to be written.
func TestLongCertificates(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for units, named := range map[int]bool{10: true, 1000: false} {
		c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{OrganizationalUnit: slices.Repeat([]string{"unit"}, units)}}
		der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		if got := certificate(der); got.SHA256 != evidence.Sum(der) || (got.Subject != "") != named {
			t.Errorf("%d units: %+v", units, got)
		}
	}
}
