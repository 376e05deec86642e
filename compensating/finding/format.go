package finding

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"github.com/countersign/countersign/compensating/detect"
)

// severities are syslog's (RFC 5424, section 6.2.1).
var severities = map[detect.Severity]int{detect.Low: 5, detect.Medium: 4, detect.High: 3, detect.Critical: 2}

// Syslog is a finding as RFC 5424 has it, with its fields as structured data.
func (f *Finding) Syslog() string {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "-"
	}
	var data strings.Builder
	for _, p := range [][2]string{{"detector", string(f.Detector)}, {"severity", string(f.Severity)}, {"nhi", f.NHI}, {"lease", f.Lease}, {"host", f.Host}, {"account", f.Account}} {
		if p[1] != "" {
			// Section 6.3.3: these three are escaped; control characters are not for logs.
			value := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`).Replace(printable(p[1]))
			fmt.Fprintf(&data, ` %s="%s"`, p[0], value)
		}
	}
	return fmt.Sprintf("<%d>1 %s %s countersign-watch %d finding [finding@32473%s] %s", 10*8+severities[f.Severity],
		f.Last.UTC().Format("2006-01-02T15:04:05.000000Z"), host, os.Getpid(), data.String(), printable(f.Why))
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// OCSF is a finding as the Open Cybersecurity Schema Framework has it: class
// Detection Finding (2004), version 1.3.
func (f *Finding) OCSF(k Key) map[string]any {
	severity := map[detect.Severity]int{detect.Low: 2, detect.Medium: 3, detect.High: 4, detect.Critical: 5}[f.Severity]
	sum := sha256.Sum256([]byte(string(k.Detector) + " " + k.Cause))
	var evidences []any
	for _, s := range f.Evidence {
		e := map[string]any{"data": s}
		if s.From.IsValid() {
			e["src_endpoint"] = map[string]any{"ip": s.From}
		}
		if s.Account != "" {
			e["user"] = map[string]any{"name": s.Account}
		}
		evidences = append(evidences, e)
	}
	return map[string]any{
		"class_uid": 2004, "category_uid": 2, "activity_id": 1, "type_uid": 200401, "severity_id": severity, "status_id": 1,
		"time": f.Last.UnixMilli(), "start_time": f.First.UnixMilli(), "end_time": f.Last.UnixMilli(), "count": f.Count, "message": f.Why,
		"metadata": map[string]any{"version": "1.3.0", "product": map[string]any{"name": "Countersign", "vendor_name": "Countersign"}},
		"finding_info": map[string]any{"uid": hex.EncodeToString(sum[:16]), "title": string(f.Detector), "desc": f.Why, "types": []string{"OWASP " + f.NHI + ":2025"},
			"first_seen_time": f.First.UnixMilli(), "last_seen_time": f.Last.UnixMilli()},
		"resources": []any{map[string]any{"type": "credential", "uid": f.Lease, "name": f.Account}, map[string]any{"type": "host", "uid": f.Host}},
		"evidences": evidences,
	}
}
