package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/countersign/countersign/broker/api"
)

// What goes out has the request's id, and of errors that are no answers nothing
// but that: the rest is for the log.
func TestOutgoing(t *testing.T) {
	var logged bytes.Buffer
	s := &Server{Log: slog.New(slog.NewTextHandler(&logged, nil))}
	ctx := context.WithValue(t.Context(), requestKey{}, "request-1")

	refused := api.NewError(api.Refused, "exe", "no")
	for name, c := range map[string]struct {
		err  error
		want api.Error
		log  string
	}{
		"an answer":  {refused, api.Error{Outcome: api.Refused, Check: "exe", Message: "no", Request: "request-1"}, ""},
		"a wrapped":  {fmt.Errorf("issue: %w", refused), api.Error{Outcome: api.Refused, Check: "exe", Message: "no", Request: "request-1"}, ""},
		"a fault":    {errors.New("disk secret"), api.Error{Outcome: api.Fault, Check: "broker", Request: "request-1"}, "disk secret"},
		"a connect.": {connect.NewError(connect.CodeNotFound, errors.New("no such host")), api.Error{Outcome: api.Fault, Check: "not_found", Message: "no such host"}, ""},
	} {
		logged.Reset()
		got := api.FromConnect(s.outgoing(ctx, c.err))
		if c.log != "" {
			if strings.Contains(got.Message, c.log) || !strings.Contains(logged.String(), c.log) || !strings.Contains(logged.String(), "request-1") {
				t.Errorf("%s: sent %q, logged %q", name, got.Message, logged.String())
			}
			got.Message = ""
		} else if logged.Len() > 0 {
			t.Errorf("%s: logged %q", name, logged.String())
		}
		if *got != c.want {
			t.Errorf("%s: %+v, want %+v", name, *got, c.want)
		}
	}
	if refused.Request != "" {
		t.Error("the id of one request stays in an error that others may get")
	}
	if s.outgoing(ctx, nil) != nil {
		t.Error("yes is an error")
	}
}
