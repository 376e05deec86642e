package lab

import (
	"bytes"
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/tpm"
)

// tpmCommandLimit bounds one command that the lab sends to a software TPM, the
// wait for other clients of it included.
const tpmCommandLimit = 10 * time.Second

// TPMOptions say what kind of TPM to make.
type TPMOptions struct {
	// NoCertificates leaves the endorsement keys without certificates, as
	// many virtual TPMs do.
	NoCertificates bool
}

// A TPM is a running swtpm. It has RSA-2048 and P-384 endorsement keys as swtpm
// makes them, and a P-256 one that the TPM derives; unless asked otherwise each
// has a certificate of the lab's CA in NV memory.
type TPM struct {
	Socket string // plain TPM commands; its control socket is Socket + ".ctrl"

	dir     string
	mu      sync.Mutex // guards process
	process *exec.Cmd
	exited  chan struct{}
}

// StartTPM makes a new TPM with its state in dir and starts it. It runs until
// Stop, at the latest until this process ends.
func StartTPM(ctx context.Context, dir string, ca *TPMCA, options TPMOptions) (*TPM, error) {
	for _, tool := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%s is missing: apt-get install swtpm swtpm-tools", tool)
		}
	}
	t := &TPM{Socket: filepath.Join(dir, "tpm.sock"), dir: dir}
	if len(t.Socket)+len(".ctrl") > 107 {
		return nil, fmt.Errorf("the path of a socket has at most 107 bytes: %s.ctrl", t.Socket)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	args := []string{"--tpm2", "--tpmstate", dir, "--createek", "--config", ca.setupConfig(), "--logfile", filepath.Join(dir, "setup.log")}
	if !options.NoCertificates {
		args = append(args, "--create-ek-cert")
	}
	setup := exec.CommandContext(ctx, "swtpm_setup", args...)
	setup.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := setup.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "setup.log"))
		return nil, fmt.Errorf("swtpm_setup: %w\n%s%s", err, out, log)
	}
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	if !options.NoCertificates {
		if err := t.certifyP256(ca); err != nil {
			t.Stop()
			return nil, err
		}
	}
	return t, nil
}

// Path is how an agent names this TPM.
func (t *TPM) Path() string { return "unix:" + t.Socket }

func (t *TPM) start(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, socket := range []string{t.Socket, t.Socket + ".ctrl"} {
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	var output bytes.Buffer
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.dir,
		"--server", "type=unixio,path="+t.Socket, "--ctrl", "type=unixio,path="+t.Socket+".ctrl",
		"--flags", "not-need-init,startup-clear")
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := spawn(cmd, syscall.SIGKILL); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.process, t.exited = cmd, exited
	for {
		if conn, err := net.Dial("unix", t.Socket); err == nil {
			return conn.Close()
		}
		select {
		case <-exited:
			return fmt.Errorf("swtpm ended: %s", output.String())
		case <-ctx.Done():
			t.kill()
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// kill takes the power away. The caller holds mu.
func (t *TPM) kill() {
	if t.process != nil {
		_ = t.process.Process.Kill()
		<-t.exited
		t.process = nil
	}
}

// Stop shuts the TPM down in good order; its state stays in the folder.
func (t *TPM) Stop() {
	// Without the shutdown the next start would count as a power cut.
	_, _ = tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(t)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kill()
}

// PowerCycle shuts the TPM down in good order and starts it again, as a host's
// restart does.
func (t *TPM) PowerCycle(ctx context.Context) error {
	t.Stop()
	return t.start(ctx)
}

// PowerCut takes the power away in the midst of whatever the TPM does, and
// starts it again.
func (t *TPM) PowerCut(ctx context.Context) error {
	t.mu.Lock()
	t.kill()
	t.mu.Unlock()
	return t.start(ctx)
}

// Snapshot copies the TPM's state, as a hypervisor's snapshot of a virtual
// machine does; Revert puts the copy in force again.
func (t *TPM) Snapshot() ([]byte, error) { return os.ReadFile(t.state()) }

// Revert goes back to a snapshot.
func (t *TPM) Revert(ctx context.Context, snapshot []byte) error {
	t.mu.Lock()
	t.kill()
	t.mu.Unlock()
	if err := os.WriteFile(t.state(), snapshot, 0o600); err != nil {
		return err
	}
	return t.start(ctx)
}

func (t *TPM) state() string { return filepath.Join(t.dir, "tpm2-00.permall") }

// Clear is TPM2_Clear: keys under the owner hierarchy are lost, endorsement
// keys and their certificates stay.
func (t *TPM) Clear() error {
	_, err := tpm2.Clear{AuthHandle: tpm2.TPMRHPlatform}.Execute(t)
	return err
}

// Extend measures data into a PCR of the SHA-256 bank.
func (t *TPM) Extend(pcr int, data []byte) error {
	h := crypto.SHA256.New()
	h.Write(data)
	return t.ExtendDigest(pcr, [32]byte(h.Sum(nil)))
}

// ExtendDigest extends a PCR of the SHA-256 bank by a digest.
func (t *TPM) ExtendDigest(pcr int, digest [32]byte) error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{
			HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}},
	}.Execute(t)
	return err
}

