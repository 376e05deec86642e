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
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

// Connections to the metrics listener: of monitoring, load balancers and who
// fetches the CRL.
const (
	metricsConnections = 128
	metricsShare       = 32
	metricsTime        = 30 * time.Second
)

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
	s.Door.Host = s.Hosts.Admission.KnowsKey
	s.Door.Operator = s.Operators.Desk.KnowsKey
	// Nothing is unpacked: what is counted is what is sent.
	opts := connect.WithHandlerOptions(connect.WithCompression("gzip", nil, nil), connect.WithReadMaxBytes(maxLarge),
		connect.WithInterceptors(s.observe(), api.Codes()), connect.WithRecover(s.recovered))
	mux := http.NewServeMux()
	in := newIntake(s.Door.Now, func(check string) { s.Requests.Observe("unread", check, 0) })
	for _, service := range []func() (string, http.Handler){
		func() (string, http.Handler) { return countersignv1connect.NewHostServiceHandler(s.Hosts, opts) },
		func() (string, http.Handler) {
			return countersignv1connect.NewOperatorServiceHandler(s.Operators, opts)
		},
	} {
		path, h := service()
		mux.Handle(path, in.read(h))
	}
	handler := identified(mux)

	outside, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	socket, err := localSocket(s.Socket)
	if err != nil {
		return errors.Join(err, outside.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	gate := newGate(s.Door, outside.Addr())
	group.Go(func() error { return gate.run(ctx, outside) })
	group.Go(func() error { <-ctx.Done(); return outside.Close() })
	for of, way := range gate.ways {
		s.serve(ctx, group, classes[of].server(s, handler), way)
	}
	s.serve(ctx, group, classes[local].server(s, handler), socket)
	if s.MetricsListen != "" {
		l, err := net.Listen("tcp", s.MetricsListen)
		if err != nil {
			return errors.Join(fmt.Errorf("metrics_listen: %w", err), outside.Close(), socket.Close())
		}
		metrics := s.httpServer(s.Metrics)
		metrics.ReadTimeout, metrics.WriteTimeout, metrics.IdleTimeout = metricsTime, metricsTime, 2*metricsTime
		s.serve(ctx, group, metrics, &crowdListener{l, newCrowd(metricsConnections, metricsShare)})
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
		Handler: h, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
}

// drainTime is how long requests may take to end once the broker stops.
const drainTime = 10 * time.Second

func (s *Server) serve(ctx context.Context, group *errgroup.Group, server *http.Server, l net.Listener) {
	group.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
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
