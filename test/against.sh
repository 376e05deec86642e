#!/bin/sh
# Builds a program of another commit, as bin/against/NAME, from a worktree that is removed
# again: sh test/against.sh COMMIT ./broker/cmd/countersign
set -eu

commit=$(git rev-parse --verify "$1^{commit}")
tree=$(mktemp -d /var/tmp/countersign-against-XXXXXX)
trap 'git worktree remove --force "$tree"' EXIT
trap 'exit 130' INT TERM # through the EXIT trap

git worktree add --quiet --detach "$tree" "$commit"
out=$PWD/bin/against/$(basename "$2")
(cd "$tree" && CGO_ENABLED=0 "${GO:-go}" build -trimpath -ldflags "-s -w -X main.version=$commit" -o "$out" "$2")
