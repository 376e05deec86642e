package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/internal/hclread"
	"github.com/countersign/countersign/internal/secret"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// tickets is an issuer that nobody knew before: it hands out numbered tickets.
type tickets struct {
	mu   sync.Mutex
	last int
	ends map[string]time.Time // of those in force, by number
}

type ticketSource struct{ Colour string }

func (i *tickets) kind() issue.Kind {
	return issue.Kind{
		Kind: policy.Kind{Name: "ticket", Arguments: []string{"colour"}, Decode: func(b hclread.Block, _ policy.Options) policy.Source {
			return &ticketSource{b.Text("colour", hclread.OneOf("red", "blue"))}
		}},
		Open: func(context.Context, issue.Environment) (issue.Service, error) { return i, nil },
	}
}

func (i *tickets) Prepare(issue.Order) (issue.Prepared, error) { return issue.Prepared{}, nil }

func (i *tickets) Issue(_ context.Context, o issue.Order) (issue.Credential, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.last++
	number := fmt.Sprint(i.last)
	i.ends[number] = o.Now.Add(issue.ProvisionalFor)
	return issue.Credential{
		Handle: issue.Handle{Ref: issue.Ref(`{"number":"` + number + `"}`), Expires: i.ends[number]},
		Fields: []issue.Field{{Name: "ticket", Value: secret.New([]byte(o.Decision.Scope().Source.(*ticketSource).Colour + "-" + number))}},
		Names:  map[string]string{"ticket": number},
	}, nil
}

func number(h issue.Handle) (n string, err error) {
	var r struct{ Number string }
	err = json.Unmarshal(h.Ref, &r)
	return r.Number, err
}

func (i *tickets) Extend(_ context.Context, h issue.Handle, ttl time.Duration) (time.Time, error) {
	n, err := number(h)
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, ok := i.ends[n]; !ok || err != nil {
		return time.Time{}, issue.ErrGone
	}
	i.ends[n] = time.Now().Add(ttl)
	return i.ends[n], nil
}

func (i *tickets) Revoke(_ context.Context, h issue.Handle) error {
	n, err := number(h)
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.ends, n)
	return err
}

func (i *tickets) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (i *tickets) Status() string { return "well" }

func (i *tickets) Ends() []issue.End { return nil }

// inForce is when a ticket ends.
func (i *tickets) inForce(n string) (until time.Time, ok bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	until, ok = i.ends[n]
	return until, ok
}

// A third issuer is a folder and a line: a scope names it, a host gets its credential,
// which lives, is proven, is told by its names, and ends.
func TestAnotherIssuer(t *testing.T) {
	issuer := &tickets{ends: map[string]time.Time{}}
	before := issuers.Kinds
	issuers.Kinds = append(before[:len(before):len(before)], issuer.kind()) // the line
	t.Cleanup(func() { issuers.Kinds = before })

	ctx := check.Within(t, time.Minute)
	ca := check.Must(lab.NewTPMCA(t.TempDir()))(t)
	roots := filepath.Join(t.TempDir(), "roots.pem")
	root, intermediate := ca.PEM()
	check.Nil(t, os.WriteFile(roots, append(root, intermediate...), 0o600))
	b := check.Must(lab.NewBroker(ctx, t.TempDir(), lab.BrokerOptions{EKRoots: []string{roots}}))(t)
	c := check.Must(config.Load(b.Config()))(t)
	running, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	var log strings.Builder
	go func() { ended <- serve(running, c, &log) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the broker: %v\n%s", err, &log)
		}
	})
	check.Eventually(t, time.Minute, "the broker answers", func() (bool, string) {
		_, err := b.CLI(ctx, "status")
		return err == nil, fmt.Sprint(err)
	})

	check.Nil(t, b.ApplyScopes(ctx, `scope "entry" {
  process { user = "billing" }
  ticket {
    colour = "red"
    ttl    = "1h"
  }
}`))
	if err := b.ApplyScopes(ctx, `scope "entry" {
  process { user = "billing" }
  ticket { colour = "green" }
}`); err == nil || !strings.Contains(err.Error(), `"green" is not red or blue`) || !strings.Contains(err.Error(), "ttl: is missing") {
		t.Errorf("a wrong block: %v", err)
	}

	h := check.Must(lab.NewSoftHost(b, ca))(t)
	check.Must(h.Join(ctx, check.Must(b.JoinToken(ctx))(t)))(t)
	s := check.Must(h.Dial(ctx))(t)
	t.Cleanup(func() { _ = s.Close() })
	program := check.Must(h.Program("/opt/billing/bin/billingd", "billing", 4711))(t)
	r := check.Must(h.Issue(ctx, s, h.IssueBody("entry", program)))(t)
	if f := r.GetFields(); len(f) != 1 || f[0].GetName() != "ticket" || string(f[0].GetValue()) != "red-1" {
		t.Errorf("fields %v", f)
	}
	if until, ok := issuer.inForce("1"); !ok || time.Until(until) < 59*time.Minute {
		t.Errorf("acknowledged, and in force %v until %v", ok, until)
	}

	var list struct {
		Leases []struct {
			Kind, State string
			Names       map[string]string
		}
	}
	check.Nil(t, b.JSON(ctx, &list, "lease", "list"))
	if len(list.Leases) != 1 || list.Leases[0].Kind != "ticket" || list.Leases[0].State != "live" || list.Leases[0].Names["ticket"] != "1" || list.Leases[0].Names["secret_hmac"] == "" {
		t.Errorf("leases %+v", list.Leases)
	}
	check.Must(b.CLI(ctx, "lease", "revoke", r.GetLeaseId(), "--reason", "test"))(t)
	if _, ok := issuer.inForce("1"); ok {
		t.Error("revoked, and in force")
	}
}
