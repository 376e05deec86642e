#!/bin/sh
# Makes a Debian machine ready for the virtual machine of test/vm: installs QEMU
# and its firmware, and fetches what the machine boots: Debian's signed shim,
# GRUB and kernel, with the modules of its network card. Doing it twice does
# nothing the second time.
#
#   test/vm/setup.sh          make ready
#   test/vm/setup.sh --where  print where the boot files belong, do nothing
#
# It speaks on stderr.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/countersign
boot=$cache/vm-$(sha256sum "$here/setup.sh" | cut -c1-16)

if [ "${1-}" = --where ]; then
	echo "$boot"
	exit
fi

trap 'exit 130' INT TERM # through the EXIT trap below

say() { echo "setup: $*" >&2; }

# What each is for: the machine; its firmware, with Secure Boot and Microsoft's
# keys; its disk (partitions, FAT, ext4); the order of its modules; and one
# process a connection between its network and the broker.
packages="qemu-system-x86 ovmf fdisk mtools e2fsprogs kmod netcat-openbsd"

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
	apt-get -q -o DPkg::Lock::Timeout=300 update >&2
	# shellcheck disable=SC2086 # one word a package
	apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install $missing >&2
fi

mkdir -p "$cache"
exec 9>"$cache/vm.lock"
flock 9
[ ! -d "$boot" ] || exit 0

# The packages are taken apart, never installed: they would change how this
# machine boots.
say "fetching the signed shim, GRUB and kernel of Debian"
new=$boot.$$
trap 'rm -rf "$new"' EXIT
mkdir -p "$new/modules"
cd "$new"
download() { apt-get -q -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root download "$@" >&2; }
kernel_package() { apt-cache depends linux-image-cloud-amd64 | sed -n 's/^  Depends: \(linux-image-[0-9]\)/\1/p'; }
if [ -z "$(kernel_package)" ] || ! download shim-signed grub-efi-amd64-signed "$(kernel_package)"; then
	apt-get -q -o DPkg::Lock::Timeout=300 update >&2
	download shim-signed grub-efi-amd64-signed "$(kernel_package)"
fi
for package in ./*.deb; do
	dpkg-deb -x "$package" files
	rm "$package"
done
mv files/usr/lib/shim/shimx64.efi.signed shimx64.efi
mv files/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed grubx64.efi
mv files/boot/vmlinuz-* vmlinuz

# The modules, numbered in the order in which they are loaded.
version=$(ls files/lib/modules)
PATH=$PATH:/usr/sbin:/sbin
depmod -b files "$version"
number=100
for name in virtio_pci virtio_net; do
	for module in $(modprobe -d files -S "$version" --show-depends "$name" | sed -n 's/^insmod //p'); do
		set -- modules/*-"${module##*/}"
		[ ! -e "$1" ] || continue
		number=$((number + 1))
		cp "$module" "modules/$number-${module##*/}"
	done
done
rm -r files
mv "$new" "$boot"
say "fetched $boot"
