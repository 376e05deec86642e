package cloud

import (
	"encoding/json"
	"errors"
	"fmt"
)

// readAzure reads what the script in docs/CLOUDS.md prints in each VM.
func readAzure(raw json.RawMessage) (answer, error) {
	var in struct {
		Name  string   `json:"name"`
		Group string   `json:"resource_group"`
		ID    string   `json:"vm_id"`
		EKs   []string `json:"ek_public"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return answer{}, err
	}
	switch {
	case in.Name == "" || in.ID == "":
		return answer{}, errors.New("name or vm_id is missing: use the script in docs/CLOUDS.md")
	case len(in.EKs) == 0 || len(in.EKs) > maxKeys:
		return answer{}, fmt.Errorf("%s: ek_public has %d keys: 1 to %d are expected", in.Name, len(in.EKs), maxKeys)
	}
	a := answer{id: in.ID, name: in.Name, labels: map[string]string{"cloud": "azure"}}
	if in.Group != "" {
		a.labels["resource_group"] = in.Group
	}
	for i, text := range in.EKs {
		key, err := pemKey(text)
		if err != nil {
			return answer{}, fmt.Errorf("%s: ek_public %d: %w", in.Name, i+1, err)
		}
		a.keys = append(a.keys, key)
	}
	return a, nil
}
