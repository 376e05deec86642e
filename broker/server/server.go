package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

// maxConnections bounds the listener: each costs memory for its TLS state.
const maxConnections = 20000

// maxShare is how many of them one source may have; hosts behind one address
// are many, and strangers from one never take all.
const maxShare = maxConnections / 4

// A Server serves one broker's listeners until its context ends.
type Server struct {
	Door      *Door
	Hosts     *Hosts
	Operators *Operators
	Metrics   http.Handler // with /metrics, /healthz, /readyz and /crl
	Requests  interface {  // is told of every answer
		Observe(procedure, outcome string, took time.Duration)
	}
	Log *slog.Logger

	Listen        string
	Socket        string // of root's own
	MetricsListen string // empty: nowhere
}

// Run serves until ctx ends, then lets running requests finish.
func (s *Server) Run(ctx context.Context) error {
	s.Hosts.joins = newSourceLimit(joinsPerSec, joinBurst, s.Door.Now)
	s.Hosts.rejoins = newSourceLimit(againPerSec, againBurst, s.Door.Now)
	s.Hosts.asks = newSourceLimit(asksPerSec, askBurst, s.Door.Now)
	s.Hosts.opens = newSourceLimit(opensPerSec, opensBurst, s.Door.Now)
	// Nothing is unpacked: bound counts what is sent.
	opts := connect.WithHandlerOptions(connect.WithCompression("gzip", nil, nil), connect.WithReadMaxBytes(maxEvidence),
		connect.WithInterceptors(s.observe(), api.Codes()), connect.WithRecover(s.recovered))
	mux := http.NewServeMux()
	mux.Handle(countersignv1connect.NewHostServiceHandler(s.Hosts, opts))
	mux.Handle(countersignv1connect.NewOperatorServiceHandler(s.Operators, opts))
	handler := limit(s.Door.identify(bound(mux)))

	outside, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	local, err := localSocket(s.Socket)
	if err != nil {
		return errors.Join(err, outside.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	tlsServer := s.httpServer(handler)
	tlsServer.TLSConfig = s.Door.TLS()
	s.serve(ctx, group, tlsServer, func() error {
		return tlsServer.ServeTLS(netutil.LimitListener(newFairListener(outside, maxShare), maxConnections), "", "")
	})
	localServer := s.httpServer(handler)
	s.serve(ctx, group, localServer, func() error { return localServer.Serve(local) })
	if s.MetricsListen != "" {
		l, err := net.Listen("tcp", s.MetricsListen)
		if err != nil {
			return errors.Join(fmt.Errorf("metrics_listen: %w", err), outside.Close(), local.Close())
		}
		metrics := s.httpServer(s.Metrics)
		metrics.ConnContext = nil
		s.serve(ctx, group, metrics, func() error { return metrics.Serve(l) })
	}
	s.Log.Info("broker is up", "listen", outside.Addr().String(), "socket", s.Socket)
	return group.Wait()
}

// observe counts answers, and makes of errors what goes out.
func (s *Server) observe() connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			start := time.Now()
			res, err := next(ctx, req)
			err = s.outgoing(ctx, err)
			outcome := "ok"
			if err != nil {
				outcome = connect.CodeOf(err).String()
			}
			s.Requests.Observe(req.Spec().Procedure, outcome, time.Since(start))
			return res, err
		}
	}
}

// outgoing returns an answer other than yes with the request's id. What isn't one
// says nothing more to the peer, and all to the log.
func (s *Server) outgoing(ctx context.Context, err error) error {
	var answer *api.Error
	var sent *connect.Error
	switch {
	case err == nil, errors.As(err, &sent):
		return err
	case !errors.As(err, &answer):
		s.Log.Error("request failed", "request", requestID(ctx), "err", err)
		answer = api.NewError(api.Fault, "broker", "the broker could not serve this request; its log says why under this request's id")
	}

	e := *answer
	e.Request = requestID(ctx)
	return e.Connect()
}

func (s *Server) httpServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ConnContext: s.Door.ConnContext, ConnState: s.Door.ConnState,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Hour, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
}

// drainTime is how long requests may take to end once the broker stops.
const drainTime = 10 * time.Second

func (s *Server) serve(ctx context.Context, group *errgroup.Group, server *http.Server, run func() error) {
	group.Go(func() error {
		if err := run(); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		if server.Shutdown(bounded) != nil {
			return server.Close()
		}
		return nil
	})
}

// recovered keeps one request's panic from being more than a fault.
func (s *Server) recovered(ctx context.Context, spec connect.Spec, _ http.Header, p any) error {
	s.Log.Error("a request panicked", "procedure", spec.Procedure, "request", requestID(ctx), "panic", fmt.Sprint(p))
	return connect.NewError(connect.CodeInternal, errors.New("the broker failed on this request"))
}

// localSocket listens where root alone may connect: by the file's mode, and
// again by the peer's uid, since a mode can be changed.
func localSocket(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("local socket: another broker answers at %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	return rootOnly{l}, nil
}

type rootOnly struct{ net.Listener }

func (l rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if ownerIsPeer(c) {
			return c, nil
		}
		_ = c.Close()
	}
}

// ownerIsPeer says whether the peer is root or who runs the broker.
func ownerIsPeer(c net.Conn) bool {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		uid, err := peerUID(int(fd))
		ok = err == nil && (uid == 0 || int(uid) == os.Getuid())
	})
	return err == nil && ok
}
