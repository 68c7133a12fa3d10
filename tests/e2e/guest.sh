#!/bin/bash
# A real guest: a Debian kernel under QEMU (emulated, so that it runs anywhere) works on ext4 on a
# live file with cache=none, while a snapshot of its disk is made, copied with tar and dropped. The
# copy must replay its journal, pass e2fsck and hold exactly what the guest had acknowledged.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# shellcheck source=tests/e2e/guest_lib.sh
. "$here/guest_lib.sh"

step "mount fleecefs over an ext4 disk"
truncate -s 96M "$src/guest.img"
mkfs.ext4 -q -F "$src/guest.img"
mount_fs

step "boot the guest"
python3 "$here/guest.py" --root "$tmp/root" --live "$mnt" --disk guest.img --work "$tmp"

step "journal replay and e2fsck of the copy"
copy=$tmp/copy/guest.img
cmp "$copy" "$tmp/frozen.img" || fail "tar's copy and a second reading of the frozen file differ"
status=0
e2fsck -fy "$copy" >"$tmp/replay" 2>&1 || status=$?
[ "$status" -le 1 ] || fail "journal replay: $(cat "$tmp/replay")"
e2fsck -fn "$copy" || fail "the copy is not clean after journal replay"

step "content of the copy"
mkdir "$tmp/view"
mount -o loop,ro "$copy" "$tmp/view" || skip "no loop device to look into the copy"
read -r acked begun <"$tmp/marks"
python3 "$here/busy.py" check "$tmp/view/ops" "$tmp/guest.log" --acked "$acked" --begun "$begun"
umount "$tmp/view"

step "end"
[ -z "$(images)" ] || fail "the dropped snapshot left images: $(images)"
umount_fs
status=0
e2fsck -fy "$src/guest.img" >/dev/null 2>&1 || status=$?
[ "$status" -le 1 ] || fail "the guest's own disk is damaged"
