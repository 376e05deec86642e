package sightings

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// parse reads an object of a log. A name that comes twice is an error: which of the
// two another reader takes can't be known. Bytes that are no UTF-8 aren't, since
// databases have names in other encodings.
func parse(b []byte, v any) error {
	return json.Unmarshal(b, v, jsontext.AllowInvalidUTF8(true))
}
