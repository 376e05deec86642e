package vault

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue"
)

// maxTokenFile bounds a token or secret id file.
const maxTokenFile = 8 << 10

// afterFailure is how long a failed login answers for the next ones.
const afterFailure = time.Second

// lookEvery is how often a token that needs no renewal is looked at, so that
// Status tells of a Vault that went away or came back while nobody asked.
const lookEvery = time.Minute

// A session is the broker's own login at Vault.
type session struct {
	*caller
	cfg config.Vault
	log *slog.Logger

	login chan struct{} // capacity 1: who logs in

	mu      sync.Mutex // guards what follows
	own     ownToken
	reach   error     // why the last call got no answer, nil if it got one
	failing error     // why the last login failed, nil if it didn't
	tried   time.Time // when it failed, in real time
	secret  secretID
}

// A secretID is what is known of the AppRole's in the file, but for itself.
type secretID struct {
	sum  [sha256.Size]byte
	ends time.Time // zero: never, or Vault doesn't say
}

type ownToken struct {
	value     string
	renewable bool
	ttl       time.Duration // when it was last asked for; zero: endless
	until     time.Time     // in real, monotonic time, whatever the wall clock does; zero: endless
	role      string        // the AppRole that it came of
}

func newSession(cfg config.Vault, log *slog.Logger) (*session, error) {
	tlsConfig, err := tlsConfig(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("vault: ca_file: %w", err)
	}
	if own := cfg.Certificate; own != nil {
		// At each handshake, so that a renewed certificate is used.
		tlsConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(own.CertFile, own.KeyFile)
			return &pair, err
		}
	}
	c, err := newCaller(cfg.Address, cfg.Namespace, newTransport(tlsConfig))
	if err != nil {
		return nil, fmt.Errorf("vault: address: %w", err)
	}
	return &session{caller: c, cfg: cfg, log: log, login: make(chan struct{}, 1)}, nil
}

// way is how the broker logs in, for people.
func (s *session) way() string {
	switch {
	case s.cfg.AppRole != nil:
		return "AppRole"
	case s.cfg.Certificate != nil:
		return "TLS certificate"
	}
	return "token file"
}

// token is the broker's, after a login if it has none.
func (s *session) token(ctx context.Context) (string, error) {
	s.mu.Lock()
	value := s.own.value
	s.mu.Unlock()
	if value != "" {
		return value, nil
	}
	return s.renew(ctx, "")
}

