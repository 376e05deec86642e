// Package lifetime holds the rules by which the broker's own certificates
// begin, are renewed, and end. Broker, agent, watch and CLI share them.
//
// It trusts the caller for the time and does no I/O.
package lifetime

import (
	"crypto/x509"
	"time"
)

// Backdate is how far before its making a certificate begins. It forgives
// peers whose clock is up to a day behind.
const Backdate = 25 * time.Hour

// Warning is how long before its end a thing is reported that no program
// renews.
const Warning = 30 * 24 * time.Hour

// Of returns for how long cert was made, without the time before its making.
func Of(cert *x509.Certificate) time.Duration {
	return cert.NotAfter.Sub(cert.NotBefore) - Backdate
}

// RenewAt returns when cert is to be renewed: at two thirds of its life.
func RenewAt(cert *x509.Certificate) time.Time {
	return cert.NotAfter.Add(-Of(cert) / 3)
}

// Due reports whether cert is to be renewed now. A certificate that hasn't
// begun is due as well: it was made by a clock that was ahead.
func Due(cert *x509.Certificate, now time.Time) bool {
	return now.Before(cert.NotBefore) || !now.Before(RenewAt(cert))
}

// Anchor returns a pool that holds ca alone and treats it as valid at any time.
// It is for a CA that is trusted by its digest or because its key is at hand:
// such trust ends by configuration and not by a date, and an outage of every
// host on one day would be the date's only effect. What ca has signed is still
// judged by its own dates.
func Anchor(ca *x509.Certificate) *x509.CertPool {
	endless := *ca
	endless.NotBefore, endless.NotAfter = time.Time{}, time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

	pool := x509.NewCertPool()
	pool.AddCert(&endless)

	return pool
}
