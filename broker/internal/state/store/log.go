package store

import (
	"database/sql"
	"os"
	"time"
)

const (
	// copyAfter is after how many commits the write-ahead log is copied into the
	// database.
	copyAfter = 100
	// copyLatest is how long after a commit that is done at the latest.
	copyLatest = time.Minute
	// keepLog is the size, in bytes, that the log shrinks back to.
	keepLog = 16 << 20
	// shrinkLogAt is the size from which the log is emptied at the next chance.
	shrinkLogAt = 64 << 20
	// shrinkEvery is how often that is tried while somebody reads an old snapshot.
	shrinkEvery = 5 * time.Second
	// shrinkWait is how long a try waits for readers, in milliseconds: all writers
	// wait meanwhile.
	shrinkWait = "20"
)

// A logKeeper copies the write-ahead log into the database, beside the commits: SQLite's
// own way of doing it within one makes that one, and all who wait for it, as slow as the
// disk is at writing everywhere. And it empties a log that has grown large, which SQLite
// does only in a moment without readers that a busy broker may not have for hours.
//
// Neither is needed for what is durable: a try that fails is repeated.
type logKeeper struct {
	file   string
	writer *sql.DB       // of the store: commitLoop's
	copier *sql.DB       // one connection
	wake   chan struct{} // there is enough to copy; capacity 1

	// Of commitLoop alone.
	commits int       // since the last wake-up
	shrunk  time.Time // when the log was last tried to be emptied

	ended chan struct{} // closed when run has ended; nil where it never ran
}

func newLogKeeper(file string, writer, copier *sql.DB) logKeeper {
	return logKeeper{file: file, writer: writer, copier: copier, wake: make(chan struct{}, 1)}
}

// run copies until stop is closed.
func (k *logKeeper) run(stop <-chan struct{}) {
	defer close(k.ended)
	ticker := time.NewTicker(copyLatest)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-k.wake:
		case <-ticker.C:
		}
		// A checkpoint of this kind waits for nobody and holds up nobody.
		_, _ = k.copier.Exec("PRAGMA wal_checkpoint(PASSIVE)")
	}
}

// committed is called by commitLoop after each commit.
func (k *logKeeper) committed() {
	if k.commits++; k.commits >= copyAfter {
		k.commits = 0
		select {
		case k.wake <- struct{}{}:
		default:
		}
	}
	if time.Since(k.shrunk) < shrinkEvery {
		return
	}
	info, err := os.Stat(k.file)
	if err != nil || info.Size() < shrinkLogAt {
		return
	}
	k.shrunk = time.Now()
	// The writer's one connection is commitLoop's own, so that the shorter wait is
	// nobody else's.
	for _, statement := range []string{"PRAGMA busy_timeout = " + shrinkWait, "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA busy_timeout = 10000"} {
		_, _ = k.writer.Exec(statement)
	}
}

// close waits for what is being copied.
func (k *logKeeper) close() error {
	if k.ended != nil {
		<-k.ended
	}
	return k.copier.Close()
}
