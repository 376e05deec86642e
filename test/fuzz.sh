#!/bin/sh
# Every fuzz target of the module, one after the other, for as many inputs (3000x) or
# as long (10m) as given.
set -eu
cd "$(dirname "$0")/.."
time=${1:-3000x}
for file in $(git ls-files '*_test.go' | xargs grep -lE '^func Fuzz'); do
	for target in $(sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p' "$file"); do
		if ! out=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "./${file%/*}" 2>&1); then
			echo "$out"
			echo "fuzz: $target in ${file%/*} failed"
			exit 1
		fi
		echo "fuzz: $target in ${file%/*}: nothing found in $time"
	done
done
