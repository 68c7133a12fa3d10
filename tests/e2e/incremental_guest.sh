#!/bin/bash
# Ten nights of a real guest, as in guest.sh: fleece-backup --incremental while it works. Each night's restore replays its
# journal, passes e2fsck, and holds exactly what the guest had acknowledged when it was frozen.
#
#   incremental_guest.sh FLEECEFS [NIGHTS]
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=tests/e2e/backup_lib.sh
. "$here/backup_lib.sh"
# shellcheck source=tests/e2e/guest_lib.sh
. "$here/guest_lib.sh"

truncate -s 96M "$src/guest.img"
mkfs.ext4 -q -F "$src/guest.img"
mount_fs

step "nights"
python3 "$here/incremental_guest.py" --root "$tmp/root" --live "$mnt" --disk guest.img --work "$tmp" --out "$tmp/out" \
	--script "$script" --nights "${2:-10}"
umount_fs

step "each of them restored"
mkdir "$tmp/view"
while read -r folder acked begun; do
	"$script" --restore "$tmp/out" "$folder" guest.img "$tmp/copy" --quiet
	status=0
	e2fsck -fy "$tmp/copy" >"$tmp/replay" 2>&1 || status=$?
	[ "$status" -le 1 ] || fail "$folder: journal replay: $(cat "$tmp/replay")"
	e2fsck -fn "$tmp/copy" >"$tmp/replay" 2>&1 || fail "$folder is not clean after journal replay: $(cat "$tmp/replay")"
	mount -o loop,ro "$tmp/copy" "$tmp/view" || skip "no loop device to look into the copy"
	python3 "$here/busy.py" check "$tmp/view/ops" "$tmp/guest.log" --acked "$acked" --begun "$begun"
	umount "$tmp/view"
	rm "$tmp/copy"
	echo "$folder: good"
done <"$tmp/nights"
