package collect_test

import (
	"encoding/binary"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
	"github.com/google/go-tpm/tpm2"
)

// between puts itself before a real TPM: it shows each command's code to hook,
// which may answer in the TPM's stead, or nil to let the command through.
func between(t *testing.T, real *lab.TPM, hook func(code tpm2.TPMCC) (response []byte)) *collect.Device {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener := must[net.Listener](t)(net.Listen("unix", path))
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			command := make([]byte, 4096)
			for {
				n, err := conn.Read(command)
				if err != nil {
					break
				}
				response := hook(tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])))
				if response == nil {
					if response, err = real.Send(command[:n]); err != nil {
						break
					}
				}
				if _, err := conn.Write(response); err != nil {
					break
				}
			}
			conn.Close()
		}
	}()
	return must[*collect.Device](t)(collect.Open("unix:" + path))
}

// answer is a response that has a code and nothing else.
func answer(rc tpm2.TPMRC) []byte {
	return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc))
}

// A PCR that is extended between quote and reading makes another quote.
func TestQuoteAndValuesAgree(t *testing.T) {
	real, _, _ := start(t, lab.TPMOptions{NoCertificates: true})
	quotes, extends := 0, 2
	device := between(t, real, func(code tpm2.TPMCC) []byte {
		if code == tpm2.TPMCCQuote {
			quotes++
		}
		if code == tpm2.TPMCCPCRRead && extends > 0 {
			extends--
			if err := real.Extend(10, []byte("measured meanwhile")); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	ak := must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	must[tpm.Quote](t)(device.Quote(t.Context(), ak, evidence.Sum(nil), []int{10}))
	if quotes != 3 {
		t.Errorf("%d quotes, want one more than the 2 that didn't fit", quotes)
	}
	extends = 1 << 30
	if _, err := device.Quote(t.Context(), ak, evidence.Sum(nil), []int{10}); err == nil || !strings.Contains(err.Error(), "were extended during each") {
		t.Errorf("PCRs that never rest: %v", err)
	}
}

func TestABusyTPMIsAskedAgain(t *testing.T) {
	real, _, _ := start(t, lab.TPMOptions{NoCertificates: true})
	busy := []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting}
	device := between(t, real, func(tpm2.TPMCC) []byte {
		if len(busy) == 0 {
			return nil
		}
		rc := busy[0]
		busy = busy[1:]
		return answer(rc)
	})
	must[collect.Info](t)(device.Info(t.Context()))
	if len(busy) != 0 {
		t.Errorf("not asked again after %v", busy)
	}
}

// Whatever stands in the TPM's place can't make the agent panic or hang.
func TestWrongAnswers(t *testing.T) {
	real, _, _ := start(t, lab.TPMOptions{NoCertificates: true})
	for _, wrong := range [][]byte{
		{0x80, 0x01, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		{0x80, 0x01, 0, 0, 0, 3, 0, 0, 0, 0},
		{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0},
		answer(tpm2.TPMRCFailure),
	} {
		device := between(t, real, func(tpm2.TPMCC) []byte { return wrong })
		if _, err := device.Info(t.Context()); err == nil {
			t.Errorf("took %x for an answer", wrong)
		}
	}
}
