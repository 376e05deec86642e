// Package collect is the host's side of a TPM 2.0: it finds the endorsement
// keys, makes the host's attestation and TLS keys, and has the TPM state what
// it measured.
//
// It trusts the TPM and whoever may open it. It promises to hold nothing
// between operations: each one opens the TPM, does its work, flushes what it
// loaded and closes it again, one at a time, so that other programs and a TPM
// that serves one client at a time stay usable. Keys live outside of the TPM
// as a Blob, which is of use in this TPM alone.
package collect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

const (
	maxResponse  = 4096 // the most that a PC client TPM answers
	retryFirst   = 5 * time.Millisecond
	retryMost    = 320 * time.Millisecond
	retryAll     = 10 * time.Second // how long a TPM may stay busy
	commandLimit = 2 * time.Minute  // the longest command: an RSA key on a slow TPM
)

// A Device is a TPM by its path. It is safe for concurrent use.
type Device struct {
	path string
	turn chan struct{} // holds one token: whoever has it may talk to the TPM
}

// Open names the TPM to use: a device such as /dev/tpmrm0, or unix:/path for a
// software TPM's socket. On Windows the device's path is ignored, since the
// system has one TPM. Nothing is opened before the first operation.
func Open(path string) (*Device, error) {
	if path == "" || path == "unix:" {
		return nil, errors.New("no path to a TPM: give a device such as /dev/tpmrm0, or unix:/path/to/socket")
	}
	d := &Device{path: path, turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d, nil
}

// A session is the TPM for the length of one operation.
type session struct {
	ctx    context.Context
	tpm    io.Closer
	send   func([]byte) ([]byte, error)
	loaded []tpm2.TPMHandle // flushed at the end, the latest first
	broken bool             // the connection is lost, or out of step
}

// do runs one operation. Where an earlier process died and left its handles
// behind, they are flushed and the operation runs once more.
func (d *Device) do(ctx context.Context, what string, operation func(*session) error) error {
	select {
	case <-d.turn:
	case <-ctx.Done():
		return fmt.Errorf("TPM %s: %s: waiting for another operation: %w", d.path, what, ctx.Err())
	}
	defer func() { d.turn <- struct{}{} }()

	err := d.once(ctx, operation)
	if errors.Is(err, tpm2.TPMRCObjectMemory) || errors.Is(err, tpm2.TPMRCSessionMemory) || errors.Is(err, tpm2.TPMRCSessionHandles) {
		if err = d.once(ctx, (*session).flushLeftovers); err == nil {
			err = d.once(ctx, operation)
		}
	}
	if err != nil {
		return fmt.Errorf("TPM %s: %s: %w", d.path, what, err)
	}
	return nil
}

func (d *Device) once(ctx context.Context, operation func(*session) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	s := &session{ctx: ctx}
	if path, ok := strings.CutPrefix(d.path, "unix:"); ok {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err != nil {
			return err
		}
		s.tpm, s.send = conn, func(command []byte) ([]byte, error) { return exchange(s.ctx, conn, command) }
	} else {
		device, err := openDevice(d.path)
		if err != nil {
			return err
		}
		s.tpm, s.send = device, device.Send
	}
	defer func() {
		s.ctx = context.WithoutCancel(ctx) // or a software TPM would keep what is loaded
		s.flush()
		if e := s.tpm.Close(); err == nil {
			err = e
		}
	}()
	return operation(s)
}

// Send implements transport.TPM: it sends a command until the TPM takes it.
func (s *session) Send(command []byte) ([]byte, error) {
	deadline := time.Now().Add(retryAll)
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		response, err := s.send(command)
		s.broken = s.broken || err != nil
		if err != nil || !busy(response) || time.Now().After(deadline) {
			return response, err
		}
		select {
		case <-time.After(wait):
		case <-s.ctx.Done():
			return nil, s.ctx.Err()
		}
	}
}

// busy says whether the TPM asks to be sent the same command again.
func busy(response []byte) bool {
	if len(response) < 10 {
		return false
	}
	switch tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])) {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
		return true
	}
	return false
}

// flush lets go of what the operation loaded.
func (s *session) flush() {
	for i := len(s.loaded) - 1; i >= 0 && !s.broken; i-- {
		// A handle that can't be flushed is one that is no longer there.
		_, _ = tpm2.FlushContext{FlushHandle: s.loaded[i]}.Execute(s)
	}
	s.loaded = nil
}

// flushLeftovers flushes all that is loaded. A resource manager shows each
// client its own handles only, so this takes nothing from anybody else.
func (s *session) flushLeftovers() error {
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} { // transient objects; HMAC and policy sessions
		handles, err := s.handles(first)
		if err != nil {
			return err
		}
		s.loaded = append(s.loaded, handles...)
	}
	return nil
}

// handles lists the handles of one kind from the first one on.
func (s *session) handles(first uint32) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(s)
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, err
	}
	return list.Handle, nil
}

// exchange speaks to a software TPM: plain commands and responses.
func exchange(ctx context.Context, conn net.Conn, command []byte) ([]byte, error) {
	if err := conn.SetDeadline(time.Now().Add(commandLimit)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	response := make([]byte, maxResponse)
	n, err := func() (int, error) {
		if _, err := conn.Write(command); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(conn, response[:10]); err != nil {
			return 0, err
		}
		size := binary.BigEndian.Uint32(response[2:])
		if size < 10 || size > maxResponse {
			return 0, fmt.Errorf("a response of %d bytes", size)
		}
		_, err := io.ReadFull(conn, response[10:size])
		return int(size), err
	}()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return response[:n], err
}

var _ transport.TPM = (*session)(nil)
