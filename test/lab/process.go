package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// spawner runs functions on one OS thread that lives as long as this process.
// Linux sends a child's death signal when the thread that forked it ends, and
// Go ends threads as it likes.
var spawner = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// spawn starts cmd so that it gets the signal death when this process ends. It
// stands in its own process group, so that Ctrl-C at a terminal reaches only us
// and the parts are stopped in order.
func spawn(cmd *exec.Cmd, death syscall.Signal) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = death
	cmd.SysProcAttr.Setpgid = true
	started := make(chan error)
	spawner() <- func() { started <- cmd.Start() }
	return <-started
}

// process is a child that writes its output to a log file.
type process struct {
	cmd   *exec.Cmd
	log   string
	ended chan struct{}
	err   error // what Wait said; read it after ended is closed
}

// startProcess starts cmd with its output appended to the file log.
func startProcess(cmd *exec.Cmd, log string, death syscall.Signal) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := spawn(cmd, death); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, log: log, ended: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// await calls ready until it returns nil, the process ends, or ctx does.
func (p *process) await(ctx context.Context, ready func(context.Context) error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s ended early (%v); its log says:\n%s", p.cmd.Path, p.err, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its log says:\n%s", p.cmd.Path, errors.Join(ctx.Err(), err), p.tail())
		case <-tick.C:
		}
	}
}

// stop sends sig and waits until the process has ended. One that doesn't within
// a minute is killed, and that is an error.
func (p *process) stop(sig syscall.Signal) error {
	select {
	case <-p.ended:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(time.Minute):
		err := p.cmd.Process.Kill()
		<-p.ended
		return errors.Join(fmt.Errorf("%s didn't end within a minute of %v and was killed; its log says:\n%s", p.cmd.Path, sig, p.tail()), err)
	}
}

// tail returns the last lines of the log, for an error message.
func (p *process) tail() []byte {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return []byte(err.Error())
	}
	data = bytes.TrimSpace(data)
	if n := len(data); n > 2000 {
		data = data[n-2000:]
	}
	return data
}
