package watch

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

// errWhole is returned for a state.json that is one value, as it was before it had
// parts.
var errWhole = errors.New("the state has no parts")

// whole is the state as it was written before it had parts. A watch of an earlier
// version leaves it behind; the next save writes parts.
type whole struct {
	Audit   int64  `json:"audit"`
	Epoch   uint64 `json:"epoch"`
	Sensors map[string]struct {
		Places []tail.Place    `json:"places"`
		Reader json.RawMessage `json:"reader"`
	} `json:"sensors"`
	Judge    detect.State         `json:"judge"`
	Held     []held               `json:"held"`
	Attempts []sightings.Sighting `json:"attempts"`
	Findings []*record            `json:"findings"`
	Brake    brake                `json:"brake"`
}

// restoreWhole takes up a state without parts. What waited for the ledger is judged
// again when the ledger has caught up.
func (w *Watch) restoreWhole() error {
	text, err := os.ReadFile(w.stateFile())
	if err != nil {
		return err
	}
	var was whole
	if err := json.Unmarshal(text, &was); err != nil {
		return fmt.Errorf("%s: %w", w.stateFile(), err)
	}
	w.kept = state{Audit: was.Audit, Epoch: was.Epoch, Sensors: map[string]*sensorState{}, Judge: was.Judge, Brake: was.Brake}
	for name, s := range was.Sensors {
		of := w.kept.sensor(name)
		of.places, of.reader = s.Places, s.Reader
	}
	for i, r := range was.Findings {
		r.number = int64(i + 1)
		w.kept.Findings = append(w.kept.Findings, r)
	}
	now := w.now()
	for _, s := range was.Attempts {
		was.Held = append(was.Held, held{s, now})
	}
	slices.SortStableFunc(was.Held, func(a, b held) int { return a.Since.Compare(b.Since) })
	for _, h := range was.Held {
		w.queue(h.Sighting.Source).add(h)
	}
	return nil
}
