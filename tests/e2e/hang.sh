#!/bin/bash
# Fleece storage that hangs: a guest waits for a save as long as cbw-timeout says, and no longer.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in mkfs.ext4 fsfreeze losetup; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
head -c 3M /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/b.img"
truncate -s 256M "$tmp/storage"
mkfs.ext4 -q "$tmp/storage"
mkdir "$tmp/slow"
mount -o loop "$tmp/storage" "$tmp/slow" || skip "no loop device"
fleece=$tmp/slow/fleece
trap 'status=$?; trap - ERR; set +e; fsfreeze -u "$tmp/slow" 2>/dev/null; (exit $status); cleanup' EXIT

# Overwrites 64 KiB of a.img at 64 KiB × $1; how long it took is in $took, its status in $status.
overwrite() {
	local begin=$SECONDS
	status=0
	timeout 30 dd if=/dev/urandom of="$mnt/a.img" bs=64k count=1 seek="$1" conv=notrunc status=none \
		2>"$tmp/err" || status=$?
	took=$((SECONDS - begin))
}

# Seconds are whole, and the machine may be busy.
waited_two() {
	if [ "$took" -lt 1 ] || [ "$took" -gt 8 ]; then
		fail "the guest waited for $took s, and not for 2"
	fi
}

step "break-snapshot: the guest goes on, the view of that disk is lost"
cp "$src/b.img" "$tmp/b.ref"
mount_fg --cbw-timeout=2
mkdir "$snaps/s"
fsfreeze -f "$tmp/slow"
overwrite 1
[ "$status" = 0 ] || fail "the guest's write fails: $(cat "$tmp/err")"
waited_two
overwrite 2
[ "$took" -le 1 ] || fail "the guest waits again, for a view that is lost"
fsfreeze -u "$tmp/slow"
! cat "$snaps/s/a.img" >/dev/null 2>"$tmp/err" || fail "the lost view is read"
grep -q 'Input/output error' "$tmp/err"
cmp "$snaps/s/b.img" "$tmp/b.ref"
umount_fs
mount_fg --cbw-timeout=2
! cat "$snaps/s/a.img" >/dev/null 2>&1 || fail "the lost view is read after a new mount"
cmp "$snaps/s/b.img" "$tmp/b.ref"
rmdir "$snaps/s"
umount_fs

step "full and hanging storage: the guest does not wait longer"
mount_fg --cbw-timeout=2
mkdir "$snaps/s"
umount_fs
mount_fg --cbw-timeout=2 --fleece-reserve=1T
fsfreeze -f "$tmp/slow"
overwrite 1
[ "$status" = 0 ] || fail "the guest's write fails: $(cat "$tmp/err")"
waited_two
fsfreeze -u "$tmp/slow"
! cat "$snaps/s/a.img" >/dev/null 2>&1 || fail "the lost view is read"
rmdir "$snaps/s"
umount_fs

step "break-guest-write: the guest's write fails, the views stay right"
cp "$src/a.img" "$tmp/a.ref"
mount_fg --cbw-timeout=2 --on-cbw-error=break-guest-write
mkdir "$snaps/s"
fsfreeze -f "$tmp/slow"
overwrite 4
[ "$status" != 0 ] || fail "the guest's write succeeds, and its old data was not saved"
waited_two
fsfreeze -u "$tmp/slow"
cmp "$snaps/s/a.img" "$tmp/a.ref"
overwrite 4
[ "$status" = 0 ]
cmp "$snaps/s/a.img" "$tmp/a.ref"
rmdir "$snaps/s"
umount_fs
[ -z "$(images)" ] || fail "images are left: $(images)"
umount "$tmp/slow"
