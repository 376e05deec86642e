package store

import (
	"os"
	"time"
)

const (
	// keepLog is the size, in bytes, that the write-ahead log shrinks back to.
	keepLog = 16 << 20
	// shrinkLogAt is the size from which the log is emptied at the next chance.
	shrinkLogAt = 64 << 20
	// shrinkEvery is how often that is tried while somebody reads an old snapshot.
	shrinkEvery = 5 * time.Second
	// shrinkWait is how long a try waits for readers, in milliseconds: all writers
	// wait meanwhile.
	shrinkWait = "20"
)

// shrinkLog empties the write-ahead log once it has grown large. SQLite reuses the log
// by itself only in a moment without readers, which a busy broker may not have for
// hours. A try that fails is repeated: nothing depends on it but the disk.
func (s *Store) shrinkLog() {
	if time.Since(s.shrunk) < shrinkEvery {
		return
	}
	info, err := os.Stat(s.path + "-wal")
	if err != nil || info.Size() < shrinkLogAt {
		return
	}
	s.shrunk = time.Now()
	// The writer's one connection is commitLoop's own, so that the shorter wait is
	// nobody else's.
	for _, statement := range []string{"PRAGMA busy_timeout = " + shrinkWait, "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA busy_timeout = 10000"} {
		_, _ = s.writer.Exec(statement)
	}
}
