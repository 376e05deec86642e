// Package strictjson refuses JSON that two readers could understand differently.
// Package encoding/json takes the last of two equal keys, and a key in other
// letters for the one that it looks for.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Keys calls visit with each key of each object of the JSON text b, and the key
// under which that object stands ("" at the top and in a list of lists). It returns
// visit's first error, or one for a key that an object has twice, in whatever
// letters.
func Keys(b []byte, visit func(under, key string) error) error {
	type level struct {
		keys  map[string]bool // nil in a list
		isKey bool            // the next token is one
		under string
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var levels []level
	last := ""

	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			if len(levels) > 0 {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		if err != nil {
			return err
		}

		top := len(levels) - 1
		if key, ok := token.(string); ok && top >= 0 && levels[top].isKey {
			folded := strings.ToLower(key)
			if levels[top].keys[folded] {
				return fmt.Errorf("%q stands in it twice", key)
			}
			if err := visit(levels[top].under, key); err != nil {
				return err
			}
			levels[top].keys[folded], levels[top].isKey, last = true, false, key
			continue
		}

		switch token {
		case json.Delim('{'):
			levels = append(levels, level{keys: map[string]bool{}, isKey: true, under: last})
			continue
		case json.Delim('['):
			levels = append(levels, level{})
			continue
		case json.Delim('}'), json.Delim(']'):
			levels = levels[:top]
			top--
		}
		if top >= 0 && levels[top].keys != nil {
			levels[top].isKey = true
		}
	}
}
