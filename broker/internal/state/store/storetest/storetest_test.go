package storetest_test

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// dialects run the suite, each by a line here.
var dialects = map[string]store.Dialect{
	"sqlite":   store.SQLite(),
	"numbered": numbered(),
}

func TestStores(t *testing.T) {
	for name, d := range dialects {
		t.Run(name, func(t *testing.T) {
			storetest.Run(t, func(t *testing.T, dir string) *store.Store {
				return check.Must(store.OpenAs(d, filepath.Join(dir, "store.db"), true))(t)
			})
		})
	}
}

// numbered is SQLite with numbered placeholders, as other databases want them, and with
// writers that let no reader in.
func numbered() store.Dialect {
	d := store.SQLite()
	d.Begin = `BEGIN EXCLUSIVE`
	d.Bind = func(statement string) string {
		var out strings.Builder
		n := 0
		for part := range strings.SplitSeq(statement, "?") {
			if n > 0 {
				out.WriteString("?" + strconv.Itoa(n))
			}
			out.WriteString(part)
			n++
		}
		return out.String()
	}
	return d
}
