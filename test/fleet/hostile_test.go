package fleet_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/test/fleet"
	"github.com/countersign/countersign/test/lab"
)

const (
	hostile    = 64
	honest     = 20
	attackTime = 30 * time.Second
	// most is what the broker's process may ever have had in memory, in KiB.
	most = 256 << 10
)

// A hostilePeer has one connection at a time, and does its worst on each.
type hostilePeer struct {
	addr  string
	cert  *tls.Certificate // nil: a new one for each connection
	plain bool             // without TLS
	do    func(*hostilePeer, net.Conn) error
}

// alone is for who looks at one kind of attack.
var alone = flag.String("alone", "", "the only kind of attack")

func (p *hostilePeer) run(ctx context.Context) {
	for ctx.Err() == nil {
		if c, err := p.dial(ctx); err == nil {
			stop := context.AfterFunc(ctx, func() { _ = c.Close() })
			_ = p.do(p, c)
			stop()
			_ = c.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (p *hostilePeer) dial(ctx context.Context) (net.Conn, error) {
	cert := p.cert
	if cert == nil {
		key, err := lab.NewECDSA()
		if err != nil {
			return nil, err
		}
		if cert, err = lab.SelfSigned(key); err != nil {
			return nil, err
		}
	}
	if p.plain {
		return (&net.Dialer{}).DialContext(ctx, "tcp", p.addr)
	}
	d := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true, Certificates: []tls.Certificate{*cert}}}
	return d.DialContext(ctx, "tcp", p.addr)
}

// An h2 is a connection whose frames a test writes, whatever the other end asks for.
type h2 struct {
	*http2.Framer
	mu   sync.Mutex
	next uint32
	open atomic.Int64 // requests that were not answered
}

// begin starts HTTP/2 and answers nothing but settings. It opens the broker's
// window for streams by what is said.
func begin(c net.Conn, window uint32) (*h2, error) {
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return nil, err
	}
	h := &h2{Framer: http2.NewFramer(c, c), next: 1}
	if err := h.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}); err != nil {
		return nil, err
	}
	go func() {
		for {
			f, err := h.ReadFrame()
			if err != nil {
				_ = c.Close()
				return
			}
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if !f.IsAck() {
					h.mu.Lock()
					_ = h.WriteSettingsAck()
					h.mu.Unlock()
				}
			case *http2.RSTStreamFrame:
				h.open.Add(-1)
			case *http2.HeadersFrame:
				h.open.Add(-1)
			}
		}
	}()
	return h, nil
}

func (h *h2) request(path string, length int, more ...hpack.HeaderField) (stream uint32, err error) {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	fields := append([]hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "broker"},
		{Name: ":path", Value: path}, {Name: "content-type", Value: "application/proto"}, {Name: "connect-protocol-version", Value: "1"}}, more...)
	if length >= 0 {
		fields = append(fields, hpack.HeaderField{Name: "content-length", Value: fmt.Sprint(length)})
	}
	for _, f := range fields {
		if err := e.WriteField(f); err != nil {
			return 0, err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	stream = h.next
	h.next += 2
	h.open.Add(1)
	block := b.Bytes()
	first := block[:min(len(block), 16<<10)]
	if err := h.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first, EndHeaders: len(first) == len(block)}); err != nil {
		return 0, err
	}
	for block = block[len(first):]; len(block) > 0; {
		part := block[:min(len(block), 16<<10)]
		block = block[len(part):]
		if err := h.WriteContinuation(stream, len(block) == 0, part); err != nil {
			return 0, err
		}
	}
	return stream, nil
}

func (h *h2) data(stream uint32, end bool, b []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.WriteData(stream, end, b)
}

const join = countersignv1connect.HostServiceJoinProcedure

