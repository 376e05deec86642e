package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// A Pooler is a running pgbouncer in a namespace: what clients do through it,
// PostgreSQL sees as done from there.
type Pooler struct{ process *process }

// StartPooler runs one on address:6432 in ns, as nobody, in front of a database
// at host. Users is its auth_file: each line a user and a password, quoted. It
// may change, and come later: Reload reads it.
func StartPooler(ctx context.Context, ns *Namespace, dir, address, host string, port int, database, users string) (*Pooler, error) {
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.Atoi(nobody.Uid)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "pgbouncer.ini")
	text := fmt.Sprintf("[databases]\n%s = host=%s port=%d\n[pgbouncer]\nlisten_addr = %s\nlisten_port = 6432\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = %s\n",
		database, host, port, address, users)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	for _, name := range []string{dir, config} {
		if err := os.Chown(name, uid, -1); err != nil {
			return nil, err
		}
	}
	bin, err := exec.LookPath("pgbouncer")
	if err != nil {
		return nil, fmt.Errorf("%w: run test/setup.sh", err)
	}
	line := append(ns.Enter(), "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL", bin, config)
	p := &Pooler{}
	if p.process, err = startProcess(exec.Command(line[0], line[1:]...), filepath.Join(dir, "pgbouncer.log"), syscall.SIGKILL); err != nil {
		return nil, err
	}
	return p, p.process.await(ctx, func(ctx context.Context) error {
		conn, err := ns.DialContext(ctx, "tcp", net.JoinHostPort(address, "6432"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// Reload reads the users again.
func (p *Pooler) Reload() error { return p.process.cmd.Process.Signal(syscall.SIGHUP) }

// Stop ends it.
func (p *Pooler) Stop() error { return p.process.stop(syscall.SIGTERM) }
