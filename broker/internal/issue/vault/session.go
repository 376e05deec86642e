package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
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

// A session is the broker's own login at Vault.
type session struct {
	*caller
	cfg config.Vault
	log *slog.Logger
	now func() time.Time

	login chan struct{} // capacity 1: who logs in

	mu    sync.Mutex
	own   ownToken  // guarded by mu
	err   error     // guarded by mu; why the last try to reach Vault failed, nil if it didn't
	tried time.Time // guarded by mu; when a login failed last, in real time
}

type ownToken struct {
	value     string
	renewable bool
	ttl       time.Duration // when it was last asked for; zero: endless
	until     time.Time     // by the session's clock; zero: endless
}

func newSession(cfg config.Vault, log *slog.Logger, now func() time.Time) (*session, error) {
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
	return &session{caller: c, cfg: cfg, log: log, now: now, login: make(chan struct{}, 1)}, nil
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
	value, err, tried := s.own.value, s.err, s.tried
	s.mu.Unlock()
	if value != "" && value != old {
		return value, nil
	}
	if err != nil && time.Since(tried) < afterFailure {
		return "", err
	}
	own, err := s.authenticate(ctx)
	if err == nil && own.value == old {
		err = fmt.Errorf("%w: Vault no longer accepts the token in %s: put a new one there", issue.ErrConfig, s.cfg.TokenFile)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	if err != nil {
		s.own, s.tried = ownToken{}, time.Now()
		return "", err
	}
	s.own = own
	s.log.Info("vault: logged in", "by", s.way(), "token_ttl", own.ttl)
	return own.value, nil
}

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
		return s.lookup(ctx, token)
	}
	answer, err := s.do(ctx, login)
	if code := status(err); code == http.StatusBadRequest || code == http.StatusForbidden || code == http.StatusNotFound {
		return ownToken{}, fmt.Errorf("%w: login by %s: %w", issue.ErrConfig, s.way(), err)
	}
	if err != nil {
		return ownToken{}, fmt.Errorf("login by %s: %w", s.way(), err)
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return ownToken{}, fmt.Errorf("login by %s: Vault's answer holds no token", s.way())
	}
	return s.made(answer.Auth), nil
}

func (s *session) made(a *api.SecretAuth) ownToken {
	own := ownToken{value: a.ClientToken, renewable: a.Renewable, ttl: time.Duration(a.LeaseDuration) * time.Second}
	if own.ttl > 0 {
		own.until = s.now().Add(own.ttl)
	}
	return own
}

// lookup asks Vault about a token.
func (s *session) lookup(ctx context.Context, token string) (ownToken, error) {
	answer, err := s.do(ctx, call{read: true, path: "auth/token/lookup-self", token: token, secret: true})
	if status(err) == http.StatusForbidden {
		return ownToken{}, fmt.Errorf("%w: the broker's token is not valid, or its policy lacks read on auth/token/lookup-self: %w", issue.ErrConfig, err)
	}
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
		own.until = s.now().Add(own.ttl)
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
	s.err = err
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
	switch left := own.until.Sub(s.now()); {
	case own.until.IsZero():
		return time.Minute, nil
	case left > own.ttl*2/3:
		return min(left-own.ttl/2, time.Hour), nil // fresh
	case own.renewable:
		answer, err := s.do(ctx, call{path: "auth/token/renew-self", token: token, body: map[string]any{}, secret: true})
		if err == nil && answer != nil && answer.Auth != nil {
			longer := s.made(answer.Auth)
			longer.value = token
			s.saw(nil)
			if longer.ttl > own.ttl/3 { // else its longest life is near
				s.mu.Lock()
				if s.own.value == token {
					s.own = longer
				}
				s.mu.Unlock()
				return max(longer.ttl/2, time.Second), nil
			}
		} else if code := status(err); code == 0 || code >= 429 {
			s.saw(err)
			return 0, err
		}
	case s.cfg.TokenFile != "" && left > 0:
		// Nothing can be done but to watch the file.
		if fresh, err := readSecretFile(s.cfg.TokenFile); err == nil && fresh == token {
			return min(max(left/4, time.Second), 10*time.Second), nil
		}
	}
	if _, err := s.renew(ctx, token); err != nil {
		return 0, err
	}
	return time.Second, nil
}

func (s *session) status() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := fmt.Sprintf("%s by %s", s.cfg.Address, s.way())
	switch {
	case s.own.value == "" && s.err == nil:
		return "not logged in yet at " + at, errors.New("vault: not logged in yet")
	case s.own.value == "":
		return fmt.Sprintf("not logged in at %s: %s", at, short(s.err.Error())), s.err
	case s.err != nil:
		return fmt.Sprintf("logged in at %s, but %s", at, short(s.err.Error())), s.err
	case s.own.until.IsZero():
		return "logged in at " + at + "; the token has no end", nil
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
