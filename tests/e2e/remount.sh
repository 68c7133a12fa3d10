#!/bin/bash
# The filesystem of the fleecing images is mounted anew between two mounts of ours. Where it failed, it
# has lost what it had not written, though the boot is the same: views are right or say that they are
# lost, never anything else. Where nothing was lost, nothing is given up.
#
#   remount.sh FLEECEFS [KIND…]     ext4 xfs btrfs clean namespaces thin
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in mkfs.ext4 losetup unshare; do
	command -v $tool >/dev/null || skip "needs $tool"
done
kinds=("${@:2}")
[ ${#kinds[@]} -gt 0 ] || kinds=(ext4 xfs btrfs clean namespaces thin)
snaps=$mnt/snapshots
storage=$tmp/storage
fleece=$storage/fleece
mkdir "$storage" "$tmp/fast"
mount -t tmpfs -o size=700m tmpfs "$tmp/fast"
mount -t tmpfs tmpfs "$src"
disk=$tmp/fast/image

mount_storage() {
	mount -o loop "$disk" "$storage" 2>"$tmp/err"
}

new_storage() {
	truncate -s 400M "$disk"
	case $1 in
	ext4) mkfs.ext4 -q -F -E lazy_itable_init=0 "$disk" ;;
	thin) # all that is its own lies in the first half, and is there
		head -c 100M /dev/zero >"$disk"
		mkfs.ext4 -q -F -b 4096 -O ^has_journal -E nodiscard,lazy_itable_init=0 "$disk"
		;;
	xfs | btrfs) "mkfs.$1" -q -f "$disk" >/dev/null ;;
	esac
	mount_storage || skip "no loop device: $(cat "$tmp/err")"
	head -c 3000001 /dev/urandom >"$src/a.img"
	head -c 500000 /dev/urandom >"$src/b.img"
}

old_storage() {
	umount_fs
	umount "$storage"
	rm "$disk"
}

kill_daemon() {
	kill -KILL "$daemon"
	wait "$daemon" 2>/dev/null || true
	umount "$mnt"
}

freeze() {
	mkdir "$snaps/$1"
	cp "$src/a.img" "$tmp/fast/$1.a"
	cp "$src/b.img" "$tmp/fast/$1.b"
}

right() {
	cmp "$snaps/$1/a.img" "$tmp/fast/$1.a"
	cmp "$snaps/$1/b.img" "$tmp/fast/$1.b"
}

overwrite() {
	dd if=/dev/urandom of="$mnt/a.img" bs=4k seek="$1" count="$2" conv=notrunc status=none
}

lost() {
	! timeout 20 cat "$1" >/dev/null 2>"$tmp/err" || fail "$1 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "$1: not EIO: $(cat "$tmp/err")"
}

# From now on nothing reaches the disk any more; what was written is still in memory.
break_storage() {
	if [ "$1" = btrfs ]; then # which cannot be told to
		head -c 1G /dev/zero >"$tmp/fast/ballast" 2>/dev/null || true
		sync -f "$storage" 2>/dev/null || true
	else
		python3 "$here/storage.py" shutdown "$storage"
	fi
}

fails() {
	local type=$1
	shift
	step "$type fails and is mounted again: $*"
	new_storage "$type"
	mount_fg --fleece-reserve=0 "$@"
	freeze one
	overwrite 0 10
	sync -f "$storage"
	overwrite 100 300
	freeze two
	overwrite 300 400
	break_storage "$type"
	kill_daemon
	umount "$storage"
	rm -f "$tmp/fast/ballast"
	mount_storage || fail "$(cat "$tmp/err")"
	mount_fg --fleece-reserve=0 "$@"
	case "$*" in
	*durable*)
		right one
		right two
		;;
	*)
		lost "$snaps/one/a.img"
		[ ! -e "$snaps/two" ] || lost "$snaps/two/a.img"
		;;
	esac
	[ ! -e "$snaps/two" ] || rmdir "$snaps/two"
	rmdir "$snaps/one"
	freeze three
	overwrite 0 500
	right three
	rmdir "$snaps/three"
	[ -z "$(images)" ] || fail "images are left: $(images)"
	old_storage
}

clean() {
	step "a clean end, and another mount of the filesystem"
	new_storage ext4
	mount_fg
	freeze one
	overwrite 0 100
	mkdir "$snaps/two"
	overwrite 100 400
	overwrite 50 50
	rmdir "$snaps/two" # its image stays for one, and gives up what one has
	umount_fs
	umount "$storage"
	mount_storage
	: >"$tmp/log"
	mount_fg --log-level=warning
	right one
	[ ! -s "$tmp/log" ] || fail "there is nothing to say: $(cat "$tmp/log")"
	rmdir "$snaps/one"
	old_storage
}

namespaces() {
	step "killed, and started in another mount namespace, by another way to the same filesystem"
	new_storage ext4
	mount_fg
	freeze one
	overwrite 0 500
	kill_daemon
	# shellcheck disable=SC2016
	unshare -m --propagation private bash -c '
		mount --bind "$2" "$2" && mount --bind "$3" "$3" &&
		mkdir -p "$6" && mount --bind "$3" "$6" &&
		"$1" "$2" "$4" --fleece-dir="$6/fleece" && cmp "$4/snapshots/one/a.img" "$5" &&
		umount "$4"' - "$fleecefs" "$src" "$storage" "$mnt" "$tmp/fast/one.a" "$tmp/elsewhere" >"$tmp/log" 2>&1 ||
		fail "$(cat "$tmp/log")"
	wait_for 60 eval "[ -z \"\$(daemons $mnt)\" ]" || fail "the daemon stays"
	mount_fg
	right one
	rmdir "$snaps/one"
	old_storage
}

# Blocks that the device does not take: the filesystem goes on, and has lost them.
thin() {
	step "what was saved cannot be written back, which the end finds out"
	new_storage thin
	mount_fg --fleece-reserve=0
	freeze one
	overwrite 0 100
	head -c 60M /dev/zero >"$storage/ballast"
	sync -f "$storage"
	fallocate -p -o 80M -l 20M "$disk"
	head -c 1G /dev/zero >"$tmp/fast/ballast" 2>/dev/null || true
	overwrite 100 600
	umount_fs || true
	grep -q 'clean end could not be recorded' "$tmp/log" || fail "it ends as if nothing were wrong: $(cat "$tmp/log")"
	rm "$tmp/fast/ballast"
	mount_fg --fleece-reserve=0
	lost "$snaps/one/a.img"
	rmdir "$snaps/one"
	old_storage
}

for kind in "${kinds[@]}"; do
	case $kind in
	clean | namespaces | thin) "$kind" ;;
	*)
		if ! command -v "mkfs.$kind" >/dev/null || ! grep -qw "$kind" /proc/filesystems; then
			echo "left out: $kind"
			continue
		fi
		fails "$kind"
		[ "$kind" = btrfs ] || fails "$kind" --durable
		;;
	esac
done
