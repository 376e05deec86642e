#!/bin/sh
# Formatting, vet and staticcheck of both builds, and the agent for every system
# that it is for.
set -eu
cd "$(dirname "$0")/.."

unformatted=$(git ls-files '*.go' | xargs gofmt -l)
if [ -n "$unformatted" ]; then
	echo "gofmt would change:" >&2
	echo "$unformatted" >&2
	exit 1
fi
go mod verify >/dev/null
go vet ./...
go vet -tags faults ./broker/... ./hostagent/... ./test/...
(cd test/vaultd && go vet .)
go tool staticcheck ./...
agent="./hostagent/... ./broker/api/... ./attestors/evidence ./attestors/process/... ./attestors/tpm ./attestors/tpm/collect ./attestors/boot ./attestors/boot/collect ./attestors/ima ./attestors/ima/collect"
for target in linux/amd64 linux/arm64 windows/amd64; do
	# shellcheck disable=SC2086 # a list
	GOOS=${target%/*} GOARCH=${target#*/} CGO_ENABLED=0 go vet $agent
	GOOS=${target%/*} GOARCH=${target#*/} CGO_ENABLED=0 go build -o /dev/null ./hostagent/cmd/countersign-agent
done
# The servers and their tools compile where their developers may sit; they run on Linux.
# shellcheck disable=SC2046 # a list
GOOS=darwin GOARCH=arm64 CGO_ENABLED=0 go build $(GOOS=darwin GOARCH=arm64 go list ./broker/... ./compensating/... ./internal/... ./attestors/...)
echo "lint: clean"
