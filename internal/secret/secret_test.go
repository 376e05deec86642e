package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/countersign/countersign/internal/secret"
)

func TestNothingPrintsIt(t *testing.T) {
	s := secret.New([]byte("hunter2"))
	holder := struct {
		S secret.Bytes
		P *secret.Bytes
	}{s, &s}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b", "%o"} {
		fmt.Fprintf(&out, verb+" "+verb+"\n", s, holder)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "s", s, "h", holder)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "s", s, "h", holder)
	if err := json.NewEncoder(&out).Encode(holder); err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{"hunter2", "68756e74657232", "68756E74657232", "aHVudGVyMg", "104 117"} {
		if strings.Contains(out.String(), form) {
			t.Errorf("printed as %q in:\n%s", form, out.String())
		}
	}
	if string(s.Reveal()) != "hunter2" || !s.Equal([]byte("hunter2")) || s.Equal([]byte("hunter")) {
		t.Error("the secret itself is wrong")
	}
}
