package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace is a network namespace with an address of its own, joined to this
// machine by a pair of interfaces: a host, as those see it that it connects to.
type Namespace struct {
	Address string // the host's
	Here    string // this machine's, on the same link
	name    string
}

// ip runs ip(8).
func ip(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %v: %w: %s", args, err, out)
	}
	return nil
}

// NewNamespace makes one in the network 10.213.N.0/24. Close removes it.
func NewNamespace(ctx context.Context, n byte) (*Namespace, error) {
	s := &Namespace{Address: fmt.Sprintf("10.213.%d.2", n), Here: fmt.Sprintf("10.213.%d.1", n), name: fmt.Sprintf("countersign-%d-%d", os.Getpid(), n)}
	link := fmt.Sprintf("cs%d-%d", n, os.Getpid()%100000)
	for _, args := range [][]string{
		{"netns", "add", s.name},
		{"link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", s.name},
		{"addr", "add", s.Here + "/24", "dev", link},
		{"link", "set", link, "up"},
		{"-n", s.name, "addr", "add", s.Address + "/24", "dev", "eth0"},
		{"-n", s.name, "link", "set", "eth0", "up"},
		{"-n", s.name, "link", "set", "lo", "up"},
		// All addresses of this machine are reached over the link, and nothing beyond it.
		{"-n", s.name, "route", "add", "default", "via", s.Here},
	} {
		if err := ip(ctx, args...); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	return s, nil
}

// Link joins the namespace to another, as network 10.213.N.0/24, and gives the
// other's address there.
func (s *Namespace) Link(ctx context.Context, to *Namespace, n byte) (string, error) {
	link, address := fmt.Sprintf("eth%d", n), fmt.Sprintf("10.213.%d.2", n)
	for _, args := range [][]string{
		{"link", "add", link, "netns", s.name, "type", "veth", "peer", "name", link, "netns", to.name},
		{"-n", s.name, "addr", "add", fmt.Sprintf("10.213.%d.1/24", n), "dev", link},
		{"-n", s.name, "link", "set", link, "up"},
		{"-n", to.name, "addr", "add", address + "/24", "dev", link},
		{"-n", to.name, "link", "set", link, "up"},
	} {
		if err := ip(ctx, args...); err != nil {
			return "", err
		}
	}
	return address, nil
}

// Enter is what the command line of a program that is to run in the namespace
// begins with.
func (s *Namespace) Enter() []string { return []string{"nsenter", "--net=" + s.path()} }

func (s *Namespace) path() string { return "/run/netns/" + s.name }

// Close removes the namespace, and with it the link.
func (s *Namespace) Close() error {
	return exec.Command("ip", "netns", "delete", s.name).Run()
}

// DialContext connects from the namespace.
func (s *Namespace) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	out := make(chan result, 1)
	go func() {
		// The thread is the namespace's from here on; it ends with this goroutine.
		runtime.LockOSThread()
		f, err := os.Open(s.path())
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			_ = f.Close()
		}
		if err != nil {
			out <- result{nil, err}
			return
		}
		// An address that is none of a name's is connected to by this thread alone.
		conn, err := (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		out <- result{conn, err}
	}()
	r := <-out
	return r.conn, r.err
}
