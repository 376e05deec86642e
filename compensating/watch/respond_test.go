package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/detect"
)

// limited is a broker that takes so many findings: the real one takes 100,000.
type limited struct {
	countersignv1connect.OperatorServiceClient
	room int
	over []string
}

func (b *limited) ReportFinding(_ context.Context, r *connect.Request[v1.ReportFindingRequest]) (*connect.Response[v1.ReportFindingResponse], error) {
	if b.room == 0 {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("as many are open as may be"))
	}
	b.room--
	b.over = append(b.over, r.Msg.GetOver())
	return connect.NewResponse(&v1.ReportFindingResponse{}), nil
}

// A finding that the broker had no room for is told when there is some; and that it is
// over, after it was told.
func TestToldWhenThereIsRoom(t *testing.T) {
	now := noon
	w, err := Open(&Config{StateDir: t.TempDir()}, away, slog.New(slog.DiscardHandler), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	b := &limited{}
	s := newSpeaker(w.config, func(context.Context) (countersignv1connect.OperatorServiceClient, func(), error) {
		return b, func() {}, nil
	}, w.log, w.now)
	w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: "db", Time: now, Cause: "silent db", Why: "it says nothing"}})
	w.tellNow(t, s)
	b.room = 10
	w.tellNow(t, s)
	if len(b.over) != 0 {
		t.Error("the broker is asked again at once")
	}
	r := w.kept.Findings[0]
	r.Over, r.OverAt = "it speaks again", 1
	for range 3 {
		now = now.Add(2 * time.Minute)
		w.tellNow(t, s)
	}
	// It happens again, and is over before that was told.
	w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: "db", Time: now, Cause: "silent db", Why: "it says nothing"}})
	r.OverAt = 2
	for range 3 {
		w.tellNow(t, s)
	}
	if got, want := fmt.Sprintf("%q", b.over), `["" "it speaks again" "" "it speaks again"]`; got != want {
		t.Errorf("told %s, want %s", got, want)
	}
}
