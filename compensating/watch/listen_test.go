package watch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// What is sent is on the disk when it is answered, and is read after a kill.
func TestSensorsThatListen(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	write(t, token, []byte("s3cret\n"), os.O_TRUNC)
	socket, address := filepath.Join(dir, "vault.sock"), freeAddress(t)
	c := &Config{StateDir: filepath.Join(dir, "state"), Governed: []string{"svc-*"}, Sensors: []Sensor{
		{Kind: "ocsf", Name: "siem", Listen: "http://" + address, TokenFile: token}, {Kind: "postgres-json", Name: "db", Listen: "unix://" + socket}}}
	open := func() *Watch {
		w, err := Open(c, away, slog.New(slog.DiscardHandler), time.Now)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := open()
	ctx, cancel := context.WithCancel(t.Context())
	for _, s := range w.sensors {
		if err := s.listen(ctx, s.spool, w.log); err != nil {
			t.Fatal(err)
		}
	}
	post := func(bearer, body string) int {
		req, err := http.NewRequest(http.MethodPost, "http://"+address, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+bearer)
		a, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = a.Body.Close()
		return a.StatusCode
	}
	const event = `{"class_uid": 3002, "activity_id": 1, "time": 1772366400000,
		"status_id": 1, "user": {"name": "svc-%s"}, "src_endpoint": {"ip": "10.0.0.1"}}`
	for body, want := range map[string]int{fmt.Sprintf(event, "a"): http.StatusNoContent, "[" + fmt.Sprintf(event, "b") + "," + fmt.Sprintf(event, "c") + "]": http.StatusNoContent,
		strings.Repeat("x", maxBody+1): http.StatusRequestEntityTooLarge} {
		if got := post("s3cret", body); got != want {
			t.Errorf("%d bytes: %d, want %d", len(body), got, want)
		}
	}
	if got := post("wrong", fmt.Sprintf(event, "d")); got != http.StatusUnauthorized {
		t.Errorf("a wrong token: %d", got)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, `{"timestamp":"2026-03-01 12:00:00.010 UTC","user":"svc-e","dbname":"db","pid":7,"session_id":"1","error_severity":"LOG","message":"connection authorized: user=svc-e database=db"}`+"\n"+`{"times`); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		files, _ := filepath.Glob(filepath.Join(c.StateDir, "spool", "db", "*.log"))
		if len(files) == 1 {
			if text, _ := os.ReadFile(files[0]); strings.HasSuffix(string(text), "{\"times\n") {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing came: %v", files)
		}
	}
	cancel()
	w.Close() // killed before it looked

	w = open()
	defer w.Close()
	if err := w.pollNow(); err != nil {
		t.Fatal(err)
	}
	for _, s := range w.sensors {
		s.reader.Flush(func(seen sightings.Sighting) {
			if err := w.see(s.queue, seen, w.now()); err != nil {
				t.Error(err)
			}
		})
	}
	w.synced = time.Now().Add(time.Hour)
	if err := errors.Join(w.settleNow(), w.save()); err != nil {
		t.Fatal(err)
	}
	accounts := map[string]int{}
	for _, f := range w.book {
		if f.Detector == detect.UnmatchedLogin {
			accounts[f.Account] += f.Count
		}
	}
	if fmt.Sprint(accounts) != "map[svc-a:1 svc-b:1 svc-c:1 svc-e:1]" {
		t.Errorf("found %v", accounts)
	}
	if left, _ := filepath.Glob(filepath.Join(c.StateDir, "spool", "*", "*.log")); len(left) > 0 {
		t.Errorf("read, and still there: %v", left)
	}
}

func TestASpoolIsBounded(t *testing.T) {
	s, err := openSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s.waiting = maxSpool - 3
	if err := s.write([]byte("ab\n")); err != nil {
		t.Fatal(err)
	}
	if err := s.write([]byte("c\n")); !errors.Is(err, errSpoolFull) {
		t.Errorf("%v, want %v", err, errSpoolFull)
	}
}

// A line that is too long ends no stream: what comes after it is there.
func TestReceiveLongLine(t *testing.T) {
	dir := t.TempDir()
	to, err := openSpool(dir)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", tail.MaxLine+700_000)
	if err := receive(strings.NewReader("first\n"+long+"\nsecond\n"+long), to); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(to.pattern)
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		got = append(got, fmt.Sprint(len(line), line[:min(len(line), 7)]))
	}
	if want := fmt.Sprintf("[6first\n %dxxxxxxx 7second\n %dxxxxxxx]", tail.MaxLine+1, tail.MaxLine+1); fmt.Sprint(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
}
