// Package check is what the tests say most often, in a word.
package check

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// Must gives the value, or ends the test: check.Must(f())(t).
func Must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// Nil ends the test on an error.
func Nil(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// Silent wants an error that has the words in it, and not the secret.
func Silent(t testing.TB, err error, secret string, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
	if strings.Contains(err.Error(), secret) {
		t.Errorf("the error has the secret in it: %v", err)
	}
}

// Within is a context that ends after d, or with the test.
func Within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// Eventually polls until done, and fails with what it last said.
func Eventually(t testing.TB, d time.Duration, what string, done func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		ok, said := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s; last: %s", d, what, said)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
