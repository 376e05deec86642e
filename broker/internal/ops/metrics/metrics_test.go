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
		Counts: func(context.Context) (Counts, error) { return Counts{}, nil },
		Alarms: func(context.Context) []string { return nil },
		Ready:  func(context.Context) error { return nil },
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
}