// renew logs in anew unless somebody did since old was in use.
func (s *session) renew(ctx context.Context, old string) (string, error) {
	select {
	case s.login <- struct{}{}:
		defer func() { <-s.login }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	s.mu.Lock()
	value, failing, tried := s.own.value, s.failing, s.tried
	s.mu.Unlock()
	if value != "" && value != old {
		return value, nil
	}
	if failing != nil && time.Since(tried) < afterFailure {
		return "", failing
	}
	own, err := s.authenticate(ctx)
	if err == nil && own.value == old {
		err = fmt.Errorf("%w: Vault no longer accepts the token in %s: put a new one there", issue.ErrConfig, s.cfg.TokenFile)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing = err; err != nil {
		s.tried = time.Now()
		return "", err
	}
	s.own, s.reach = own, nil
	s.log.Info("vault: logged in", "by", s.way(), "token_ttl", own.ttl)
	return own.value, nil
}

// authenticate hides a failed login's status: it is no answer to the call that
// wanted the login.
func (s *session) authenticate(ctx context.Context) (ownToken, error) {
	login := call{secret: true}
	switch {
	case s.cfg.AppRole != nil:
		secretID, err := readSecretFile(s.cfg.AppRole.SecretIDFile)
		if err != nil {
			return ownToken{}, fmt.Errorf("%w: vault.approle.secret_id_file: %w", issue.ErrConfig, err)
		}
		login.path = "auth/" + orDefault(s.cfg.AppRole.Mount, "approle") + "/login"
		login.body = map[string]any{"role_id": s.cfg.AppRole.RoleID, "secret_id": secretID}
	case s.cfg.Certificate != nil:
		login.path = "auth/" + orDefault(s.cfg.Certificate.Mount, "cert") + "/login"
		login.body = map[string]any{}
		if s.cfg.Certificate.Role != "" {
			login.body["name"] = s.cfg.Certificate.Role
		}
		s.transport.CloseIdleConnections() // they may still show an older certificate
	default:
		token, err := readSecretFile(s.cfg.TokenFile)
		if err != nil {
			return ownToken{}, fmt.Errorf("%w: vault.token_file: %w", issue.ErrConfig, err)
		}
		own, err := s.lookup(ctx, token)
		if status(err) == http.StatusForbidden {
			return ownToken{}, fmt.Errorf("%w: Vault doesn't accept the token in %s, or its policy lacks \"read\" on auth/token/lookup-self: %v", issue.ErrConfig, s.cfg.TokenFile, err)
		}
		if err != nil {
			return ownToken{}, fmt.Errorf("login by token file: %v", err)
		}
		return own, nil
	}
	answer, err := s.do(ctx, login)
	if code := status(err); code == http.StatusBadRequest || code == http.StatusForbidden || code == http.StatusNotFound {
		return ownToken{}, fmt.Errorf("%w: login by %s: %v", issue.ErrConfig, s.way(), err)
	}
	if err != nil {
		return ownToken{}, fmt.Errorf("login by %s: %v", s.way(), err)
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return ownToken{}, fmt.Errorf("login by %s: Vault's answer holds no token", s.way())
	}
	own := made(answer.Auth)
	own.role = answer.Auth.Metadata["role_name"]
	return own, nil
}

// lookSecretID asks Vault, once for each secret id that is put into the file,
// when it ends. The broker's policy may not allow that; then it isn't known.
func (s *session) lookSecretID(ctx context.Context, own ownToken) {
	if s.cfg.AppRole == nil || own.role == "" {
		return
	}
	text, err := readSecretFile(s.cfg.AppRole.SecretIDFile)
	sum := sha256.Sum256([]byte(text))
	s.mu.Lock()
	same := s.secret.sum == sum
	s.mu.Unlock()
	if err != nil || same {
		return
	}

	answer, err := s.do(ctx, call{path: "auth/" + orDefault(s.cfg.AppRole.Mount, "approle") + "/role/" + url.PathEscape(own.role) + "/secret-id/lookup",
		token: own.value, body: map[string]any{"secret_id": text}, secret: true})
	if code := status(err); err != nil && code != http.StatusForbidden && code != http.StatusNotFound {
		return // it is asked again
	}
	found := secretID{sum: sum}
	if err == nil && answer != nil {
		stamp, _ := answer.Data["expiration_time"].(string)
		if ends, err := time.Parse(time.RFC3339Nano, stamp); err == nil && ends.Year() > 1 {
			found.ends = ends
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secret = found
}

// ends returns when a token ends that nobody but a person renews, and when the
// secret id does. Zero is never, or unknown.
func (s *session) ends() (token, secretID time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.TokenFile != "" && s.own.value != "" && !s.own.renewable {
		token = s.own.until.Round(0)
	}
	return token, s.secret.ends
}

func made(a *api.SecretAuth) ownToken {
	own := ownToken{value: a.ClientToken, renewable: a.Renewable, ttl: time.Duration(a.LeaseDuration) * time.Second}
	if own.ttl > 0 {
		own.until = time.Now().Add(own.ttl)
	}
	return own
}

// lookup asks Vault about a token.
func (s *session) lookup(ctx context.Context, token string) (ownToken, error) {
	answer, err := s.do(ctx, call{read: true, path: "auth/token/lookup-self", token: token, secret: true})
	if err != nil {
		return ownToken{}, err
	}
	if answer == nil {
		return ownToken{}, errors.New("vault: lookup-self has no answer")
	}
	own := ownToken{value: token}
	own.renewable, _ = answer.TokenIsRenewable()
	own.ttl, _ = answer.TokenTTL()
	if own.ttl > 0 {
		own.until = time.Now().Add(own.ttl)
	}
	return own, nil
}

// asBroker makes a call with the broker's token, and once again with a new one
// where the old one has ended. A 403 that stays is Vault's policy.
func (s *session) asBroker(ctx context.Context, c call) (*api.Secret, error) {
	token, err := s.token(ctx)
	if err != nil {
		return nil, err
	}
	c.token = token
	answer, err := s.do(ctx, c)
	s.saw(err)
	if status(err) != http.StatusForbidden || unknown(err) {
		return answer, err
	}
	if _, bad := s.lookup(ctx, token); bad != nil {
		if status(bad) != http.StatusForbidden {
			return nil, bad
		}
		if c.token, err = s.renew(ctx, token); err != nil {
			return nil, err
		}
		answer, err = s.do(ctx, c)
		s.saw(err)
	}
	if status(err) == http.StatusForbidden && !unknown(err) {
		return nil, fmt.Errorf("%w: the broker's Vault policy lacks %q on %s: `countersign vault verify` says what is missing: %w",
			issue.ErrConfig, c.capability(), c.path, err)
	}
	return answer, err
}

// saw keeps what the last call says about Vault itself.
func (s *session) saw(err error) {
	if code := status(err); err != nil && code != 0 && code != http.StatusServiceUnavailable && code != http.StatusTooManyRequests {
		err = nil // it answers
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reach = err
}

// keep holds the broker's token alive until ctx ends.
func (s *session) keep(ctx context.Context) {
	failures := 0
	for {
		wait, err := s.keepOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			wait = min(time.Second<<min(failures, 5), 30*time.Second)
			failures++
			s.log.Warn("vault: the broker's login needs care", "err", err, "again_in", wait)
		} else {
			failures = 0
		}
		if !sleep(ctx, wait*3/4+rand.N(wait/4+1)) {
			return
		}
	}
}

// keepOnce renews the token, or logs in anew where it can't be, and says when to
// come back.
func (s *session) keepOnce(ctx context.Context) (time.Duration, error) {
	token, err := s.token(ctx)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	own := s.own
	s.mu.Unlock()
	s.lookSecretID(ctx, own)
	left := time.Until(own.until)
	switch {
	case own.until.IsZero() || left > own.ttl*2/3:
		wait := lookEvery
		if !own.until.IsZero() {
			wait = min(wait, left-own.ttl/2)
		}
		_, err := s.lookup(ctx, token)
		s.saw(err)
		if status(err) != http.StatusForbidden {
			return wait, err
		}
		left = 0
	case own.renewable:
		answer, err := s.do(ctx, call{path: "auth/token/renew-self", token: token, body: map[string]any{}, secret: true})
		s.saw(err)
		if code := status(err); err != nil && (code == 0 || code >= http.StatusTooManyRequests) {
			return 0, err
		}
		if err == nil && answer != nil && answer.Auth != nil {
			longer := made(answer.Auth)
			if longer.ttl > own.ttl/3 { // else its longest life is near
				longer.value, longer.role = token, own.role
				s.replace(token, longer)
				return max(longer.ttl/2, time.Second), nil
			}
			left = longer.ttl
		}
	}
	if s.cfg.TokenFile != "" && left > 0 {
		// Nothing can be done but to watch the file.
		if fresh, err := readSecretFile(s.cfg.TokenFile); err != nil || fresh == token {
			return min(max(left/4, time.Second), 10*time.Second), nil
		}
	}
	if _, err := s.renew(ctx, token); err != nil {
		return 0, err
	}
	return time.Second, nil
}

// replace keeps what became of token, unless another took its place meanwhile.
func (s *session) replace(token string, own ownToken) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own.value == token {
		s.own = own
	}
}

func (s *session) status() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := fmt.Sprintf("%s by %s", s.cfg.Address, s.way())
	switch {
	case s.failing != nil:
		return fmt.Sprintf("can't log in at %s: %s", at, short(s.failing.Error())), s.failing
	case s.own.value == "":
		return "not logged in yet at " + at, errors.New("vault: not logged in yet")
	case s.reach != nil:
		return fmt.Sprintf("logged in at %s, but %s", at, short(s.reach.Error())), s.reach
	case s.own.until.IsZero():
		return "logged in at " + at + "; the token has no end", nil
	case s.cfg.TokenFile != "" && !s.own.renewable:
		return fmt.Sprintf("logged in at %s until %s; the file wants a new token before that", at, s.own.until.UTC().Format(time.RFC3339)), nil
	}
	return fmt.Sprintf("logged in at %s until %s, renewed before that", at, s.own.until.UTC().Format(time.RFC3339)), nil
}

func readSecretFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return "", err
	}
	b = bytes.TrimSpace(b)
	if len(b) == 0 || len(b) > maxTokenFile || bytes.ContainsFunc(b, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s holds no single printable word", path)
	}
	return string(b), nil
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// number reads what Vault says in JSON numbers.
func number(v any) (int64, bool) {
	n, ok := v.(json.Number)
	if !ok {
		return 0, false
	}
	i, err := n.Int64()
	return i, err == nil
}
