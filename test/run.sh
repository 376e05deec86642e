#!/bin/sh
# All tests with the race detector, and a line as each package ends; bin/test.json has the
# whole output. The virtual machine has a target of its own, `make test-vm`.
set -u
cd "$(dirname "$0")/.."
mkdir -p bin
go build -o bin/report ./test/report || exit 1
# shellcheck disable=SC2046 # a list
{ go test -race -timeout 40m -json "$@" $(go list ./... | grep -v '/test/vm$') 2>&1 || echo '{"Action":"fail","Package":"go test"}'; } | bin/report bin/test.json
