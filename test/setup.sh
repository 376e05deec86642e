#!/bin/sh
# Makes a Debian machine ready for the tests and the demo: installs the packages
# that they run against, and builds the development Vault (test/vaultd) unless
# vault or bao is installed. Doing it twice does nothing the second time.
#
#   test/setup.sh          make ready
#   test/setup.sh --where  print where the development Vault belongs, do nothing
#
# It speaks on stderr.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/countersign
sources=$(cd "$here/vaultd" && sha256sum go.mod go.sum ./*.go | sha256sum | cut -c1-16)
vaultd=$cache/vaultd-$sources

if [ "${1-}" = --where ]; then
	echo "$vaultd"
	exit
fi

trap 'exit 130' INT TERM # through the EXIT traps below

say() { echo "setup: $*" >&2; }

# What each is for: the software TPM and tools that look into it; the database,
# a pooler before it and a clock that is off for it; a systemd to boot, with its
# user managers; TLS and SSH; the network tools; what builds packages; what makes
# signed cabinets; and what a cloud recipe in the docs calls, with a pipe to a TPM.
packages="swtpm swtpm-tools tpm2-tools postgresql pgbouncer libfaketime systemd systemd-sysv
systemd-container libpam-systemd dbus openssl openssh-server openssh-client iproute2 util-linux procps rpm xz-utils zstd
gcab osslsigncode jq socat"

missing=
for package in $packages; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ]; then
		say "please install, as root: apt-get install$missing"
		exit 1
	fi
	say "installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	# PostgreSQL's package would make and start a cluster of its own.
	no_cluster=/etc/postgresql-common/createcluster.d/countersign.conf
	trap 'rm -f "$no_cluster"' EXIT
	mkdir -p "${no_cluster%/*}"
	echo 'create_main_cluster = false' >"$no_cluster"
	apt-get -q -o DPkg::Lock::Timeout=300 update >&2
	# shellcheck disable=SC2086 # one word a package
	apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install $missing >&2
	rm -f "$no_cluster"
fi

if command -v vault >/dev/null || command -v bao >/dev/null || [ -x "$vaultd" ]; then
	exit
fi
mkdir -p "$cache"
exec 9>"$cache/vaultd.lock"
flock 9
if [ ! -x "$vaultd" ]; then
	say "no vault or bao in PATH: building a development Vault, once, in about six minutes"
	new=$vaultd.$$
	trap 'rm -f "$new"' EXIT
	(cd "$here/vaultd" && CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$new" .) >&2
	mv "$new" "$vaultd"
	say "built $vaultd"
fi
