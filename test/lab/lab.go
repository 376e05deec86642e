// Package lab starts the real parts that the tests and the demo run against, and
// stops them: software TPMs, Vault, PostgreSQL, and a systemd of its own.
//
// Everything listens on loopback, or on a link to a namespace of its own, keeps
// its files in the directory that it is given, and takes its secrets from
// crypto/rand. Nothing outlives the process that started it: each child is told
// to end when its parent does, even by SIGKILL. The lab never skips: where a part
// can't be had, starting it is an error that says what to install.
//
// It protects nothing. Vault's unseal key lies beside its storage, PostgreSQL
// doesn't flush to disk, and the systemd container can see the machine's files.
package lab

import (
	"crypto/rand"
	"net"
)

// freeAddr returns a loopback address that nothing listened on a moment ago.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// newPassword returns a random password of letters and digits.
func newPassword() string { return rand.Text() }
