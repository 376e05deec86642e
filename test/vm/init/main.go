// Command init is process 1 of the virtual machine: it mounts, loads the network
// card's modules, sets the network up and does what the host asks on the second
// serial port. What it and its children print goes to the first.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/test/vm/control"
)

func main() {
	err := run()
	fmt.Println("init:", err)
	unix.Sync()
	// The end of process 1 would be a panic of the kernel's.
	fmt.Println("init:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

var errPowerOff = errors.New("powering off")

func run() error {
	if err := mount(); err != nil {
		return err
	}
	modules, err := filepath.Glob("/lib/modules/*.ko") // in order, which is that of loading
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := load(m); err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	if err := network(); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := os.Setenv("PATH", "/usr/local/bin:/usr/bin:/sbin"); err != nil {
		return err
	}
	return serve("/dev/ttyS1")
}

// mount mounts what Linux programs expect. What root writes and reads again
// differs from boot to boot: it lies in memory, which IMA's tcb policy leaves
// out.
func mount() error {
	for _, m := range []struct{ kind, on, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"securityfs", "/sys/kernel/security", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/run", "mode=755"},
		{"tmpfs", "/tmp", "mode=1777"},
		{"tmpfs", "/etc/billing", "mode=755"},
	} {
		if err := unix.Mount(m.kind, m.on, m.kind, unix.MS_NOSUID, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.on, err)
		}
	}
	return unix.Sethostname([]byte("vm"))
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// network gives the loopback and the network card their addresses. Everything
// that the machine may reach is in its own network.
func network() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	for _, card := range []struct {
		name          string
		address, mask []byte
	}{
		{"lo", []byte{127, 0, 0, 1}, []byte{255, 0, 0, 0}},
		{"eth0", []byte{10, 0, 2, 15}, []byte{255, 255, 255, 0}},
	} {
		for _, set := range []struct {
			request uint
			value   []byte
		}{{unix.SIOCSIFADDR, card.address}, {unix.SIOCSIFNETMASK, card.mask}, {unix.SIOCSIFFLAGS, nil}} {
			r, err := unix.NewIfreq(card.name)
			if err != nil {
				return err
			}
			if set.value == nil {
				r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
			} else if err := r.SetInet4Addr(set.value); err != nil {
				return err
			}
			if err := ioctlSoon(s, set.request, r); err != nil {
				return fmt.Errorf("%s: %w", card.name, err)
			}
		}
	}
	return nil
}

// ioctlSoon waits for a card that its module has not found yet.
func ioctlSoon(s int, request uint, r *unix.Ifreq) (err error) {
	for range 100 {
		if err = unix.IoctlIfreq(s, request, r); !errors.Is(err, unix.ENODEV) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// serve answers requests, one after the other.
func serve(port string) error {
	tty, err := os.OpenFile(port, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if err := raw(int(tty.Fd())); err != nil {
		return fmt.Errorf("%s: %w", port, err)
	}
	if _, err := fmt.Fprintf(tty, "\n%s\n", control.Ready); err != nil {
		return err
	}
	lines := bufio.NewScanner(tty)
	lines.Buffer(nil, control.MaxLine)
	for lines.Scan() {
		var q control.Request
		if err := json.Unmarshal(lines.Bytes(), &q); err != nil {
			return fmt.Errorf("%s: %w", port, err)
		}
		if q.PowerOff {
			return errPowerOff
		}
		var a control.Reply
		if err := answer(q, &a); err != nil {
			a.Error = err.Error()
		}
		if err := json.NewEncoder(tty).Encode(a); err != nil {
			return err
		}
	}
	return errors.Join(lines.Err(), io.ErrUnexpectedEOF)
}

// raw has the port carry bytes as they are.
func raw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

func answer(q control.Request, a *control.Reply) (err error) {
	switch {
	case len(q.Run) > 0:
		cmd := command(q.Run, q.UID)
		cmd.Stdin = strings.NewReader(q.Stdin)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err = cmd.Run(); err != nil {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		a.Output = stdout.String()
	case len(q.Start) > 0:
		cmd := command(q.Start, q.UID)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		if err = cmd.Start(); err == nil {
			a.PID = cmd.Process.Pid
			go func() { fmt.Printf("init: %s: %v\n", q.Start[0], cmd.Wait()) }()
		}
	case q.Read != "":
		var b []byte
		b, err = os.ReadFile(q.Read)
		a.Output = string(b)
	case q.Change != "":
		err = change(q.Change)
	case q.Stop > 0:
		err = unix.Kill(q.Stop, unix.SIGTERM)
	default:
		err = errors.New("nothing was asked for")
	}
	return err
}

func command(argv []string, uid uint32) *exec.Cmd {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

// change replaces a program, as an update does: the file that runs can't be
// written to. ELF ignores what follows its end.
func change(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(b, 0), 0o755); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
