package supervisor

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// alive tells the system manager that the agent isn't stopped, where its unit
// has a watchdog.
func alive(ctx context.Context) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil || limit == 0 {
		return
	}
	ticker := time.NewTicker(limit / 4)
	defer ticker.Stop()
	for ctx.Err() == nil {
		_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog) // it is told again in a moment
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}
