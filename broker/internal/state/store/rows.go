package store

import (
	"slices"
)

// A Topic is a part of the store that is cached and watched as a whole.
type Topic string

// The topics. The audit log isn't one, because every change appends to it.
const (
	Hosts      Topic = "hosts"      // with their EKs, decisions and repeats
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

// Rows name what an update changes. Updates of different hosts and leases may run at the
// same time in a database with several writers; there, an update locks the rows that it
// names. An update of Any row of a topic runs as if it were alone.
type Rows []row

type row struct {
	topic Topic
	id    string // empty: any of the topic
}

// Host names hosts by id, also new ones.
func Host(ids ...string) Rows { return named(Hosts, ids) }

// Lease names leases by id, also new ones.
func Lease(ids ...string) Rows { return named(Leases, ids) }

func named(t Topic, ids []string) (rows Rows) {
	for _, id := range ids {
		rows = append(rows, row{t, id})
	}
	return rows
}

// Any names all rows of topics, and invalidates what is cached of them.
func Any(topics ...Topic) (rows Rows) {
	for _, t := range topics {
		rows = append(rows, row{topic: t})
	}
	return rows
}

// Everything names all rows of all topics.
func Everything() Rows { return Any(topics...) }

// And returns the union of r and more.
func (r Rows) And(more Rows) Rows { return slices.Concat(r, more) }

// has reports whether r names the row.
func (r Rows) has(one row) bool {
	return slices.Contains(r, one) || slices.Contains(r, row{topic: one.topic})
}