// Send implements go-tpm's transport.TPM: one command on a connection of its
// own, so that other clients get their turn.
func (t *TPM) Send(command []byte) ([]byte, error) {
	conn, err := net.Dial("unix", t.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(tpmCommandLimit)); err != nil {
		return nil, err
	}
	if _, err := conn.Write(command); err != nil {
		return nil, err
	}
	header := make([]byte, 10)
	if _, err := io.ReadFull(conn, header); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < 10 || size > 4096 {
		return nil, fmt.Errorf("swtpm answers with %d bytes", size)
	}
	response := append(header, make([]byte, size-10)...)
	_, err = io.ReadFull(conn, response[10:])
	return response, err
}

// certifyP256 puts a certificate of the derived P-256 endorsement key where
// the TCG's registry has it.
func (t *TPM) certifyP256(ca *TPMCA) error {
	templates := tpm.EKTemplates()
	template := templates[slices.IndexFunc(templates, func(t tpm.EKTemplate) bool { return t.Algorithm == tpm.P256 })]
	ek, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template.Public)}.Execute(t)
	if err != nil {
		return err
	}
	if _, err := (tpm2.FlushContext{FlushHandle: ek.ObjectHandle}).Execute(t); err != nil {
		return err
	}
	public, err := ek.OutPublic.Contents()
	if err != nil {
		return err
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		return err
	}
	certificate, err := ca.IssueEK(key)
	if err != nil {
		return err
	}
	return t.WriteNV(template.NVIndex, certificate)
}

// WriteNV defines an NV index of the platform's, which anybody may read, and
// fills it.
func (t *TPM) WriteNV(index tpm2.TPMHandle, data []byte) error {
	if _, err := (tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHPlatform,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: index,
			NameAlg: tpm2.TPMAlgSHA256,
			Attributes: tpm2.TPMANV{PPWrite: true, PPRead: true, OwnerRead: true, AuthRead: true,
				NoDA: true, PlatformCreate: true},
			DataSize: uint16(len(data)),
		}),
	}).Execute(t); err != nil {
		return err
	}
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		return err
	}
	name := public.NVName
	for offset := 0; offset < len(data); offset += 512 {
		if _, err := (tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[offset:min(offset+512, len(data))]},
			Offset:     uint16(offset),
		}).Execute(t); err != nil {
			return err
		}
		// The first write sets the index's "written" attribute, which is in its name.
		if public, err = (tpm2.NVReadPublic{NVIndex: index}).Execute(t); err != nil {
			return err
		}
		name = public.NVName
	}
	return nil
}
