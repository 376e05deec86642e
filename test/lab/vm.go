package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/countersign/countersign/test/vm/control"
)

// BrokerInVM is where a virtual machine reaches the lab's broker, on the port
// that it has on this machine.
const BrokerInVM = "10.0.2.100"

// grubConfig has the kernel measure what tcb means: what is executed or mapped
// to be, modules, and what root reads.
const grubConfig = `set timeout=0
linux /vmlinuz root=/dev/nvme0n1p2 rw console=ttyS0 ima_policy=tcb panic=-1 quiet init=/sbin/init
boot
`

// The disk, in MiB.
const (
	espStart  = 1
	espSize   = 64
	rootStart = espStart + espSize
	rootSize  = 192
)

// A VMFile is put into a virtual machine's image; it is root's there.
type VMFile struct {
	Path    string // in the machine
	Source  string // on this machine; or
	Content string
	Mode    os.FileMode
}

// A VM is a virtual machine, emulated: UEFI with Secure Boot and Microsoft's
// keys, a TPM, Debian's signed shim, GRUB and kernel, an ext4 root with
// test/vm/init and the files it was given, and a network in which there is a
// broker and nothing else.
type VM struct {
	Console string // file with what kernel, init and its children print

	qemu, swtpm *process
	port        net.Conn // its init's
	lines       *bufio.Reader
}

// StartVM boots a virtual machine that has tpm, a TPM that was just made: it
// serves nobody else from then on, and ends with the machine.
func StartVM(ctx context.Context, dir string, tpm *TPM, b *Broker, files ...VMFile) (v *VM, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := makeDisk(ctx, dir, files); err != nil {
		return nil, err
	}
	v = &VM{Console: filepath.Join(dir, "console.log")}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.kill())
		}
	}()
	control, err := v.startTPM(ctx, tpm)
	if err != nil {
		return nil, err
	}
	if err := v.startQEMU(ctx, dir, control, b); err != nil {
		return nil, err
	}
	return v, v.awaitInit(ctx)
}

// startTPM starts the TPM again with a control channel alone: QEMU hands it the
// command channel over that, and powers it on and off.
func (v *VM) startTPM(ctx context.Context, tpm *TPM) (control string, err error) {
	tpm.Stop()
	control = tpm.Socket + ".qemu"
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+tpm.dir, "--ctrl", "type=unixio,path="+control, "--terminate")
	if v.swtpm, err = startProcess(cmd, filepath.Join(tpm.dir, "swtpm-qemu.log"), syscall.SIGKILL); err != nil {
		return "", err
	}
	return control, v.swtpm.await(ctx, func(context.Context) error {
		_, err := os.Stat(control)
		return err
	})
}

func (v *VM) startQEMU(ctx context.Context, dir, tpm string, b *Broker) error {
	const firmware, variables = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"
	vars := filepath.Join(dir, "vars.fd")
	if err := copyFile(variables, vars, 0o600); err != nil {
		return fmt.Errorf("%w: run test/vm/setup.sh", err)
	}
	port := filepath.Join(dir, "port.sock")
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "q35,smm=on", "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand", "-m", "512",
		"-global", "driver=cfi.pflash01,property=secure,value=on",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+firmware,
		"-drive", "if=pflash,unit=1,format=raw,file="+vars,
		"-drive", "if=none,id=disk,format=raw,file="+filepath.Join(dir, "disk.img"), "-device", "nvme,drive=disk,serial=vm,bootindex=0",
		"-chardev", "socket,id=tpm,path="+tpm, "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm",
		// A program for each connection: a character device would be one connection for all.
		"-netdev", fmt.Sprintf("user,id=net,restrict=on,guestfwd=tcp:%s-cmd:nc -N %s", InVM(b), strings.Replace(b.Addr, ":", " ", 1)),
		"-device", "virtio-net-pci,netdev=net,romfile=",
		"-serial", "file:"+v.Console, "-serial", "unix:"+port+",server=on,wait=off")
	var err error
	if v.qemu, err = startProcess(cmd, filepath.Join(dir, "qemu.log"), syscall.SIGKILL); err != nil {
		return err
	}
	return v.qemu.await(ctx, func(context.Context) error {
		v.port, err = net.Dial("unix", port)
		return err
	})
}

// InVM is HOST:PORT of the broker, for a virtual machine.
func InVM(b *Broker) string {
	_, port, _ := strings.Cut(b.Addr, ":")
	return BrokerInVM + ":" + port
}

func (v *VM) awaitInit(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = v.port.SetReadDeadline(time.Now()) })
	defer stop()
	v.lines = bufio.NewReaderSize(v.port, control.MaxLine)
	for {
		line, err := v.lines.ReadSlice('\n')
		if err != nil {
			return errors.Join(fmt.Errorf("the virtual machine doesn't come up: %w; it printed:\n%s", err, v.Printed()), ctx.Err())
		}
		if strings.TrimSpace(string(line)) == control.Ready {
			return nil
		}
	}
}

