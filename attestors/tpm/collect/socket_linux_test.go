package collect_test

import (
	"net"
	"testing"

	"github.com/countersign/countersign/test/lab"
)

// holdSocket is a client that connects to the TPM, has an answer and stays.
func holdSocket(t *testing.T, real *lab.TPM) (release func()) {
	t.Helper()
	conn, err := net.Dial("unix", real.Socket)
	if err != nil {
		t.Fatal(err)
	}
	// TPM2_GetRandom(1)
	if _, err := conn.Write([]byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	return func() { conn.Close() }
}
