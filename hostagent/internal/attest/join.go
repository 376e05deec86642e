package attest

import (
	"context"
	"errors"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/hostagent/internal/ekcert"
)

// Joined is how a join ended.
type Joined struct {
	HostID  string
	Pending bool // an operator has to approve; join again later
}

// Join asks a broker to admit this host, by a token where one is given. It can
// be repeated: an admitted host gets a new certificate. If acceptNewLog is set, a person
// accepts that the broker's audit log isn't the one that this host has followed.
func (c *Client) Join(ctx context.Context, token string, acceptNewLog bool) (Joined, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.join(ctx, token, acceptNewLog)
}

// join is Join; c.mu is held.
func (c *Client) join(ctx context.Context, token string, acceptNewLog bool) (Joined, error) {
	c.drop()
	if err := c.ensureKeys(ctx); err != nil {
		return Joined{}, err
	}
	cert, err := c.certificate(true)
	if err != nil {
		return Joined{}, err
	}
	peer := c.peer
	peer.Certificate = cert
	s, err := api.Dial(ctx, peer)
	if err != nil {
		return Joined{}, fmt.Errorf("no broker: %w", err)
	}
	defer func() { _ = s.Close() }()
	eks, err := c.device.EKs(ctx)
	if err != nil {
		return Joined{}, fmt.Errorf("TPM: endorsement keys: %w", err)
	}
	eks, problems := ekcert.Complete(c.dir, eks)
	for _, problem := range problems {
		c.log.Warn("a kept EK certificate is not used", "err", problem)
	}
	issuers, err := c.device.Issuers(ctx)
	if err != nil {
		c.log.Warn("the TPM's certificates of issuers are not used", "err", err)
	}
	hostname, _ := os.Hostname()
	msg := &v1.JoinBody{AkPublic: c.keys.ak.Public(), TlsPublic: c.keys.tls.Public(), Token: token, Hostname: hostname, Issuers: issuers}
	for _, ek := range eks {
		msg.EndorsementKeys = append(msg.EndorsementKeys, &v1.EndorsementKey{Public: ek.Public, Certificate: ek.Certificate})
	}
	body, err := proto.Marshal(msg)
	if err != nil {
		return Joined{}, err
	}
	challenge, err := s.Hosts.Join(ctx, request(&v1.JoinRequest{Body: body}))
	if err != nil {
		return Joined{}, api.FromConnect(err)
	}
	answer, err := c.answer(ctx, s, eks, body, challenge.Msg)
	if err != nil {
		return Joined{}, err
	}
	r, err := s.Hosts.Activate(ctx, request(answer))
	if err != nil {
		return Joined{}, api.FromConnect(err)
	}
	if r.Msg.GetPending() {
		return Joined{HostID: r.Msg.GetHostId(), Pending: true}, nil
	}
	return Joined{HostID: r.Msg.GetHostId()}, c.admitted(r.Msg, acceptNewLog)
}

// ensureKeys makes AK and TLS key where there are none. c.mu is held.
func (c *Client) ensureKeys(ctx context.Context) error {
	if c.keys != nil {
		return nil
	}
	ak, err := c.device.CreateAK(ctx, c.alg)
	if err != nil {
		return fmt.Errorf("TPM: create AK: %w", err)
	}
	key, err := c.device.CreateTLSKey(ctx)
	if err != nil {
		return fmt.Errorf("TPM: create TLS key: %w", err)
	}
	k := &keys{AK: ak.Export(), TLS: key.Export(), ak: ak, tls: key}
	if err := writeJSON(c.dir, keysFile, k); err != nil {
		return err
	}
	c.keys = k
	return nil
}

// answer has the TPM answer a challenge. c.mu is held.
func (c *Client) answer(ctx context.Context, s *api.Session, eks []tpm.EK, body []byte, m *v1.JoinResponse) (*v1.ActivateRequest, error) {
	nonce, err := evidence.ParseNonce(m.GetNonce())
	if err != nil {
		return nil, err
	}
	secret, err := c.activate(ctx, eks, m.GetEndorsementKey(), m.GetCredentialBlob(), m.GetEncryptedSecret())
	if err != nil {
		return nil, err
	}
	var others [][]byte
	for _, o := range m.GetOthers() {
		other, err := c.activate(ctx, eks, o.GetEndorsementKey(), o.GetCredentialBlob(), o.GetEncryptedSecret())
		if err != nil {
			c.log.Warn("the TPM shows an endorsement key that it can't use; the broker doesn't record it", "err", err)
		}
		others = append(others, other)
	}
	signer, err := c.device.Signer(c.keys.tls)
	if err != nil {
		return nil, err
	}
	certify, err := binding(evidence.CallCertify, s, nonce, body, signer)
	if err != nil {
		return nil, err
	}
	certification, err := c.device.Certify(ctx, c.keys.ak, c.keys.tls, certify)
	if err != nil {
		return nil, fmt.Errorf("TPM: certify: %w", err)
	}
	extra, err := binding(evidence.CallJoin, s, nonce, body, signer)
	if err != nil {
		return nil, err
	}
	quote, err := c.device.Quote(ctx, c.keys.ak, extra, tpm.DefaultPCRs())
	if err != nil {
		return nil, fmt.Errorf("TPM: quote: %w", err)
	}
	return &v1.ActivateRequest{
		Secret:        secret,
		OtherSecrets:  others,
		Certification: &v1.Certification{Attest: certification.Attest, Signature: certification.Signature},
		Quote:         quoteMessage(quote),
	}, nil
}

// activate has the TPM answer the challenge for one of its EKs. c.mu is held.
func (c *Client) activate(ctx context.Context, eks []tpm.EK, i uint32, blob, encrypted []byte) ([]byte, error) {
	if int(i) >= len(eks) {
		return nil, errors.New("the broker challenges an EK that was not offered")
	}
	secret, err := c.device.Activate(ctx, c.keys.ak, eks[i], tpm.Challenge{CredentialBlob: blob, EncryptedSecret: encrypted})
	if err != nil {
		return nil, fmt.Errorf("TPM: activate: %w", err)
	}
	return secret, nil
}
