package event_test

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/test/check"
)

// A header is read without the detail, whatever texts before it hold.
func TestHeader(t *testing.T) {
	for line, want := range map[string]event.Record{
		`{"index":7,"time":"2026-01-02T03:04:05Z","kind":"a.b","actor":"broker","lease":"l","detail":{"kind":"x","index":9}}`: {Index: 7, Kind: "a.b", Actor: "broker", Lease: "l"},
		`{"index":7,"kind":"a.b","actor":"operator:x\",\"detail\":{","host":"h"}`:                                             {Index: 7, Kind: "a.b", Actor: `operator:x","detail":{`, Host: "h"},
		`{"index":7,"kind":"a.b","actor":"x"}`:                                                                                {Index: 7, Kind: "a.b", Actor: "x"},
	} {
		r, err := event.Header([]byte(line))
		if want.Time = r.Time; err != nil || !reflect.DeepEqual(r, want) {
			t.Errorf("%s: %+v, %v", line, r, err)
		}
	}
	if _, err := event.Header([]byte(`{"index":7,"kind"`)); err == nil {
		t.Error("half a record was read")
	}
}

// Records of brokers before this one are read, each as its kind's event, and what they
// say is said again: a log lives longer than a broker's version.
func TestOldRecords(t *testing.T) {
	lines := bytes.Split(bytes.TrimSpace(check.Must(os.ReadFile("testdata/records.jsonl"))(t)), []byte("\n"))
	if len(lines) < 40 {
		t.Fatalf("%d records", len(lines))
	}
	for _, line := range lines {
		r := check.Must(event.Parse(line))(t)
		e, err := r.Event()
		if err != nil {
			t.Error(err)
			continue
		}
		if _, unknown := e.(event.Unknown); unknown || e.Kind() != r.Kind {
			t.Errorf("%s is read as %T of kind %s", r.Kind, e, e.Kind())
		}

		var old any
		check.Nil(t, json.Unmarshal(r.Detail, &old))
		again := check.Must(json.Marshal(e))(t)
		for _, text := range texts(old) {
			if r.Kind != event.HostAdded && !bytes.Contains(again, check.Must(json.Marshal(text))(t)) {
				t.Errorf("%s: %q is lost in %s", r.Kind, text, again)
			}
		}
	}
}

// texts are the strings in a JSON value that aren't empty.
func texts(v any) (list []string) {
	switch v := v.(type) {
	case string:
		if v != "" {
			list = append(list, v)
		}
	case []any:
		for _, one := range v {
			list = append(list, texts(one)...)
		}
	case map[string]any:
		for _, one := range v {
			list = append(list, texts(one)...)
		}
	}
	return list
}

func TestOldHostsAndNames(t *testing.T) {
	added := check.Must(event.Record{Kind: event.HostAdded, Detail: []byte(`{"count":1,"hosts":[{"ID":"h1","Name":"web-1","State":"registered","EKs":["` + strings.Repeat("5f", 32) + `"],"Labels":{"env":"prod"},"Reference":"web"}]}`)}.Event())(t)
	if h := added.(*event.Added).Hosts[0]; h.ID != "h1" || h.Name != "web-1" || len(h.EKs) != 1 || h.Labels["env"] != "prod" || h.Reference != "web" {
		t.Errorf("host %+v", h)
	}
	ended := check.Must(event.Record{Kind: event.CredentialEnded, Detail: []byte(`{"state":"gone","accessor":"a1","vault_lease":"v1","serial":"7","names":null}`)}.Event())(t)
	if n := ended.(*event.Outcome).Names; n["vault_accessor"] != "a1" || n["vault_lease"] != "v1" || n["certificate_serial"] != "7" {
		t.Errorf("names %v", n)
	}
}

// What a later broker writes is told, and not passed over.
func TestLaterKinds(t *testing.T) {
	r := check.Must(event.Parse([]byte(`{"index":1,"time":"2026-01-02T03:04:05Z","kind":"host.sang","actor":"broker","more":1,"detail":{"song":"x"}}`)))(t)
	e := check.Must(r.Event())(t)
	if u, ok := e.(event.Unknown); !ok || u.Kind() != "host.sang" || string(u.Detail) != `{"song":"x"}` {
		t.Errorf("%#v", e)
	}
	if _, err := (event.Record{Kind: event.HostFailed, Detail: []byte(`{"check":7}`)}).Event(); err == nil || !strings.Contains(err.Error(), "host.failed") {
		t.Errorf("a detail of another form: %v", err)
	}
}

// Every constant of this package has an event, and every event says its kind.
func TestEveryKindHasItsEvent(t *testing.T) {
	source := string(check.Must(os.ReadFile("kinds.go"))(t))
	block, _, _ := strings.Cut(source, "// events makes")
	if named := strings.Count(block, " Kind = "); named == 0 || named != len(event.Kinds()) {
		t.Errorf("%d constants, and %d kinds that have an event", named, len(event.Kinds()))
	}
	for _, k := range event.Kinds() {
		if e := check.Must(event.Record{Kind: k, Detail: []byte(`{}`)}.Event())(t); e.Kind() != k {
			t.Errorf("%s is read as %T of kind %s", k, e, e.Kind())
		}
	}
}
