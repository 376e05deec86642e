//go:build unix

package bounded

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	for most, good := range map[int64]bool{4: false, 5: true, 6: true} {
		if b, err := ReadFile(name, most); (err == nil) != good || good && string(b) != "12345" {
			t.Errorf("at most %d: %q, %v", most, b, err)
		}
	}
	if _, err := ReadFile(t.TempDir(), 5); err == nil {
		t.Error("a folder is read")
	}
	if _, err := ReadFile("/dev/zero", 1000); err == nil {
		t.Error("a device without an end is read")
	}
}

// A pipe is read while somebody writes to it, slowly too, and not waited for
// otherwise.
func TestPipes(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := ReadFile(name, 100); err != nil || len(b) != 0 {
		t.Errorf("without a writer: %q, %v", b, err)
	}

	writer, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan string)
	go func() {
		b, err := ReadFile(name, 100)
		if err != nil {
			t.Error(err)
		}
		read <- string(b)
	}()
	for _, part := range []string{"one ", "two"} {
		time.Sleep(20 * time.Millisecond) // the reader waits
		if _, err := writer.WriteString(part); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond)
	_ = writer.Close()
	if got := <-read; got != "one two" {
		t.Errorf("read %q", got)
	}
}
