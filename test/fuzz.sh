#!/bin/sh
# Every fuzz target of the module, one after the other, for the time given.
set -eu
cd "$(dirname "$0")/.."
time=${1:-3s}
for file in $(git ls-files '*_test.go' | xargs grep -lE '^func Fuzz'); do
	for target in $(sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p' "$file"); do
		echo "fuzz: $target in ${file%/*} for $time"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "./${file%/*}" | grep -vE '^(fuzz: elapsed|PASS|ok)' || true
	done
done
