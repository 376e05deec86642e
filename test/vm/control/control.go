// Package control is what the host and the virtual machine's init say to each
// other on the machine's second serial port: a request, its reply, one JSON
// object a line. The host is trusted: what it asks for is done as root.
package control

// MaxLine bounds a line of either side.
const MaxLine = 1 << 20

// Ready is the line that init writes when it takes requests. Firmware and boot
// loader write to the port before it.
const Ready = "countersign-vm ready"

// A Request asks for one thing.
type Request struct {
	Run   []string `json:"run,omitempty"`   // a program and its arguments: waits for its end
	Start []string `json:"start,omitempty"` // likewise, and does not wait
	Stdin string   `json:"stdin,omitempty"` // of Run
	UID   uint32   `json:"uid,omitempty"`   // who Run and Start are

	Read     string `json:"read,omitempty"`     // the content of a file
	Change   string `json:"change,omitempty"`   // put a program in its own place that is one byte longer
	Stop     int    `json:"stop,omitempty"`     // a process that Start started: SIGTERM
	PowerOff bool   `json:"poweroff,omitempty"` // has no reply
}

// A Reply is what came of it.
type Reply struct {
	Output string `json:"output,omitempty"` // of Run: stdout; of Read: the content
	PID    int    `json:"pid,omitempty"`    // of Start
	Error  string `json:"error,omitempty"`  // of Run: with stderr
}
