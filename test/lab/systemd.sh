# Becomes a systemd container, in a mount namespace that unshare has made. It
# runs with the directory to mount on, the container's name, and then arguments
# for systemd-nspawn.
set -eu
dir=$1
name=$2
shift 2

# Unified cgroups whatever the machine uses, and a cgroup of the container's own.
if mountpoint -q /sys/fs/cgroup; then
	umount -R -l /sys/fs/cgroup
fi
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$name"
echo $$ >"/sys/fs/cgroup/$name/cgroup.procs"

# The machine's own root, with every change in memory.
mount -t tmpfs -o mode=0755 tmpfs "$dir"
mkdir "$dir/upper" "$dir/work" "$dir/$name"
root=$dir/$name
mount -t overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" overlay "$root"

# Nothing of the machine's services, mounts and timers starts in it: only the
# journal, the bus, and logins for user managers.
for units in "$root/etc/systemd/system" "$root/lib/systemd/system"; do
	find "$units/" \( -path '*.wants/*' -o -path '*.requires/*' \) -delete
done
rm -f "$root"/usr/lib/systemd/system-generators/* "$root"/etc/systemd/system-generators/*
: >"$root/etc/fstab"
wants=$root/etc/systemd/system/multi-user.target.wants
mkdir -p "$wants"
for unit in dbus.socket systemd-journald.socket systemd-journald-dev-log.socket systemd-journald.service systemd-logind.service; do
	ln -s "/lib/systemd/system/$unit" "$wants/$unit"
done

# nspawn keeps its own state here; it stays in this namespace.
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn

exec systemd-nspawn --quiet --directory="$root" --machine="$name" --boot --register=no --keep-unit --console=pipe \
	--capability=CAP_CHECKPOINT_RESTORE --link-journal=no --resolv-conf=off --timezone=off "$@" systemd.unit=multi-user.target
