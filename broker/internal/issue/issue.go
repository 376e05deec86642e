// Package issue says what every issuer of credentials does: make one on an
// allowing decision, give it its length, and end it with confirmation.
//
// Nothing is issued without a policy.Decision, which only verified evidence
// makes. An issuer keeps no secret: what it made goes to the caller in a
// redacting type, and all that remains is a Handle by which to end it.
package issue

import (
	"context"
	"errors"
	"time"

	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/secret"
)

// ProvisionalFor is how long a credential lives unless its delivery is
// acknowledged.
const ProvisionalFor = 2 * time.Minute

// A Handle names an issued credential to its issuer.
type Handle struct {
	Lease      string // the journal's id
	Scope      string
	Accessor   string // of the Vault token that owns the credential
	VaultLease string // empty where Vault made none
	Serial     string // of a certificate, decimal
	Expires    time.Time
	Issued     time.Time // when the intent was recorded: what came of it began after that
}

// An Order is one credential to issue.
type Order struct {
	Decision policy.Decision
	Lease    string
	Host     string
	Serial   string // chosen beforehand, for certificates
	CSR      []byte // PKCS #10 DER, for certificates: only its key is used
	Request  string // correlation id
	Now      time.Time
}

// A Field is one named value of a credential.
type Field struct {
	Name  string
	Value secret.Bytes
}

// A Credential is what an issuer made.
type Credential struct {
	Handle
	Fields []Field           // by name
	Names  map[string]string // in the outside world; no secrets
	Static bool              // others hold the same secret: it can't be ended, only rotated
}

var (
	// ErrGone says that the credential is over at its issuer.
	ErrGone = errors.New("the credential is over")
	// ErrConfig says that the issuer can't serve the scope until somebody
	// mends its configuration; trying again soon is of no use.
	ErrConfig = errors.New("issuer configuration")
)

// An Issuer makes and ends the credentials of one kind. All calls can be
// repeated without harm but Issue.
type Issuer interface {
	// Issue makes a credential that dies within ProvisionalFor unless
	// extended, where the kind allows that. On an error it has ended, or tried
	// to, what it had made.
	Issue(ctx context.Context, o Order) (Credential, error)
	// Extend gives a credential its scope's full length and says until when it
	// lives. ErrGone where it is over.
	Extend(ctx context.Context, h Handle, ttl time.Duration) (time.Time, error)
	// Revoke ends a credential; nil means that the issuer confirms that it is
	// over.
	Revoke(ctx context.Context, h Handle) error
}
