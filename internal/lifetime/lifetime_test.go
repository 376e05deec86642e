package lifetime

import (
	"crypto/x509"
	"testing"
	"time"
)

func TestDue(t *testing.T) {
	made := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, life := range []time.Duration{time.Hour, 30 * 24 * time.Hour, 366 * 24 * time.Hour} {
		cert := &x509.Certificate{NotBefore: made.Add(-Backdate), NotAfter: made.Add(life)}
		if Of(cert) != life {
			t.Errorf("made for %s, want %s", Of(cert), life)
		}
		for at, want := range map[time.Duration]bool{
			-30 * 24 * time.Hour: true, -24 * time.Hour: false, 0: false, life*2/3 - time.Second: false, life * 2 / 3: true, life: true, 2 * life: true,
		} {
			if got := Due(cert, made.Add(at)); got != want {
				t.Errorf("a life of %s, %s after its making: due %v", life, at, got)
			}
		}
	}
}
