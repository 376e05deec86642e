#!/bin/sh
# All tests with the race detector. A skipped test is a failure: every part that
# a test needs is one that test/setup.sh installs. The virtual machine has a target
# of its own, `make test-vm`.
set -u
cd "$(dirname "$0")/.."
log=bin/test.log
go test -race -timeout 40m -v "$@" $(go list ./... | grep -v '/test/vm$') >"$log" 2>&1
status=$?
grep -E '^(ok|FAIL|panic:|--- FAIL|    --- FAIL|WARNING: DATA RACE)' "$log"
if grep -qE '^ *--- SKIP' "$log"; then
	echo "skipped tests count as failed:"
	grep -E '^ *--- SKIP' "$log"
	status=1
fi
if [ $status -ne 0 ]; then
	echo "test: failed; the whole output, of which the end follows, is in $log"
	grep -vE '^(=== (RUN|PAUSE|CONT)|ok|--- PASS|    --- PASS|PASS|\?)' "$log" | tail -n 150
fi
exit $status
