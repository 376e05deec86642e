package main

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// report is the watch's call, for scripts: it sends the finding in its argument to
// the broker of COUNTERSIGN_SOCKET.
func report() {
	err := func() error {
		f := &v1.Finding{}
		if err := protojson.Unmarshal([]byte(os.Args[1]), f); err != nil {
			return err
		}
		client, err := (&options{socket: os.Getenv("COUNTERSIGN_SOCKET")}).client(context.Background())
		if err != nil {
			return err
		}
		r, err := client.ReportFinding(context.Background(), connect.NewRequest(&v1.ReportFindingRequest{Finding: f}))
		if err == nil {
			fmt.Printf("opened=%v reopened=%v\n%s\n", r.Msg.GetOpened(), r.Msg.GetReopened(), r.Msg.GetFinding().GetId())
		}
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, message(err))
		os.Exit(1)
	}
}

func TestMoment(t *testing.T) {
	var m moment
	if err := m.Set("2026-12-24T12:00:00+01:00"); err != nil || m.String() != "2026-12-24T11:00:00Z" {
		t.Errorf("%v %v", m.String(), err)
	}
	before := time.Now()
	if err := m.Set("14d"); err != nil || time.Time(m).Before(before.Add(14*day)) || time.Time(m).After(time.Now().Add(14*day)) {
		t.Errorf("%v %v", m.String(), err)
	}
	for _, bad := range []string{"", "tomorrow", "-1h", "2026-12-24"} {
		if m.Set(bad) == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
