package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/boot"
)

func TestConfidentialVMWithoutTPM(t *testing.T) {
	table := filepath.Join(t.TempDir(), "CCEL")
	missing := fmt.Errorf("TPM /dev/tpmrm0: %w", os.ErrNotExist)
	const want = "a confidential VM without a vTPM"
	if text := tpmError(missing, table); strings.Contains(text, want) {
		t.Error(text)
	}
	if err := os.WriteFile(table, []byte("CCEL"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text := tpmError(missing, table); !strings.Contains(text, want) {
		t.Error(text)
	}
	if text := tpmError(errors.New("the TPM is busy"), table); strings.Contains(text, want) {
		t.Error(text)
	}
}

func TestEventLogWithoutSHA256(t *testing.T) {
	log := boot.Log{Events: []boot.Event{{PCR: 0, Type: boot.Separator, Digests: []boot.Digest{{Algorithm: boot.SHA1, Value: make([]byte, 20)}}, Data: make([]byte, 4)}}}
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, log.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readEvents(file); err == nil || !strings.Contains(err.Error(), "the log has no SHA-256 digests, only SHA-1") {
		t.Error(err)
	}
}
