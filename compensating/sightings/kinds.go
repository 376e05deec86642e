package sightings

import (
	"fmt"
	"strings"
	"time"
)

// Kinds of logs, by name.
var Kinds = []string{"vault-audit", "postgres-stderr", "postgres-csv", "postgres-json", "postgres-activity", "sshd", "windows-json", "ocsf"}

// Options are what readers have to be told.
type Options struct {
	LogLinePrefix string           // of postgres-stderr; empty: one of the usual
	Now           func() time.Time // of sshd, for times without a year
}

// New makes the reader of a kind of log. Source is what its sightings call it.
func New(kind, source string, o Options) (Reader, error) {
	switch kind {
	case "vault-audit":
		return NewVaultAudit(source), nil
	case "postgres-stderr":
		return NewPostgresStderr(source, o.LogLinePrefix)
	case "postgres-csv":
		return NewPostgresCSV(source), nil
	case "postgres-json":
		return NewPostgresJSON(source), nil
	case "postgres-activity":
		return NewActivity(source), nil
	case "sshd":
		return NewSshd(source, o.Now), nil
	case "windows-json":
		return NewWindows(source), nil
	case "ocsf":
		return NewOCSF(source), nil
	}
	return nil, fmt.Errorf("no kind of log is called %q; there are %s", kind, strings.Join(Kinds, ", "))
}

// Databases says whether a kind of log shows logins to databases.
func Databases(kind string) bool {
	return strings.HasPrefix(kind, "postgres-") || kind == "ocsf"
}
