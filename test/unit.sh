#!/bin/sh
# The tests that start no service: those of packages that use nothing of the lab. Of what
# tries each place of a long input they take a sample (-short); `make test` tries all.
set -eu
cd "$(dirname "$0")/.."
format='{{$lab := false}}{{range .TestImports}}{{if eq . "github.com/countersign/countersign/test/lab"}}{{$lab = true}}{{end}}{{end}}{{range .XTestImports}}{{if eq . "github.com/countersign/countersign/test/lab"}}{{$lab = true}}{{end}}{{end}}{{if not $lab}}{{.ImportPath}}{{end}}'
# shellcheck disable=SC2046 # a list
go test -short "$@" $(go list -f "$format" ./attestors/... ./broker/... ./compensating/... ./hostagent/... ./internal/...)
