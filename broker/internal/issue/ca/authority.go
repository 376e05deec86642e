package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"go.step.sm/crypto/jose"
)

// The authority's own name, and what its tokens are for.
const (
	provisionerName = "countersign"
	signAudience    = "https://countersign/1.0/sign"
	revokeAudience  = "https://countersign/1.0/revoke"
)

// longest is what a certificate may live: more than a scope may ask for.
const longest = 367 * 24 * time.Hour

// A minter makes the authority's tokens. Its key is as old as the process.
type minter struct {
	signer jose.Signer
	public jose.JSONWebKey
}

func newMinter() (*minter, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	private := jose.JSONWebKey{Key: key, KeyID: rand.Text(), Algorithm: jose.ES256, Use: "sig"}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: private}, (&jose.SignerOptions{}).WithType("JWT"))
	return &minter{signer, private.Public()}, err
}

// embed makes the authority. Its provisioner stands in every certificate, by
// name: for one without, smallstep would allow renewal by mTLS.
func embed(i *Issuer) (*authority.Authority, error) {
	data, err := json.Marshal(map[string]string{"CRLURL": i.CRLURL})
	if err != nil {
		return nil, err
	}
	yes := true
	return authority.NewEmbedded(
		authority.WithConfig(&config.Config{
			DNSNames: []string{"countersign"},
			AuthorityConfig: &config.AuthConfig{
				// It would refuse every token after the clock was set back.
				DisableIssuedAtCheck: true,
				Backdate:             &provisioner.Duration{Duration: backdate},
				Provisioners: provisioner.List{&provisioner.JWK{
					Type: "JWK", Name: provisionerName, Key: &i.minter.public,
					Claims: &provisioner.Claims{
						MinTLSDur: &provisioner.Duration{Duration: time.Second}, MaxTLSDur: &provisioner.Duration{Duration: longest},
						DefaultTLSDur: &provisioner.Duration{Duration: time.Hour}, DisableRenewal: &yes,
					},
					Options: &provisioner.Options{X509: &provisioner.X509Options{Template: template, TemplateData: data}},
				}},
			},
		}),
		authority.WithX509Signer(i.issuer, i.key),
		authority.WithX509RootCerts(i.root),
		authority.WithDatabase(i.database),
		authority.WithQuietInit(),
	)
}

// token makes a token for one act on subject, good until it is used or spent is
// called. It has no times in it, which a clock step could make wrong: it never
// leaves the call that made it.
func (i *Issuer) token(subject, audience string, c *content, csr []byte) (token string, spent func(), err error) {
	claims := map[string]any{"jti": rand.Text(), "iss": provisionerName, "sub": subject, "aud": audience}
	if c != nil {
		sum := sha256.Sum256(csr)
		claims["certificate"] = c
		claims["cnf"] = map[string]string{"x5rt#S256": base64.RawURLEncoding.EncodeToString(sum[:])}
	}
	if token, err = jose.Signed(i.minter.signer).Claims(claims).CompactSerialize(); err != nil {
		return "", nil, err
	}
	id := claims["jti"].(string)
	i.database.tokens.Store(id, nil)
	return token, func() { i.database.tokens.Delete(id) }, nil
}

// revoke has the authority revoke a serial. It wants a certificate to know the
// end from; of that it reads nothing else.
func (i *Issuer) revoke(ctx context.Context, serial *big.Int, ends time.Time) error {
	token, spent, err := i.token(serial.String(), revokeAudience, nil, nil)
	if err != nil {
		return err
	}
	defer spent()
	ctx = provisioner.NewContextWithMethod(ctx, provisioner.RevokeMethod)
	if _, err := i.authority.Authorize(ctx, token); err != nil {
		return err
	}
	return i.authority.Revoke(ctx, &authority.RevokeOptions{
		Serial: serial.String(), PassiveOnly: true, OTT: token, Crt: &x509.Certificate{SerialNumber: serial, NotAfter: ends},
	})
}
