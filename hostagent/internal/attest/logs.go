package attest

import (
	"bytes"
	"cmp"

	boot "github.com/countersign/countersign/attestors/boot/collect"
	"github.com/countersign/countersign/attestors/evidence"
	ima "github.com/countersign/countersign/attestors/ima/collect"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// LogPaths are where the host keeps what explains its PCRs.
type LogPaths struct {
	Event, Userspace string // of the firmware and boot loader; of systemd
	IMA              string // binary_runtime_measurements
}

// Logs are where a config says that they are, or the kernel's own where it says
// nothing; systemd's is systemd's.
func Logs(event, list string) LogPaths {
	return LogPaths{Event: cmp.Or(event, boot.EventLogPath), Userspace: boot.UserspaceLogPath, IMA: cmp.Or(list, ima.Path)}
}

// read reads what the broker doesn't know of the logs. They are read after the
// quote: the IMA list may hold more than it covers, and never less.
func (p LogPaths) read(bootID string, known *v1.Known) (*v1.Logs, error) {
	out := &v1.Logs{}
	event, err := boot.Read(p.Event)
	if err != nil {
		return nil, err
	}
	userspace, err := boot.Read(p.Userspace)
	if err != nil {
		return nil, err
	}
	same := known.GetBootId() == bootID
	if digest := evidence.LogsDigest(event, userspace); same && !digest.IsZero() && bytes.Equal(digest[:], known.GetEventLogSha256()) {
		out.EventLogKnown = true
	} else {
		out.EventLog, out.UserspaceLog = event, userspace
	}
	var from int64
	if same {
		from = int64(min(known.GetImaOffset(), 1<<40))
	}
	list, from, err := ima.Read(p.IMA, from)
	if err != nil {
		return nil, err
	}
	out.Ima, out.ImaOffset, out.ImaPresent = list, uint64(from), from > 0 || len(list) > 0
	return out, nil
}
