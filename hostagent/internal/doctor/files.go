package doctor

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"

	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
)

// checkFiles says what would keep a credential's files from being written.
func checkFiles(c *config.Credential) error {
	for _, f := range c.Files {
		if err := deliver.Validate(f.Template); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		if info, err := os.Stat(filepath.Dir(f.Path)); err != nil || !info.IsDir() {
			return fmt.Errorf("%s: the folder %s is missing", f.Path, filepath.Dir(f.Path))
		}
		if _, err := user.Lookup(f.Owner); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		if _, err := user.LookupGroup(f.Group); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return nil
}