// hold keeps a connection until the other end closes it, or a while.
func hold(c net.Conn, h *h2) error {
	for range 100 {
		time.Sleep(100 * time.Millisecond)
		h.mu.Lock()
		err := h.WritePing(false, [8]byte{})
		h.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// unfinished sends bodies and never their last byte: 200 of them on a
// connection, a window's part of each.
func unfinished(path string, length, each int) func(*hostilePeer, net.Conn) error {
	return func(_ *hostilePeer, c net.Conn) error {
		h, err := begin(c, 1<<20)
		if err != nil {
			return err
		}
		for range 200 {
			s, err := h.request(path, length)
			if err != nil {
				return err
			}
			for range each / (16 << 10) {
				if err := h.data(s, false, make([]byte, 16<<10)); err != nil {
					return err
				}
			}
		}
		return hold(c, h)
	}
}

// whole sends whole bodies, over and over, as many at a time as may be, and
// reads no answer: its windows are closed.
func whole(path string, atOnce int64, body []byte) func(*hostilePeer, net.Conn) error {
	return func(_ *hostilePeer, c net.Conn) error {
		h, err := begin(c, 0)
		if err != nil {
			return err
		}
		for range 1000 {
			for h.open.Load() >= atOnce {
				time.Sleep(5 * time.Millisecond)
				h.mu.Lock()
				err := h.WritePing(false, [8]byte{})
				h.mu.Unlock()
				if err != nil {
					return err
				}
			}
			s, err := h.request(path, len(body))
			if err != nil {
				return err
			}
			for rest := body; ; {
				part := rest[:min(len(rest), 16<<10)]
				rest = rest[len(part):]
				if err := h.data(s, len(rest) == 0, part); err != nil {
					return err
				}
				if len(rest) == 0 {
					break
				}
			}
		}
		return nil
	}
}

// headers sends long headers, and headers without end.
func headers(_ *hostilePeer, c net.Conn) error {
	h, err := begin(c, 0)
	if err != nil {
		return err
	}
	for i := range 200 {
		long := hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: string(bytes.Repeat([]byte("x"), 6<<10)), Sensitive: i%2 == 0}
		if _, err := h.request(join, 1<<20, long); err != nil {
			return err
		}
	}
	_, err = h.request(join, 1<<20, hpack.HeaderField{Name: "x", Value: string(make([]byte, 8<<20))})
	return err
}

// frame announces a frame of a size, and sends all but its end.
func frame(size int) func(*hostilePeer, net.Conn) error {
	return func(_ *hostilePeer, c net.Conn) error {
		h, err := begin(c, 0)
		if err != nil {
			return err
		}
		s, err := h.request(join, size)
		if err != nil {
			return err
		}
		head := binary.BigEndian.AppendUint32([]byte{byte(size >> 16), byte(size >> 8), byte(size), 0, 0}, s)
		if _, err := c.Write(append(head, make([]byte, size-1)...)); err != nil {
			return err
		}
		return hold(c, h)
	}
}

// parts is a request of many empty parts.
func parts(wrapped protowire.Number, number protowire.Number, size int) []byte {
	inner := bytes.Repeat(protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), nil), size/2)
	return protowire.AppendBytes(protowire.AppendTag(nil, wrapped, protowire.BytesType), inner)
}