// Printed is what stands on the console.
func (v *VM) Printed() string {
	b, err := os.ReadFile(v.Console)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Run runs a program as root and returns what it prints.
func (v *VM) Run(ctx context.Context, stdin string, argv ...string) (string, error) {
	a, err := v.ask(ctx, control.Request{Run: argv, Stdin: stdin})
	return a.Output, err
}

// Start starts a program as the user uid; it prints on the console.
func (v *VM) Start(ctx context.Context, uid uint32, argv ...string) (pid int, err error) {
	a, err := v.ask(ctx, control.Request{Start: argv, UID: uid})
	return a.PID, err
}

// End ends a program that Start started.
func (v *VM) End(ctx context.Context, pid int) error {
	_, err := v.ask(ctx, control.Request{Stop: pid})
	return err
}

// ReadFile reads one of the machine's files.
func (v *VM) ReadFile(ctx context.Context, path string) (string, error) {
	a, err := v.ask(ctx, control.Request{Read: path})
	return a.Output, err
}

// Change puts in a program's place one that does the same and isn't the same.
func (v *VM) Change(ctx context.Context, path string) error {
	_, err := v.ask(ctx, control.Request{Change: path})
	return err
}

func (v *VM) ask(ctx context.Context, q control.Request) (a control.Reply, err error) {
	stop := context.AfterFunc(ctx, func() { _ = v.port.SetDeadline(time.Now()) })
	defer stop()
	if err := json.NewEncoder(v.port).Encode(q); err != nil {
		return a, err
	}
	line, err := v.lines.ReadSlice('\n')
	if err != nil {
		return a, errors.Join(fmt.Errorf("the virtual machine doesn't answer: %w", err), ctx.Err())
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, err
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// Stop powers the machine off, and pulls the plug where that takes a minute.
func (v *VM) Stop() error {
	if err := json.NewEncoder(v.port).Encode(control.Request{PowerOff: true}); err == nil {
		select {
		case <-v.qemu.ended:
		case <-time.After(time.Minute):
		}
	}
	return v.kill()
}

func (v *VM) kill() error {
	var errs []error
	if v.port != nil {
		errs = append(errs, v.port.Close())
	}
	for _, p := range []*process{v.qemu, v.swtpm} {
		if p != nil {
			errs = append(errs, p.stop(syscall.SIGTERM))
		}
	}
	return errors.Join(errs...)
}

// makeDisk makes disk.img in dir: an EFI system partition and a root.
func makeDisk(ctx context.Context, dir string, files []VMFile) error {
	boot, err := bootFiles(ctx)
	if err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	if err := makeRoot(ctx, root, boot, files); err != nil {
		return err
	}
	disk, config := filepath.Join(dir, "disk.img"), filepath.Join(dir, "grub.cfg")
	if err := os.WriteFile(config, []byte(grubConfig), 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(disk, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate((rootStart+rootSize+1)<<20), f.Close()); err != nil {
		return err
	}
	table := fmt.Sprintf("label: gpt\nstart=%dMiB, size=%dMiB, type=uefi\nstart=%dMiB, size=%dMiB, type=linux\n", espStart, espSize, rootStart, rootSize)
	esp := fmt.Sprintf("%s@@%dM", disk, espStart)
	for _, step := range []struct {
		stdin string
		argv  []string
	}{
		{table, []string{"sfdisk", "--quiet", disk}},
		{"", []string{"mformat", "-i", esp, "-T", fmt.Sprint(espSize << 20 / 512), "-h", "64", "-s", "32", "::"}},
		{"", []string{"mmd", "-i", esp, "::/EFI", "::/EFI/BOOT", "::/EFI/debian"}},
		{"", []string{"mcopy", "-i", esp, filepath.Join(boot, "shimx64.efi"), "::/EFI/BOOT/BOOTX64.EFI"}},
		{"", []string{"mcopy", "-i", esp, filepath.Join(boot, "grubx64.efi"), "::/EFI/BOOT/grubx64.efi"}},
		{"", []string{"mcopy", "-i", esp, config, "::/EFI/debian/grub.cfg"}},
		{"", []string{"mcopy", "-i", esp, filepath.Join(boot, "vmlinuz"), "::/vmlinuz"}},
		{"", []string{"mke2fs", "-q", "-t", "ext4", "-d", root, "-E", fmt.Sprintf("offset=%d", rootStart<<20), disk, fmt.Sprintf("%dM", rootSize)}},
	} {
		cmd := exec.CommandContext(ctx, step.argv[0], step.argv[1:]...)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK=1")
		cmd.Stdin = strings.NewReader(step.stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s: run test/vm/setup.sh", step.argv[0], err, out)
		}
	}
	return os.RemoveAll(root)
}

// bootFiles asks test/vm/setup.sh, which fetches them, where the boot files are.
func bootFiles(ctx context.Context) (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	setup := filepath.Join(root, "test", "vm", "setup.sh")
	out, err := exec.CommandContext(ctx, "sh", setup, "--where").Output()
	if err != nil {
		return "", fmt.Errorf("%s --where: %w", setup, err)
	}
	dir := strings.TrimSpace(string(out))
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%w: run test/vm/setup.sh", err)
	}
	return dir, nil
}

// makeRoot fills a folder with what the machine's root holds.
func makeRoot(ctx context.Context, root, boot string, files []VMFile) error {
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc/billing", "var/lib/countersign-agent"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	modules, err := filepath.Glob(filepath.Join(boot, "modules", "*.ko"))
	if err != nil {
		return err
	}
	for _, m := range modules {
		files = append(files, VMFile{Path: "/lib/modules/" + filepath.Base(m), Source: m, Mode: 0o644})
	}
	for _, f := range files {
		to := filepath.Join(root, f.Path)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if f.Source != "" {
			err = copyFile(f.Source, to, f.Mode)
		} else {
			err = os.WriteFile(to, []byte(f.Content), f.Mode)
		}
		if err != nil {
			return err
		}
	}
	return BuildForVM(ctx, "./test/vm/init", filepath.Join(root, "sbin", "init"))
}

// BuildForVM compiles a program for the machine.
func BuildForVM(ctx context.Context, pkg, path string) error {
	return build(ctx, pkg, path, "GOOS=linux", "GOARCH=amd64")
}

func copyFile(from, to string, mode fs.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}
