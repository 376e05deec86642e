package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"countersign": func() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) },
		"report":      report,
	})
}

// The scripts drive the real main: what it prints, and its exit codes.
func TestScripts(t *testing.T) {
	vectors, err := filepath.Abs("../../../test/vectors/boots")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{Dir: "testdata", Setup: func(e *testscript.Env) error {
		e.Setenv("VECTORS", vectors)
		return nil
	}})
}
