// Package audit is the broker's record of what it decided and did: a Merkle
// log (RFC 6962, by golang.org/x/mod/sumdb/tlog) kept in the store, in the
// transactions that it records.
//
// A record is appended before the act that it describes becomes visible, so
// that what happened without a record can't have happened through this
// broker. Checkpoints are signed on demand; agents keep the last one they saw
// and demand that the next contains it. The log holds no secret: it names
// leases by accessor, certificates by serial, and never a value.
package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/checkpoint"
)

// Append writes e as the next record and returns its index. r has the time, the actor and
// what the event is about; Append sets the rest. e must not contain a secret. What
// a host causes is on its account (see package budget).
func Append(tx *store.Tx, r event.Record, e event.Event) (int64, error) {
	detail, err := json.Marshal(e)
	if err != nil {
		return 0, fmt.Errorf("audit %s: %w", e.Kind(), err)
	}
	r.Kind, r.Detail = e.Kind(), detail
	tree, err := load(tx)
	if err != nil {
		return 0, err
	}
	n := tree.Size()
	r.Index = n
	r.Time = r.Time.UTC().Truncate(time.Millisecond)
	body, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}

	if _, err := tx.Exec(`INSERT INTO audit_records (idx, body) VALUES (?, ?)`, n, body); err != nil {
		return 0, err
	}
	var hashes []any
	for i, h := range tree.Append(body) {
		hashes = append(hashes, tlog.StoredHashCount(n)+int64(i), h[:])
	}
	if _, err := tx.Exec(insertHashes(len(hashes)/2), hashes...); err != nil {
		return 0, err
	}
	keep(tx, tree)
	if r.Host != "" && !strings.HasPrefix(r.Actor, "operator:") {
		budget.Of(tx).Spend(r.Host, 1, len(body), r.Time)
	}
	return n, nil
}

func size(tx *store.Tx) (int64, error) {
	var n int64
	err := tx.QueryRow(`SELECT COALESCE(MAX(idx)+1, 0) FROM audit_records`).Scan(&n)
	return n, err
}

const keyFile = "audit.key"

// CreateKey makes the key that signs the log of a new broker.
func CreateKey(dir, broker string, random interface{ Read([]byte) (int, error) }) error {
	private, public, err := note.GenerateKey(random, checkpoint.KeyName(broker))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "audit.pub"), []byte(public+"\n"), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, keyFile), []byte(private+"\n"), 0o600)
}

// A Log signs and proves what the store's log says.
type Log struct {
	store  *store.Store
	broker string
	signer note.Signer
	public string

	// Restored is called where a checkpoint shows that the store is older than it was, in the
	// update that opens the new epoch; nil: nothing is.
	Restored func(tx *store.Tx) error
}

// Open reads the signing key from the state folder dir.
func Open(s *store.Store, dir, broker string) (*Log, error) {
	private, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return nil, fmt.Errorf("audit key: %w", err)
	}
	signer, err := note.NewSigner(trim(private))
	if err != nil {
		return nil, fmt.Errorf("audit key: %w", err)
	}
	public, err := os.ReadFile(filepath.Join(dir, "audit.pub"))
	if err != nil {
		return nil, fmt.Errorf("audit key: %w", err)
	}
	if _, err := note.NewVerifier(trim(public)); err != nil {
		return nil, fmt.Errorf("audit.pub: %w", err)
	}
	if signer.Name() != checkpoint.KeyName(broker) {
		return nil, fmt.Errorf("the audit key in %s is of %s, and the store of broker %s: bring them together from one backup", dir, signer.Name(), broker)
	}
	return &Log{store: s, broker: broker, signer: signer, public: trim(public)}, nil
}

func trim(b []byte) string {
	for len(b) > 0 && b[len(b)-1] == '\n' {
		b = b[:len(b)-1]
	}
	return string(b)
}

// VerifierKey is the public key, in note's form.
func (l *Log) VerifierKey() string { return l.public }

// Verifier checks what the log signed.
func (l *Log) Verifier() note.Verifier {
	v, err := note.NewVerifier(l.public)
	if err != nil {
		panic(err) // Open has parsed it
	}
	return v
}

