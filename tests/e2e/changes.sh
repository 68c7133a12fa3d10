#!/bin/bash
# Every way of changing a file leaves the frozen bytes alone: each is done to a disk of its own that
# two snapshots cover, through the mount; then everything is compared, also after a new mount.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-img >/dev/null || skip "needs qemu-img"

for size in 4K 64K; do
	step "clusters of $size"
	rm -rf "${src:?}"/* "$tmp/model"
	mount_fs --cluster-size="$size"
	python3 "$here/changes.py" "$mnt" "$tmp/model"
	check_images
	for disk in write truncate-down unlink rename-over exchange-a copy-range punch; do
		check_convert first "$disk.img" "$tmp/model/first/$disk.img"
	done
	umount_fs
	mount_fs --cluster-size="$size"
	for snap in first second; do
		same_tree "$tmp/model/$snap" "$mnt/snapshots/$snap"
	done
	rmdir "$mnt/snapshots/first"
	same_tree "$tmp/model/second" "$mnt/snapshots/second"
	rmdir "$mnt/snapshots/second"
	[ -z "$(images)" ] || fail "images are left: $(images)"
	umount_fs
	kept=$(find "$src/.fleecefs" -type f 2>/dev/null || true)
	[ -z "$kept" ] || fail "disks kept aside are left: $kept"
	rm -rf "$src/.fleecefs"
	same_tree "$tmp/model/live" "$src"
done
