#!/bin/bash
# fleecectl and files that are damaged at random.
#
#   ctl_damage.sh FLEECEFS FLEECECTL [OPTIONS of ctl_damage.py]
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

ctl=$(realpath "${2:?"the path of fleecectl"}")
shift 2
head -c 600000 /dev/urandom >"$src/a.img"
mkdir "$src/sub"
head -c 100001 /dev/urandom >"$src/sub/b.img"
mount_fs
for name in one two; do
	mkdir "$mnt/snapshots/$name"
	dd if=/dev/urandom of="$mnt/a.img" bs=4k count=30 seek=$RANDOM oflag=seek_bytes conv=notrunc status=none
	dd if=/dev/zero of="$mnt/sub/b.img" bs=4k count=2 conv=notrunc status=none
done
umount_fs
/usr/bin/env python3 "$here/ctl_damage.py" "$fleece" "$ctl" "$@"