// Signer signs in the log's name.
func (l *Log) Signer() note.Signer { return l.signer }

// Head is the signed head and the proof that the tree of size since is its
// prefix. The proof is empty where since is 0, or more than there is.
func (l *Log) Head(ctx context.Context, since int64) (signed []byte, proof [][]byte, err error) {
	err = l.store.View(ctx, func(tx *store.Tx) error {
		head, err := l.head(tx)
		if err != nil {
			return err
		}
		if signed, err = head.Sign(l.signer); err != nil {
			return err
		}
		if since <= 0 || since >= head.Size {
			return nil
		}
		hashes, err := tlog.ProveTree(head.Size, since, reader(tx))
		proof = checkpoint.FormatProof(hashes)
		return err
	})
	return signed, proof, err
}

func (l *Log) head(tx *store.Tx) (checkpoint.Checkpoint, error) {
	tree, err := load(tx)
	if err != nil {
		return checkpoint.Checkpoint{}, err
	}
	c := checkpoint.Checkpoint{Broker: l.broker, Size: tree.Size()}
	if c.Epoch, err = epoch(tx); err != nil {
		return c, err
	}
	c.Root, err = tree.Root()
	return c, err
}

// Receipt proves that record index is in the log under the signed head.
func (l *Log) Receipt(ctx context.Context, index int64) (record, signed []byte, proof [][]byte, err error) {
	err = l.store.View(ctx, func(tx *store.Tx) error {
		head, err := l.head(tx)
		if err != nil {
			return err
		}
		if index < 0 || index >= head.Size {
			return fmt.Errorf("the log has records 0 to %d, no %d", head.Size-1, index)
		}
		if err := tx.QueryRow(`SELECT body FROM audit_records WHERE idx = ?`, index).Scan(&record); err != nil {
			return err
		}
		hashes, err := tlog.ProveRecord(head.Size, index, reader(tx))
		if err != nil {
			return err
		}
		proof = checkpoint.FormatProof(hashes)
		signed, err = head.Sign(l.signer)
		return err
	})
	return record, signed, proof, err
}

// CheckReceipt verifies what Receipt gave, without the broker.
func CheckReceipt(verifier note.Verifier, record, signed []byte, rawProof [][]byte) (event.Record, error) {
	var r event.Record
	head, err := checkpoint.Open(signed, verifier)
	if err != nil {
		return r, err
	}
	hashes, err := checkpoint.ParseProof(rawProof)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(record, &r); err != nil {
		return r, fmt.Errorf("receipt: the record is not JSON: %w", err)
	}
	if err := tlog.CheckRecord(tlog.RecordProof(hashes), head.Size, head.Root, r.Index, tlog.RecordHash(record)); err != nil {
		return r, fmt.Errorf("receipt: record %d is not under this checkpoint: %w", r.Index, err)
	}
	return r, nil
}

// Read calls each with the records from index from on, at most limit of them.
func Read(tx *store.Tx, from int64, limit int, each func(index int64, body []byte) error) error {
	return tx.Each(func(row store.Row) error {
		var index int64
		var body []byte
		if err := row.Scan(&index, &body); err != nil {
			return err
		}
		return each(index, body)
	}, `SELECT idx, body FROM audit_records WHERE idx >= ? ORDER BY idx LIMIT ?`, from, limit)
}

