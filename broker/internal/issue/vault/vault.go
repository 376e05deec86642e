// Package vault issues credentials from HashiCorp Vault or OpenBao.
//
// Each credential hangs on a token of its own: an orphan of the scope's token
// role, which can read that scope's path and nothing else, made for
// issue.ProvisionalFor, used once, and dropped. Only its accessor is kept. So
// a credential whose delivery nobody acknowledged dies with its token, one
// credential's end touches no other, and the broker's own token may end without
// any credential dying.
//
// Vault is trusted for what it issues and for what it says is over. Its words
// are not trusted to be free of secrets: of a call that carries one, an error
// repeats only known phrases. Nothing here logs a body.
//
// What has no lease can't be ended here. KV secrets and static roles are read by
// others too (issue.Credential.Static): their end is a rotation. A certificate
// or SSH key made without a lease ends by its own time. For both the token is
// revoked as soon as it was used, and Extend only tells when the scope's time is
// over.
package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
)

// cleanup bounds how long an Issue that failed tries to end what it made.
const cleanup = 5 * time.Second

// lateStart is how long after its intent a token may come to life: the longest
// that the broker waits for Vault and Vault for itself.
const lateStart = 2 * time.Minute

// endless stands for the time of a lease that has no end of its own.
const endless = 10 * 365 * 24 * time.Hour

// An Issuer is safe for concurrent use.
type Issuer struct {
	session     *session
	log         *slog.Logger
	now         func() time.Time
	provisional time.Duration
}

var _ issue.Service = (*Issuer)(nil)

// A ref is the content of Vault's issue.Ref.
type ref struct {
	Accessor string `json:"accessor,omitempty"`    // of the token that owns the credential
	Lease    string `json:"vault_lease,omitempty"` // empty where Vault made none
}

// refOf decodes a handle's Ref. It is empty if Vault's answer never arrived.
func refOf(h issue.Handle) (r ref, err error) {
	if len(h.Ref) == 0 {
		return r, nil
	}
	if err := json.Unmarshal(h.Ref, &r); err != nil {
		return r, fmt.Errorf("vault: %.60q names nothing that Vault issued: %w", h.Ref, err)
	}
	return r, nil
}

// open returns the issuer that a broker's config describes.
func open(ctx context.Context, e issue.Environment) (issue.Service, error) {
	if e.Config.Vault == nil {
		return nil, nil
	}
	return New(ctx, *e.Config.Vault, e.Log, e.Steady)
}

// New makes an issuer. It asks nothing of Vault, which may be down or sealed:
// Run, or the first request, logs in.
func New(_ context.Context, cfg config.Vault, log *slog.Logger, now func() time.Time) (*Issuer, error) {
	s, err := newSession(cfg, log)
	if err != nil {
		return nil, err
	}
	return &Issuer{session: s, log: log, now: now, provisional: issue.ProvisionalFor}, nil
}

// Run keeps the broker's login alive until ctx ends.
func (i *Issuer) Run(ctx context.Context) error {
	i.session.keep(ctx)
	return nil
}

// What of Vault ends by itself, as the metric's label has it.
const (
	EndToken    = "vault-token"
	EndSecretID = "vault-secret-id"
)

// Ends are when the broker's token ends, if nobody but a person can renew it, and when
// its AppRole's secret id does, as far as that is known.
func (i *Issuer) Ends() (ends []issue.End) {
	token, secretID := i.session.ends()
	if !token.IsZero() {
		ends = append(ends, issue.End{What: EndToken, At: token, Do: "put a new token into vault.token_file"})
	}
	if !secretID.IsZero() {
		ends = append(ends, issue.End{What: EndSecretID, At: secretID, Do: "write a new secret id into vault.approle.secret_id_file"})
	}
	return ends
}

// Status says in words how the broker stands with Vault.
func (i *Issuer) Status() string {
	words, _ := i.session.status()
	return words
}

// Ready is nil while Vault answers and the broker is logged in.
func (i *Issuer) Ready() error {
	_, err := i.session.status()
	return err
}

// Prepare accepts every order. Vault chooses the names of its credentials.
func (i *Issuer) Prepare(issue.Order) (issue.Prepared, error) { return issue.Prepared{}, nil }

// Issue makes a credential of the decision's scope.
func (i *Issuer) Issue(ctx context.Context, o issue.Order) (issue.Credential, error) {
	scope := o.Decision.Scope()
	if !o.Decision.Allows() || source(scope) == nil {
		return issue.Credential{}, errors.New("vault: no allowing decision on a vault scope")
	}
	return i.issue(ctx, scope, o)
}

