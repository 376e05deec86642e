package budget

import (
	"fmt"
	"testing"
	"time"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestBook(t *testing.T) {
	var b Book
	over := func(host string, at time.Duration) bool {
		_, over := b.Over(host, noon.Add(at))
		return over
	}
	b.Spend("records", Records-1, 10, noon)
	b.Spend("bytes", 1, Bytes-1, noon)
	b.Spend("other", 1, 1, noon)
	for _, host := range []string{"records", "bytes", "other", "unknown"} {
		if over(host, 0) {
			t.Errorf("%s is over its budget too early", host)
		}
	}
	b.Spend("records", 1, 0, noon.Add(30*time.Minute))
	b.Spend("bytes", 0, 1, noon.Add(30*time.Minute))
	for host, want := range map[string]bool{"records": true, "bytes": true, "other": false} {
		if over(host, 59*time.Minute) != want {
			t.Errorf("%s: over is not %v", host, want)
		}
		if over(host, time.Hour) {
			t.Errorf("%s: the hour doesn't end", host)
		}
	}
	list := b.Exceeded(noon.Add(40 * time.Minute))
	if len(list) != 2 || list[0].Host != "bytes" || list[0].Bytes != Bytes || list[1].Records != Records || !list[0].Until.Equal(noon.Add(time.Hour)) {
		t.Errorf("%+v", list)
	}
	if list := b.Exceeded(noon.Add(time.Hour)); len(list) != 0 {
		t.Errorf("after the hour: %+v", list)
	}
	// A clock that is set back by a day keeps nobody out for a day.
	if over("bytes", -24*time.Hour) {
		t.Error("over, yesterday")
	}
}

// What it keeps of hosts ends with their hour.
func TestBookForgets(t *testing.T) {
	var b Book
	for i := range 1000 {
		b.Spend(fmt.Sprint(i), 1, 1, noon)
	}
	b.Spend("late", 1, 1, noon.Add(Window))
	if len(b.hosts) != 1 {
		t.Errorf("%d accounts", len(b.hosts))
	}
}
