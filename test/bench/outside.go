package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/countersign/countersign/test/lab"
)

// A walState is how far SQLite's write-ahead log has come: which round of it,
// and how many transactions were committed to it since the round began.
type walState struct {
	round   uint64 // the header's salts
	commits int
}

// readWAL counts commits from outside: the frame that ends a transaction holds
// the database's size, all others 0 (https://sqlite.org/fileformat2.html#walformat).
func readWAL(path string) (walState, error) {
	const header, frameHeader = 32, 24
	b, err := os.ReadFile(path)
	if err != nil || len(b) < header {
		return walState{}, err
	}
	page := int(binary.BigEndian.Uint32(b[8:]))
	w := walState{round: binary.BigEndian.Uint64(b[16:])}
	for b = b[header:]; len(b) >= frameHeader+page; b = b[frameHeader+page:] {
		if binary.BigEndian.Uint64(b[8:]) != w.round {
			break // left over from the round before
		}
		if binary.BigEndian.Uint32(b[4:]) != 0 {
			w.commits++
		}
	}
	return w, nil
}

// An answered is how many requests for a credential a broker answered.
type answered struct{ fast, all float64 }

// answers reads a broker's histogram.
func answers(ctx context.Context, b *lab.Broker) (a answered, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.Metrics+"/metrics", nil)
	if err != nil {
		return a, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return a, err
	}
	defer func() { _ = r.Body.Close() }()
	lines := bufio.NewScanner(r.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.HasPrefix(name, "countersign_request_seconds") || !strings.Contains(name, `HostService/Issue"`) || !strings.Contains(name, `outcome="ok"`) {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return a, fmt.Errorf("metrics: %w", err)
		}
		switch {
		case strings.Contains(name, `le="0.01"`):
			a.fast = n
		case strings.HasPrefix(name, "countersign_request_seconds_count"):
			a.all = n
		}
	}
	return a, lines.Err()
}
