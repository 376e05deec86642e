package server

import (
	"container/list"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
)

const (
	joinsPerSec   = 2 // of hosts that aren't known, from one source, after joinBurst
	joinBurst     = 20
	againPerSec   = 1.0 / 30 // joins of a host that the broker knows, after againBurst: each is kept
	againBurst    = 10
	asksPerSec    = 10 // for credentials and proofs, by one host, after askBurst: what comes of them is kept
	askBurst      = 1000
	opensPerSec   = 1.0 / 300 // that one host tells of files that were opened, after opensBurst: it stands in the audit log
	opensBurst    = 10
	logBytes      = 64 << 10 // of logs that one host shows, each second, after logBurst: each is appraised
	logBurst      = 4 * maxLogs
	callsPerSec   = 10 // other than joins, of strangers from one source, after callBurst
	callBurst     = 200
	hostsPerSec   = 50 // of any kind, by one host, after hostsBurst
	hostsBurst    = 5000
	maxStrangers  = 65536 // sources that are remembered
	maxRegistered = 65536 // hosts that are
)

// A limits has the limiters of all calls. Those of hosts that the inventory has
// are looked up by key, and no stranger's key or address is among them.
type limits struct {
	now                             func() time.Time
	joins, calls                    *limiters // by source
	rejoins, asks, opens, log, host *limiters // by the key of a host that is known
}

func newLimits(now func() time.Time) *limits {
	return &limits{now: now,
		joins: newLimiters(joinsPerSec, joinBurst, maxStrangers), calls: newLimiters(callsPerSec, callBurst, maxStrangers),
		rejoins: newLimiters(againPerSec, againBurst, maxRegistered), asks: newLimiters(asksPerSec, askBurst, maxRegistered),
		opens: newLimiters(opensPerSec, opensBurst, maxRegistered), log: newLimiters(logBytes, logBurst, maxRegistered),
		host: newLimiters(hostsPerSec, hostsBurst, maxRegistered),
	}
}

// allow says whether a call of this peer may be read, or a fault.
func (l *limits) allow(c *conn, procedure string) *api.Error {
	if c.class == local || c.class == operator {
		return nil
	}
	key, now := "", l.now()
	if c.registered {
		key = c.challenge.Key().String()
	}
	from := source(c.challenge.Address)

	switch procedure {
	case countersignv1connect.HostServiceJoinProcedure:
		if key != "" && !l.rejoins.allow(key, 1, now) || key == "" && !l.joins.allow(from, 1, now) {
			return api.NewError(api.Fault, "join-rate", "too many joins from this address; try again in a while")
		}
		return nil
	case countersignv1connect.HostServiceProveProcedure, countersignv1connect.HostServiceIssueProcedure:
		if c.class == member && !l.asks.allow(key, 1, now) {
			return api.NewError(api.Fault, "ask-rate", "this host proves itself, or asks for credentials, too often; try again in a while")
		}
	case countersignv1connect.HostServiceWitnessProcedure:
		if c.class == member && !l.opens.allow(key, 1, now) {
			return api.NewError(api.Fault, "witness-rate", "this host tells of too many opens; try again in a while")
		}
	}
	switch {
	case key == "" && !l.calls.allow(from, 1, now):
		return api.NewError(api.Fault, "call-rate", "too many requests from this address; try again in a while")
	case key != "" && !l.host.allow(key, 1, now):
		return api.NewError(api.Fault, "call-rate", "too many requests of this host; try again in a while")
	}
	return nil
}

// limiters hold what each of many asks for to a rate. Of more than most, the one
// that was silent longest is forgotten: nobody is refused because others are many.
type limiters struct {
	perSecond   rate.Limit
	burst, most int

	mu    sync.Mutex
	of    map[string]*list.Element // guarded by mu
	order *list.List               // guarded by mu; of *limiter, the last used first
}

type limiter struct {
	of string
	*rate.Limiter
}

func newLimiters(perSecond rate.Limit, burst, most int) *limiters {
	return &limiters{perSecond: perSecond, burst: burst, most: most, of: map[string]*list.Element{}, order: list.New()}
}

func (l *limiters) allow(who string, n int, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.of[who]
	if !ok {
		if l.order.Len() >= l.most {
			oldest := l.order.Back()
			delete(l.of, l.order.Remove(oldest).(*limiter).of)
		}
		at = l.order.PushFront(&limiter{who, rate.NewLimiter(l.perSecond, l.burst)})
		l.of[who] = at
	}
	l.order.MoveToFront(at)
	return at.Value.(*limiter).AllowN(now, n)
}
