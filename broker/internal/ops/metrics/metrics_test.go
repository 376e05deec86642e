package metrics

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/ops/expiry"
)

// The names of vendors' certificates are any bytes.
func TestANameThatIsNoText(t *testing.T) {
	handler, _ := New(Source{
		Counts: func(context.Context) (Counts, error) {
			return Counts{OverBudget: 3, OverBudgetHosts: []string{"h1", "h2"}}, nil
		},
		Alarms: func(context.Context) []string { return nil },
		Ready:  func(context.Context) error { return nil },
		Space:  func() (string, uint64, uint64) { return "low", 7, 100 },
		CRL:    func() []byte { return nil },
		Ends: func(context.Context) ([]expiry.End, error) {
			return []expiry.End{{What: expiry.EKRoot, Name: "CN=M\xfcnchen", At: time.Unix(1_900_000_000, 0)}}, nil
		},
	})
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "name=\"CN=M\uFFFDnchen\"") {
		t.Errorf("%d: %s", w.Code, w.Body)
	}
	for _, line := range []string{"countersign_hosts_over_budget 3", `countersign_host_over_budget{host="h2"} 1`, "countersign_disk_free_bytes 7", "countersign_disk_size_bytes 100",
		`countersign_disk_level{level="low"} 1`, `countersign_disk_level{level="full"} 0`} {
		if !strings.Contains(w.Body.String(), line+"\n") {
			t.Errorf("no %s", line)
		}
	}
}
