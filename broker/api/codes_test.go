package api_test

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

func TestCompleteCodes(t *testing.T) {
	m := &v1.ProveResponse{HostState: "stale", Leases: []*v1.LeaseVerdict{
		{LeaseId: "a", Outcome: "live"}, {LeaseId: "b", OutcomeCode: v1.Verdict_VERDICT_GONE.Enum()},
		{LeaseId: "c", Outcome: "sung"}, {LeaseId: "d", OutcomeCode: v1.Verdict(99).Enum()},
		{LeaseId: "e", Outcome: "refused", OutcomeCode: v1.Verdict_VERDICT_LIVE.Enum()},
	}}
	api.CompleteCodes(m)
	want := &v1.ProveResponse{HostState: "stale", HostStateCode: v1.HostState_HOST_STATE_STALE.Enum(), Leases: []*v1.LeaseVerdict{
		{LeaseId: "a", Outcome: "live", OutcomeCode: v1.Verdict_VERDICT_LIVE.Enum()}, {LeaseId: "b", Outcome: "gone", OutcomeCode: v1.Verdict_VERDICT_GONE.Enum()},
		{LeaseId: "c", Outcome: "sung"}, {LeaseId: "d", OutcomeCode: v1.Verdict(99).Enum()},
		{LeaseId: "e", Outcome: "refused", OutcomeCode: v1.Verdict_VERDICT_REFUSED.Enum()},
	}}
	if !proto.Equal(m, want) {
		t.Errorf("completed\n%v, want\n%v", m, want)
	}
	if plain := api.WithoutCodes(m); plain.GetHostStateCode() != 0 || plain.GetLeases()[1].GetOutcomeCode() != 0 || plain.GetLeases()[1].GetOutcome() != "gone" || m.GetHostStateCode() == 0 {
		t.Errorf("for people: %v", plain)
	}
}

// Each code stands beside a string.
func TestCodesAreWhole(t *testing.T) {
	messages := v1.File_countersign_v1_countersign_proto.Messages()
	for i := range messages.Len() {
		fields := messages.Get(i).Fields()
		for j := range fields.Len() {
			f := fields.Get(j)
			if f.Kind() != protoreflect.EnumKind {
				continue
			}
			text := fields.ByName(f.Name()[:max(len(f.Name())-len("_code"), 0)])
			if text == nil || text.Kind() != protoreflect.StringKind {
				t.Errorf("%s has no string beside it", f.FullName())
			}
		}
	}
}
