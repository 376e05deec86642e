// Package issue says what every issuer of credentials does: make one on an
// allowing decision, give it its length, and end it with confirmation.
//
// Nothing is issued without a policy.Decision, which only verified evidence
// makes. An issuer keeps no secret: what it made goes to the caller in a
// redacting type, and all that remains is a Handle by which to end it.
//
// A new issuer is a folder below this one, with a Kind, and a line in package
// issuers.
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

// A Kind is one kind of credentials: what scopes say of it, and who issues it.
type Kind struct {
	policy.Kind

	// Open makes the issuer; nil where the broker's config has none of this kind.
	Open func(context.Context, Environment) (Service, error)
}

// An Environment is what an issuer gets of its broker.
type Environment struct {
	Config   *config.Broker
	Password []byte // of key files
	Values   Values
	Log      *slog.Logger

	Wall   func() time.Time // by which verifiers go
	Steady func() time.Time // by which leases go: nobody can set it
	Sure   func() time.Time // what has surely passed, by no clock that was ahead for a while
}

// Values are what issuers remember over restarts: durable, and small. A bucket is one
// issuer's.
type Values interface {
	// Get reads one value; nil where there is none.
	Get(ctx context.Context, bucket, name string) ([]byte, error)
	// All reads a bucket, by name.
	All(ctx context.Context, bucket string, each func(name string, value []byte)) error
	// Add writes a value unless there is one of that name.
	Add(ctx context.Context, bucket, name string, value []byte) error
	// Replace writes a value and removes others of a bucket with it: both, or neither.
	Replace(ctx context.Context, bucket, name string, value []byte, of string, remove []string) error
}

// A Ref is how an issuer knows its credential again: a small JSON value that it wrote
// and nobody else reads. It holds no secret.
type Ref = json.RawMessage

// A Handle names an issued credential to its issuer.
type Handle struct {
	Lease   string // the journal's id
	Scope   string
	Ref     Ref // empty: it was never known to be issued
	Expires time.Time
	Issued  time.Time // when the intent was recorded: what came of it began after that
}

// Prepared is what is known of a credential before it is made; the journal has it
// from the intent on.
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
	Public bool // anybody may know it, as a certificate
}

// A Credential is what an issuer made.
type Credential struct {
	Handle
	Fields    []Field           // by name
	Names     map[string]string // in the outside world, for logs and the ledger; no secrets
	NotBefore time.Time         // nobody accepts it earlier; zero: at once
	Whole     bool              // Expires is the end of its full length: Extend adds nothing
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
	// Prepare checks what a host brings for an order, before anything is recorded of
	// it. What is wrong with it is an *OrderError.
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

// A Service is an issuer with what a running broker wants to know of it.
type Service interface {
	Issuer
	// Run does what goes on in the background, until ctx ends.
	Run(ctx context.Context) error
	// Status says in words how the issuer is.
	Status() string
	// Ends are what of it ends by itself.
	Ends() []End
}

// An End is when something that an issuer needs ends.
type End struct {
	What string // as the metric's label has it
	At   time.Time
	Do   string // what a person has to do; empty: a program renews it
}

// None is the issuer of a kind that a broker isn't configured for: leases of it may be
// there from before.
type None string

func (n None) err() error {
	return fmt.Errorf("%w: this broker has no issuer for %s credentials", ErrConfig, string(n))
}

// Prepare fails with ErrConfig, as all of None's methods do.
func (n None) Prepare(Order) (Prepared, error) { return Prepared{}, n.err() }

// Issue fails.
func (n None) Issue(context.Context, Order) (Credential, error) { return Credential{}, n.err() }

// Extend fails.
func (n None) Extend(context.Context, Handle, time.Duration) (time.Time, error) {
	return time.Time{}, n.err()
}

// Revoke fails.
func (n None) Revoke(context.Context, Handle) error { return n.err() }
