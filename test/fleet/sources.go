package fleet

import (
	"errors"
	"fmt"
	"io"
	"net"
)

// perSource is how many joins a broker takes at once from one address.
const perSource = 20

// Sources pass connections on to a broker at layer 4, each from a loopback
// address of its own.
type sources struct{ listeners []net.Listener }

// newSources makes as many as n joins need.
func newSources(to string, n int) (*sources, error) {
	s := &sources{}
	for i := range (n + perSource - 1) / perSource {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.close()
			return nil, err
		}
		s.listeners = append(s.listeners, l)
		from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(i/250), byte(1+i%250))}}
		go serve(l, from, to)
	}
	return s, nil
}

// address is where join number i goes.
func (s *sources) address(i int) string { return s.listeners[i/perSource].Addr().String() }

func (s *sources) close() {
	for _, l := range s.listeners {
		_ = l.Close()
	}
}

func serve(l net.Listener, from *net.Dialer, to string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			if err := pass(in, from, to); err != nil && !errors.Is(err, net.ErrClosed) {
				fmt.Println("fleet: pass on a connection:", err)
			}
		}()
	}
}

// pass carries one connection until either end closes it.
func pass(in net.Conn, from *net.Dialer, to string) error {
	defer func() { _ = in.Close() }()
	out, err := from.Dial("tcp", to)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(in, out)
		_ = in.Close()
	}()
	_, _ = io.Copy(out, in)
	_ = out.Close()
	<-done
	return nil
}
