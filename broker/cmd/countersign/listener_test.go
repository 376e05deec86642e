package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/test/check"
)

// The listener's certificate is kept for two thirds of its life, and no longer
// than a clock that was ahead when it was made.
func TestListenerCertificate(t *testing.T) {
	start := time.Now()
	ca := check.Must(pki.Create(t.TempDir(), pki.HostCA, "hosts", []byte("test password"), start))(t)
	const day = 24 * time.Hour

	var at time.Duration
	get := listenerCertificate(ca, []string{"broker"}, func() time.Time { return start.Add(at) })
	var last []byte
	for _, c := range []struct {
		at   time.Duration
		same bool
	}{
		{0, false}, {day, true}, {59 * day, true}, {0, true},
		{60 * day, false}, {61 * day, true}, // two thirds
		{30 * day, false}, // it was made by a clock that was a month ahead
		{31 * day, true}, {400 * day, false}, {400*day - time.Hour, false},
	} {
		at = c.at
		cert := check.Must(get())(t).Certificate[0]
		if same := bytes.Equal(cert, last); same != c.same {
			t.Errorf("at %s: the same %v, want %v", c.at, same, c.same)
		}
		last = cert
	}
}
