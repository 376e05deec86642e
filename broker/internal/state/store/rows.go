package store

import (
	"slices"
)

// A Topic is a part of the store: what is changed, cached or waited for as one.
type Topic string

// Topics are all of them. The audit log is none: each change appends to it.
const (
	Hosts      Topic = "hosts"      // with their EKs and decisions
	Leases     Topic = "leases"     //
	Findings   Topic = "findings"   //
	Canaries   Topic = "canaries"   //
	Scopes     Topic = "scopes"     // the policy in force
	References Topic = "references" // reference sets, maintenance, releases
	Operators  Topic = "operators"  //
	Tokens     Topic = "tokens"     // for joining
	Values     Topic = "values"     // of issuers
	Broker     Topic = "broker"     // its id, clocks, epoch
)

var topics = []Topic{Hosts, Leases, Findings, Canaries, Scopes, References, Operators, Tokens, Values, Broker}

// Rows name what an update changes. An update of single hosts and leases runs beside
// others, which on a database with several writers wait for its rows; one that changes any
// row of a topic is a global act, and runs as if alone.
type Rows []row

type row struct {
	topic Topic
	id    string // empty: any of the topic
}

// Host names hosts by id, those that are yet to be made too.
func Host(ids ...string) Rows { return named(Hosts, ids) }

// Lease names leases by id, those that are yet to be made too.
func Lease(ids ...string) Rows { return named(Leases, ids) }

func named(t Topic, ids []string) (rows Rows) {
	for _, id := range ids {
		rows = append(rows, row{t, id})
	}
	return rows
}

// Any names any rows of topics, and makes what was cached of them be read again.
func Any(topics ...Topic) (rows Rows) {
	for _, t := range topics {
		rows = append(rows, row{topic: t})
	}
	return rows
}

// Everything is Any of all topics.
func Everything() Rows { return Any(topics...) }

// And is both.
func (r Rows) And(more Rows) Rows { return slices.Concat(r, more) }

// has reports whether a row is named.
func (r Rows) has(one row) bool {
	return slices.Contains(r, one) || slices.Contains(r, row{topic: one.topic})
}
