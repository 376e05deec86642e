// Package issue defines what an issuer of credentials does: issue a credential for an
// allowing decision, extend it to its full life, and revoke it with confirmation.
//
// Nothing is issued without a policy.Decision, which only verified evidence
// makes. An issuer keeps no secret: what it made goes to the caller in a
// redacting type, and all that remains is a Handle by which to end it.
//
// To add an issuer, write a package below this folder that exports a Kind, and add one
// line to package issuers.
package issue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/secret"
)

// ProvisionalFor is how long a credential lives unless its delivery is
// acknowledged.
const ProvisionalFor = 2 * time.Minute

// A Kind is one kind of credentials: its block in scopes, and its issuer.
type Kind struct {
	policy.Kind

	// Open returns the issuer, or nil if the broker's config doesn't configure this kind.
	Open func(context.Context, Environment) (Service, error)
}

// An Environment is what the broker passes to its issuers.
type Environment struct {
	Config   *config.Broker
	Password []byte // of key files
	Values   Values
	Log      *slog.Logger

	Wall   func() time.Time // the system's clock, which verifiers compare with
	Steady func() time.Time // the clock of leases; setting the system's clock doesn't move it
	Sure   func() time.Time // a lower bound of the time, even if the system's clock was ahead
}

// Values stores what issuers have to remember over restarts. A bucket belongs to one
// issuer.
type Values interface {
	// Get returns a value, or nil if there is none.
	Get(ctx context.Context, bucket, name string) ([]byte, error)
	// All calls each for every value of a bucket, sorted by name.
	All(ctx context.Context, bucket string, each func(name string, value []byte)) error
	// Add writes a value unless the name is taken.
	Add(ctx context.Context, bucket, name string, value []byte) error
	// Replace writes a value and removes others from the bucket of, in one transaction.
	Replace(ctx context.Context, bucket, name string, value []byte, of string, remove []string) error
}

// A Ref identifies a credential to its issuer. It is a small JSON value that only the
// issuer reads, and contains no secret.
type Ref = json.RawMessage

// A Handle names an issued credential to its issuer.
type Handle struct {
	Lease   string // the journal's id
	Scope   string
	Ref     Ref // empty if the issuer's answer never arrived
	Expires time.Time
	Issued  time.Time // when the intent was recorded: what came of it began after that
}

// Prepared is what an issuer knows of a credential before it issues it. The journal
// records it with the intent.
type Prepared struct {
	Ref   Ref
	Names map[string]string
}

// An Order is one credential to issue.
type Order struct {
	Decision policy.Decision
	Lease    string
	Host     string
	Prepared Prepared
	CSR      []byte // PKCS #10 DER, for certificates: only its key is used
	Request  string // correlation id
	Now      time.Time
}

// A Field is one named value of a credential.
type Field struct {
	Name   string
	Value  secret.Bytes
	Public bool // not a secret, such as a certificate
}

// A Credential is what an issuer made.
type Credential struct {
	Handle
	Fields    []Field           // by name
	Names     map[string]string // in the outside world, for logs and the ledger; no secrets
	NotBefore time.Time         // start of validity; zero if it is valid at once
	Whole     bool              // Expires is final: Extend doesn't change it
	Static    bool              // others hold the same secret: it can't be ended, only rotated
}

var (
	// ErrGone says that the credential is over at its issuer.
	ErrGone = errors.New("the credential is over")
	// ErrConfig says that the issuer can't serve the scope until somebody
	// mends its configuration; trying again soon is of no use.
	ErrConfig = errors.New("issuer configuration")
)

// An OrderError reports an invalid order. The host that sent it reads the message.
type OrderError struct {
	Part string // of the order, as "csr"
	Err  error
}

func (e *OrderError) Error() string { return e.Err.Error() }

func (e *OrderError) Unwrap() error { return e.Err }

// An Issuer makes and ends the credentials of one kind. All calls can be
// repeated without harm but Issue.
type Issuer interface {
	// Prepare checks an order before the broker records anything. It returns an
	// *OrderError for a mistake of the host.
	Prepare(o Order) (Prepared, error)
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

// A Service is an issuer that runs in a broker.
type Service interface {
	Issuer
	// Run does the issuer's background work until ctx ends.
	Run(ctx context.Context) error
	// Status describes the issuer's state for people.
	Status() string
	// Ends lists what the issuer depends on and when that expires.
	Ends() []End
}

// An End is the expiry of something that an issuer needs, such as a token.
type End struct {
	What string // label of the metric
	At   time.Time
	Do   string // what a person has to do; empty if a program renews it
}

// None is the issuer of a kind that the broker isn't configured for. The broker may still
// have leases of it. Its methods fail with ErrConfig.
type None string

func (n None) err() error {
	return fmt.Errorf("%w: this broker has no issuer for %s credentials", ErrConfig, string(n))
}

// Prepare fails with ErrConfig.
func (n None) Prepare(Order) (Prepared, error) { return Prepared{}, n.err() }

// Issue fails with ErrConfig.
func (n None) Issue(context.Context, Order) (Credential, error) { return Credential{}, n.err() }

// Extend fails with ErrConfig.
func (n None) Extend(context.Context, Handle, time.Duration) (time.Time, error) {
	return time.Time{}, n.err()
}

// Revoke fails with ErrConfig.
func (n None) Revoke(context.Context, Handle) error { return n.err() }