// handshake sends one that never ends, on a connection without TLS.
func handshake(_ *hostilePeer, c net.Conn) error {
	// Records of a ClientHello of almost 64 KiB.
	record := append([]byte{22, 3, 1, 0x40, 0}, make([]byte, 1<<14)...)
	copy(record[5:], []byte{1, 0, 0xff, 0xff})
	for range 3 {
		if _, err := c.Write(record); err != nil {
			return err
		}
		copy(record[5:], make([]byte, 4))
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

// A kind of attack.
type kind struct {
	name  string
	owned bool // by a host that was admitted
	plain bool
	do    func(*hostilePeer, net.Conn) error
}

func kinds() []kind {
	const (
		prove   = countersignv1connect.HostServiceProveProcedure
		release = countersignv1connect.HostServiceReleaseProcedure
	)
	nested := func(b []byte, in ...protowire.Number) []byte {
		for _, number := range in {
			b = protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), b)
		}
		return b
	}
	// A list of zeros, which isn't one.
	logs := nested(make([]byte, 60<<20), 4, 4, 1)
	return []kind{
		{"unfinished handshakes", false, true, handshake},
		{"unfinished bodies", false, false, unfinished(join, 1<<20, 256<<10)},
		{"unfinished bodies of no length", false, false, unfinished(join, -1, 256<<10)},
		{"unfinished bodies that are short", false, false, unfinished(join, 64<<10, 48<<10)},
		{"unfinished bodies to nowhere", false, false, unfinished("/nowhere", 1<<20, 256<<10)},
		{"unfinished logs", false, false, unfinished(prove, 64<<20, 256<<10)},
		{"parts", false, false, whole(join, 2, parts(1, 1, 60<<10))},
		{"answers that nobody reads", false, false, whole(prove, 2, make([]byte, 64<<10))},
		{"headers", false, false, headers},
		{"frames", false, false, frame(1 << 20)},
		{"frames that are short", false, false, frame(16 << 10)},
		{"a host's unfinished bodies", true, false, unfinished(prove, 1<<20, 512<<10)},
		{"a host's unfinished logs", true, false, unfinished(prove, 64<<20, 512<<10)},
		{"a host's parts", true, false, whole(prove, 32, parts(1, 3, 1<<20-16))},
		{"a host's many parts", true, false, whole(prove, 32, parts(1, 3, 60<<20))},
		{"a host's names", true, false, whole(release, 32, parts(1, 1, 1<<20-16))},
		{"a host's logs", true, false, whole(prove, 4, logs)},
		{"a host's headers", true, false, headers},
		{"a host's frames", true, false, frame(1 << 20)},
	}
}

func metrics(t *testing.T, b *lab.Broker) string {
	t.Helper()
	answer, err := http.Get("http://" + b.Metrics + "/metrics")
	check(t, err)
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	check(t, err)
	return string(text)
}

// While 64 connections do their worst, of strangers, of admitted hosts and of an
// operator, a broker keeps to its memory and serves the honest.
func TestHostilePeers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	b, ca := started(t, ctx)

	hosts, err := fleet.Join(ctx, b, ca, honest+8)
	check(t, err)
	hosts, owned := hosts[:honest], hosts[honest:]
	serve := func() error {
		return errors.Join(fleet.Each(hosts, func(h *fleet.Host) error { return h.Obtain(ctx) }), fleet.Each(hosts, func(h *fleet.Host) error { return h.Prove(ctx) }))
	}
	check(t, fleet.Each(hosts, func(h *fleet.Host) error { return h.Connect(ctx) }))
	t.Cleanup(func() {
		for _, h := range hosts {
			_ = h.Session.Close()
		}
	})
	check(t, serve())
	t.Logf("before: %d KiB", memory(t, b.PID()))

	chosen := slices.Collect(func(yield func(kind) bool) {
		for _, k := range kinds() {
			if *alone == "" || *alone == k.name {
				_ = yield(k)
			}
		}
	})
	attack, end := context.WithTimeout(ctx, attackTime)
	defer end()
	var group sync.WaitGroup
	for i := range hostile {
		k := chosen[i%len(chosen)]
		p := &hostilePeer{addr: b.Addr, do: k.do, plain: k.plain}
		if k.owned {
			p.cert = owned[i%len(owned)].Certificate()
		}
		group.Go(func() { p.run(attack) })
	}
	rounds := 0
	for attack.Err() == nil {
		check(t, serve())
		rounds++
		if rounds == 2 {
			_, err := fleet.Join(ctx, b, ca, 1) // from an address of its own
			check(t, err)
		}
	}
	group.Wait()
	now, peak, err := fleet.Memory(b.PID())
	check(t, err)
	t.Logf("%d rounds of honest hosts; after: %d KiB, peak %d KiB", rounds, now, peak)
	// The attacks were made, and not turned away at an earlier door.
	if text := metrics(t, b); *alone == "" {
		for _, outcome := range []string{"request-size", "request", "join-rate", "busy"} {
			if !strings.Contains(text, `countersign_request_seconds_count{outcome="`+outcome+`",procedure="unread"}`) {
				t.Errorf("no request was refused as %s", outcome)
			}
		}
	}
	if peak > most {
		t.Errorf("the broker had %d KiB in memory; %d is the most", peak, most)
	}
}