func (i *Issuer) issue(ctx context.Context, scope *policy.Scope, o issue.Order) (issue.Credential, error) {
	auth, err := i.createToken(ctx, scope, o)
	if err != nil {
		return issue.Credential{}, err
	}
	c := issue.Credential{Handle: issue.Handle{
		Lease: o.Lease, Scope: scope.Name, Issued: o.Now,
		Expires: o.Now.Add(time.Duration(auth.LeaseDuration) * time.Second),
	}}
	answer, err := i.obtain(ctx, scope, auth.ClientToken, o.Request)
	if err == nil {
		err = fill(&c, scope, answer, o.Now)
	}
	if err == nil {
		c.Names["vault_accessor"] = auth.Accessor
		c.Ref, err = json.Marshal(ref{Accessor: auth.Accessor, Lease: answer.LeaseID})
	}
	if err != nil {
		i.abandon(ctx, auth.Accessor, o)
		return issue.Credential{}, err
	}
	if answer.LeaseID == "" {
		i.abandon(ctx, auth.Accessor, o) // nothing hangs on it
	}
	return c, nil
}

func (i *Issuer) createToken(ctx context.Context, scope *policy.Scope, o issue.Order) (*api.SecretAuth, error) {
	role := RoleName(scope.Name)
	answer, err := i.session.asBroker(ctx, call{path: "auth/token/create/" + role, request: o.Request, body: map[string]any{
		"ttl":          fmt.Sprintf("%ds", int(i.provisional.Seconds())),
		"renewable":    true,
		"display_name": "countersign-" + o.Lease,
		"meta":         map[string]string{"grant": o.Lease, "host": o.Host, "scope": scope.Name},
	}})
	if code := status(err); code == http.StatusBadRequest || code == http.StatusNotFound {
		return nil, fmt.Errorf("%w: no token from token role %s; `countersign vault setup` makes it: %w", issue.ErrConfig, role, err)
	}
	if err != nil {
		return nil, err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" || answer.Auth.Accessor == "" {
		return nil, fmt.Errorf("token role %s: Vault's answer holds no token with an accessor", role)
	}
	// A token that outlives ProvisionalFor by itself, or that shares another's
	// fate, breaks what this package promises.
	wrong := ""
	switch a := answer.Auth; {
	case !a.Orphan:
		wrong = "are not orphans"
	case a.LeaseDuration <= 0 || time.Duration(a.LeaseDuration)*time.Second > i.provisional:
		wrong = fmt.Sprintf("live for %ds instead of %s; is a period set?", a.LeaseDuration, i.provisional)
	case !a.Renewable:
		wrong = "can't be renewed; are they batch tokens?"
	}
	if wrong != "" {
		i.abandon(ctx, answer.Auth.Accessor, o)
		return nil, fmt.Errorf("%w: tokens of token role %s %s; `countersign vault verify` says more", issue.ErrConfig, role, wrong)
	}
	return answer.Auth, nil
}

// obtain reads or writes the scope's path with the lease's own token.
func (i *Issuer) obtain(ctx context.Context, scope *policy.Scope, token, request string) (*api.Secret, error) {
	from, role := source(scope), RoleName(scope.Name)
	c := call{read: from.Method != "write", path: from.Path, token: token, request: request, secret: true}
	if !c.read {
		c.body = map[string]any{}
		for k, v := range from.Parameters {
			c.body[k] = v
		}
	}
	answer, err := i.session.do(ctx, c)
	i.session.saw(err)
	switch status(err) {
	case http.StatusForbidden:
		return nil, fmt.Errorf("%w: Vault policy %s lacks %q on %s: `countersign vault setup` grants it: %w",
			issue.ErrConfig, role, c.capability(), c.path, err)
	case http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed:
		return nil, fmt.Errorf("%w: %w (is the role or secret %s there, and are the scope's parameters what it takes?)", issue.ErrConfig, err, c.path)
	}
	if err != nil {
		return nil, err
	}
	if answer == nil || len(answer.Data) == 0 {
		return nil, fmt.Errorf("%w: Vault has nothing at %s", issue.ErrConfig, c.path)
	}
	return answer, nil
}

// abandon revokes a token that is of no use any more, and with it what hangs on
// it. Where that fails, the token dies by itself within ProvisionalFor.
func (i *Issuer) abandon(ctx context.Context, accessor string, o issue.Order) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	if _, err := i.session.asBroker(ctx, call{path: "auth/token/revoke-accessor", body: map[string]any{"accessor": accessor}, request: o.Request}); err != nil {
		i.log.Warn("vault: a used token is not revoked and ends by itself", "lease", o.Lease, "in", i.provisional, "err", err)
	}
}

