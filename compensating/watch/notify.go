package watch

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
)

// A receiver is told of each finding that is new or reopened, and again until it
// took it.
type receiver interface {
	name() string // for people
	id() string
	tell(context.Context, *record) error
}

func receivers(c *Config) (out []receiver) {
	for _, h := range c.Webhooks {
		out = append(out, webhook{h})
	}
	if c.Syslog != nil {
		out = append(out, syslog{c.Syslog.Address})
	}
	return out
}

type webhook struct{ Webhook }

// name leaves out what may be secret: a path or a query can be the receiver's token.
func (h webhook) name() string {
	u, err := url.Parse(h.URL)
	if err != nil {
		return "webhook"
	}
	return u.Scheme + "://" + u.Host
}

func (h webhook) id() string {
	sum := sha256.Sum256([]byte(h.URL))
	return hex.EncodeToString(sum[:8])
}

// tell posts the finding. The receiver knows it by its detector and cause, since it
// may get it twice.
func (h webhook) tell(ctx context.Context, r *record) error {
	key, err := os.ReadFile(h.KeyFile)
	if err != nil {
		return err
	}
	var v any = struct {
		Cause string `json:"cause"`
		*finding.Finding
		Response detect.Response `json:"response"`
	}{r.Key.Cause, r.Finding, r.Action}
	if h.Format == "ocsf" {
		v = r.Finding.OCSF(r.Key)
	}
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	mac := hmac.New(sha256.New, bytes.TrimSpace(key))
	mac.Write(body)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Countersign-Signature", hex.EncodeToString(mac.Sum(nil)))
	a, err := http.DefaultClient.Do(req)
	if inner := (*url.Error)(nil); errors.As(err, &inner) {
		err = inner.Err // without the address
	}
	if err != nil {
		return err
	}
	defer func() { _ = a.Body.Close() }()
	_, _ = io.Copy(io.Discard, io.LimitReader(a.Body, 1<<20))
	if a.StatusCode/100 != 2 {
		return fmt.Errorf("it answered %s", a.Status)
	}
	return nil
}

type syslog struct{ address string }

func (s syslog) name() string { return s.address }
func (s syslog) id() string   { return s.address }

// tell sends one message of facility 10 (security). Over a stream it is framed by its
// length (RFC 6587, section 3.4.1).
func (s syslog) tell(ctx context.Context, r *record) error {
	u, err := url.Parse(s.address)
	if err != nil {
		return err
	}
	network, address := u.Scheme, u.Host
	if network == "unix" {
		network, address = "unixgram", u.Path
	}
	d := net.Dialer{Timeout: patience}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	message := r.Finding.Syslog()
	if network == "tcp" {
		message = fmt.Sprintf("%d %s", len(message), message)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, err = io.WriteString(conn, message)
	return err
}
