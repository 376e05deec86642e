package collect

import (
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/windowstpm"
)

// openDevice opens the system's TPM through TBS, which is also its resource
// manager.
func openDevice(string) (transport.TPMCloser, error) { return windowstpm.Open() }