// Extend renews token and lease to ttl, and says when the earlier of them ends:
// less than ttl where Vault gave less, as it does near a longest life.
func (i *Issuer) Extend(ctx context.Context, h issue.Handle, ttl time.Duration) (time.Time, error) {
	now := i.now()
	known, err := refOf(h)
	if err != nil {
		return time.Time{}, err
	}
	if known.Lease == "" {
		if !now.Before(h.Expires) {
			return time.Time{}, issue.ErrGone
		}
		return h.Expires, nil
	}
	increment := int(ttl.Seconds())
	answer, err := i.session.asBroker(ctx, call{path: "auth/token/renew-accessor", body: map[string]any{"accessor": known.Accessor, "increment": increment}})
	switch {
	case unknown(err):
		return time.Time{}, i.ended(ctx, h)
	case status(err) == http.StatusBadRequest:
		return time.Time{}, fmt.Errorf("%w: token role %s: %w", issue.ErrConfig, RoleName(h.Scope), err)
	case err != nil:
		return time.Time{}, err
	case answer == nil || answer.Auth == nil || answer.Auth.LeaseDuration <= 0:
		return time.Time{}, errors.New("vault: the renewed token has no time in the answer")
	}
	until := now.Add(time.Duration(answer.Auth.LeaseDuration) * time.Second)

	answer, err = i.session.asBroker(ctx, call{path: "sys/leases/renew/" + known.Lease, body: map[string]any{"increment": increment}, secret: true})
	left := time.Duration(0)
	switch {
	case status(err) == http.StatusBadRequest || status(err) == http.StatusNotFound:
		// Over, or of a kind that isn't renewed: the lookup tells which.
		if left, err = i.lookupLease(ctx, known.Lease); unknown(err) || err == nil && left <= 0 {
			return time.Time{}, i.ended(ctx, h)
		}
	case err == nil && (answer == nil || answer.LeaseDuration <= 0):
		return time.Time{}, errors.New("vault: the renewed lease has no time in the answer")
	case err == nil:
		left = time.Duration(answer.LeaseDuration) * time.Second
	}
	if err != nil {
		return time.Time{}, err
	}
	if end := now.Add(left); end.Before(until) {
		until = end
	}
	return until, nil
}

// ended is for a credential whose time at Vault is over: gone once that is
// confirmed, because a lease that Vault failed to revoke outlives its time.
func (i *Issuer) ended(ctx context.Context, h issue.Handle) error {
	if err := i.Revoke(ctx, h); err != nil {
		return fmt.Errorf("the credential's time is over, its end is not confirmed: %w", err)
	}
	return issue.ErrGone
}

// Revoke ends lease and token. It asks Vault afterwards whether they are over,
// because revoking what Vault doesn't know succeeds, too.
func (i *Issuer) Revoke(ctx context.Context, h issue.Handle) error {
	known, err := refOf(h)
	if err != nil {
		return err
	}
	if known == (ref{}) {
		return i.outlive(h)
	}
	if known.Lease != "" {
		// With sync, so that Vault's answer is the engine's, and a lease that it
		// gave up on is tried again.
		if _, err := i.session.asBroker(ctx, call{path: "sys/leases/revoke/" + known.Lease, body: map[string]any{"sync": true}}); err != nil && !unknown(err) {
			return err
		}
		if _, err := i.lookupLease(ctx, known.Lease); err == nil {
			return fmt.Errorf("vault still holds lease %s after revoking it", known.Lease)
		} else if !unknown(err) {
			return err
		}
	}
	if known.Accessor == "" {
		return nil
	}
	named := map[string]any{"accessor": known.Accessor}
	if _, err := i.session.asBroker(ctx, call{path: "auth/token/revoke-accessor", body: named}); err != nil && !unknown(err) {
		return err
	}
	if _, err := i.session.asBroker(ctx, call{path: "auth/token/lookup-accessor", body: named}); err == nil {
		return fmt.Errorf("vault still holds the token of accessor %s after revoking it", known.Accessor)
	} else if !unknown(err) {
		return err
	}
	return nil
}

// outlive is the end of a lease of which nothing is known at Vault: its token, if
// it was made, had no more than ProvisionalFor, and nobody has renewed it.
func (i *Issuer) outlive(h issue.Handle) error {
	if h.Issued.IsZero() {
		return errors.New("vault: a lease without accessor, Vault lease and time can't be confirmed to be over")
	}
	over := h.Issued.Add(lateStart + i.provisional)
	if i.now().Before(over) {
		return fmt.Errorf("nothing names this lease at Vault; what may have been issued is over by itself at %s", over.UTC().Format(time.RFC3339))
	}
	return nil
}

// lookupLease says how long a lease has to live.
func (i *Issuer) lookupLease(ctx context.Context, id string) (time.Duration, error) {
	answer, err := i.session.asBroker(ctx, call{path: "sys/leases/lookup", body: map[string]any{"lease_id": id}})
	if err != nil {
		return 0, err
	}
	if answer == nil {
		return 0, errors.New("vault: a lease's lookup has no answer")
	}
	if answer.Data["expire_time"] == nil {
		return endless, nil
	}
	return seconds(answer.Data["ttl"]), nil
}

// sorted are a map's keys.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
