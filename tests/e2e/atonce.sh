#!/bin/bash
# Writers, readers, freezes, drops, checkpoints, holes in frozen files and increments, all at once on one
# disk: what is read is right or, where it was given up, an error; and so it is after a mount and a kill.
#
#   atonce.sh FLEECEFS [SECONDS [SEED]]
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-img >/dev/null || skip "needs qemu-img"
seconds=${2:-8}
seed=${3:-$RANDOM}
echo "seed $seed"
atonce() {
	/usr/bin/env python3 "$here/atonce.py" "$@"
}

atonce make "$src/disk"
mount_fs
atonce run "$mnt" "$tmp/state" "$seconds" "$seed"
atonce check "$mnt" "$tmp/state"
check_images
umount_fs
check_images
mount_fs
atonce check "$mnt" "$tmp/state"
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
umount -l "$mnt"
mount_fs
atonce check "$mnt" "$tmp/state"
check_images
for snapshot in "$mnt"/snapshots/*; do
	rmdir "$snapshot"
done
[ -z "$(find "$fleece" -mindepth 1 -not -name '.*')" ] || fail "$(find "$fleece")"
umount_fs