func epoch(tx *store.Tx) (int64, error) {
	var text string
	err := tx.QueryRow(`SELECT COALESCE((SELECT value FROM meta WHERE name = 'audit.epoch'), '1')`).Scan(&text)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

// ErrNotOurs says that a checkpoint was not signed by this broker.
var ErrNotOurs = errors.New("not a checkpoint of this broker")

// Shown takes a checkpoint that somebody holds. One of this broker that the
// log can't have come after shows that the store was restored from a backup:
// a new epoch is then opened, and recorded with what proves it. It returns the
// size to prove consistency from.
func (l *Log) Shown(ctx context.Context, signed []byte, actor string, now time.Time) (since int64, err error) {
	shown, err := checkpoint.Open(signed, l.Verifier())
	if err != nil || shown.Broker != l.broker {
		return 0, fmt.Errorf("%w: %w", ErrNotOurs, err)
	}
	var behind bool
	check := func(tx *store.Tx) error {
		head, err := l.head(tx)
		if err != nil {
			return err
		}
		switch {
		case head.Epoch > shown.Epoch:
			behind, since = false, 0
		case head.Epoch < shown.Epoch, head.Size < shown.Size:
			behind = true
		default:
			root, err := tlog.TreeHash(shown.Size, reader(tx))
			if err != nil {
				return err
			}
			behind, since = root != shown.Root, shown.Size
		}
		return nil
	}
	if err := l.store.View(ctx, check); err != nil || !behind {
		return since, err
	}
	err = l.store.Update(ctx, store.Any(store.Broker), func(tx *store.Tx) error {
		// Another agent may have shown the same meanwhile.
		if err := check(tx); err != nil || !behind {
			return err
		}
		if l.Restored != nil {
			if err := l.Restored(tx); err != nil {
				return err
			}
		}
		return OpenEpoch(tx, max(shown.Epoch, 1)+1, actor, now, event.Epoch{
			Reason: "a checkpoint that this log can't follow was shown", Shown: string(signed),
		})
	})
	return 0, err
}

// OpenEpoch records that the log starts anew at its present size.
func OpenEpoch(tx *store.Tx, number int64, actor string, now time.Time, e event.Epoch) error {
	if _, err := tx.Exec(`INSERT INTO meta (name, value) VALUES ('audit.epoch', ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, strconv.FormatInt(number, 10)); err != nil {
		return err
	}
	_, err := Append(tx, event.Record{Time: now, Actor: actor}, e)
	return err
}

const acknowledgedKey = "audit.epoch.acknowledged"

// Acknowledge records that an operator stands for the present epoch, which it returns. New
// reports whether nobody did before. The update has to name [store.Broker].
func Acknowledge(tx *store.Tx, operator string) (number int64, isNew bool, err error) {
	number, err = epoch(tx)
	if err != nil {
		return 0, false, err
	}
	before, _, err := acknowledgement(tx)
	if err != nil || before == number || number == 1 {
		return number, false, err
	}
	_, err = tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
		acknowledgedKey, fmt.Sprintf("%d %s", number, operator))
	return number, true, err
}

// acknowledgement reads which epoch was acknowledged last, and by whom; 0: none was.
func acknowledgement(tx *store.Tx) (number int64, operator string, err error) {
	var text string
	err = tx.QueryRow(`SELECT COALESCE((SELECT value FROM meta WHERE name = ?), '0 ')`, acknowledgedKey).Scan(&text)
	if err != nil {
		return 0, "", err
	}
	count, operator, _ := strings.Cut(text, " ")
	number, err = strconv.ParseInt(count, 10, 64)
	return number, operator, err
}

// Unacknowledged returns the present epoch if nobody stands for it yet, else 0. The first
// needs nobody.
func Unacknowledged(tx *store.Tx) (int64, error) {
	number, err := epoch(tx)
	if err != nil || number == 1 {
		return 0, err
	}
	last, _, err := acknowledgement(tx)
	if last == number {
		number = 0
	}
	return number, err
}

// Acknowledged is the signed acknowledgement of the present epoch; nil: there is none.
func (l *Log) Acknowledged(ctx context.Context) (signed []byte, err error) {
	err = l.store.View(ctx, func(tx *store.Tx) error {
		number, err := epoch(tx)
		if err != nil {
			return err
		}
		last, operator, err := acknowledgement(tx)
		if err != nil || last != number {
			return err
		}
		signed, err = checkpoint.Acknowledgement{Broker: l.broker, Epoch: number, Operator: operator}.Sign(l.signer)
		return err
	})
	return signed, err
}

// Epoch is the log's present epoch.
func Epoch(tx *store.Tx) (int64, error) { return epoch(tx) }
