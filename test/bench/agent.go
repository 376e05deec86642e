package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	credentials = 8  // of one program
	restarts    = 13 // of the program, each of which rotates all of them
	quietTime   = 30 * time.Second
	settle      = 5 * time.Second
	mib         = 1 << 20
)

// agents measures a real agent with swtpm: its file, and its memory and
// processor time after a hundred rotations.
func agents(ctx context.Context, dir string) (rows []Row, err error) {
	say(fmt.Sprintf("an agent with %d credentials, through %d restarts of its program", credentials, restarts))
	dir = filepath.Join(dir, "rotations")
	exe := filepath.Join(dir, "program")
	b, ca, err := newBroker(ctx, dir, fmt.Sprintf(`
scope "tls" {
  reprove = "15m"
  host { labels = { role = "agent" } }
  process { exe = %q }
  certificate {
    dns = ["agent.example.com"]
    ttl = "24h"
  }
}
`, exe), "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Stop()) }()
	if err := copyProgram("/bin/sleep", exe); err != nil {
		return nil, err
	}
	tpm, err := lab.StartTPM(ctx, filepath.Join(dir, "tpm"), ca, lab.TPMOptions{})
	if err != nil {
		return nil, err
	}
	defer tpm.Stop()
	var blocks strings.Builder
	for i := range credentials {
		fmt.Fprintf(&blocks, "credential \"tls-%[1]d\" {\n  scope = \"tls\"\n  key = \"p256\"\n  process { exe = %[2]q }\n  file %[3]q { template = \"{{ .private_key | pem }}{{ .chain | pem }}\" }\n}\n",
			i, exe, filepath.Join(dir, fmt.Sprintf("tls-%d.pem", i)))
	}
	a, err := lab.NewAgent(filepath.Join(dir, "agent"), b, tpm.Path(), blocks.String(), false)
	if err != nil {
		return nil, err
	}
	token, err := b.JoinToken(ctx, "role=agent")
	if err != nil {
		return nil, err
	}
	if _, err := a.Join(ctx, token); err != nil {
		return nil, err
	}
	if err := a.Start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, a.Stop()) }()
	program, err := rotate(ctx, a, exe)
	if program != nil {
		defer func() {
			_ = program.Process.Kill()
			_ = program.Wait()
		}()
	}
	if err != nil {
		return nil, err
	}
	say("the agent, with nothing to do")
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	before, err := fleet.CPU(a.PID())
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, quietTime); err != nil {
		return nil, err
	}
	after, err := fleet.CPU(a.PID())
	if err != nil {
		return nil, err
	}
	memory, peak, err := fleet.Memory(a.PID())
	if err != nil {
		return nil, err
	}
	bin, err := lab.Program("countersign-agent", false)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(bin)
	if err != nil {
		return nil, err
	}
	return []Row{
		Row{Name: "agent: its file", Value: float64(info.Size()) / mib, Unit: "MiB"}.within(20),
		Row{Name: fmt.Sprintf("agent: resident memory after %d rotations", credentials*restarts), Value: float64(memory) / 1024, Unit: "MiB"}.within(25),
		{Name: "agent: the most it ever had resident", Value: float64(peak) / 1024, Unit: "MiB"},
		Row{Name: fmt.Sprintf("agent: processor time while idle, with %d credentials in force", credentials), Value: 100 * (after - before).Seconds() / quietTime.Seconds(), Unit: "%"}.within(0.1),
	}, nil
}

// rotate restarts the program until each credential was delivered for each of
// its runs, and returns the last one.
func rotate(ctx context.Context, a *lab.Agent, exe string) (*exec.Cmd, error) {
	var program *exec.Cmd
	for i := range restarts + 1 { // the first is no rotation
		if program != nil {
			_ = program.Process.Kill()
			_ = program.Wait()
		}
		program = exec.CommandContext(ctx, exe, "3600")
		if err := program.Start(); err != nil {
			return nil, err
		}
		want, deadline := (i+1)*credentials, time.Now().Add(time.Minute)
		for delivered := 0; delivered < want; {
			text, err := os.ReadFile(a.Log())
			if err != nil {
				return program, err
			}
			if delivered = bytes.Count(text, []byte(`msg="credential delivered"`)); time.Now().After(deadline) {
				return program, fmt.Errorf("%d of %d credentials delivered within a minute; the agent's log:\n%s", delivered, want, text)
			}
			if err := pause(ctx, 50*time.Millisecond); err != nil {
				return program, err
			}
		}
	}
	return program, nil
}

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
