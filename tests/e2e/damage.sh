#!/bin/bash
# What is lost is never shown as something else: power failures, damaged images, full storage.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-img >/dev/null || skip "needs qemu-img"
snaps=$mnt/snapshots
head -c 2000001 /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/b.img"

# Reading file $1 must fail with EIO.
lost() {
	! cat "$1" >"$tmp/out" 2>"$tmp/err" || fail "$1 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "not EIO: $(cat "$tmp/err")"
}

overwrite() {
	head -c "${2:-300000}" /dev/urandom | dd of="$mnt/$1" bs=64k conv=notrunc status=none
}

# Kills the daemon and lets the next one believe that the machine has been started anew since.
lose_power() {
	kill -KILL "$daemon"
	wait "$daemon" || true
	umount "$mnt"
	sed -i "s/$(cat /proc/sys/kernel/random/boot_id)/00000000-0000-4000-8000-000000000000/" \
		"$fleece/.session"
}

step "power loss: a snapshot is listed, lost, and can be dropped"
mount_fg
mkdir "$snaps/night"
overwrite a.img
lose_power
mount_fs
find "$snaps" -mindepth 1 -name night | grep -q . || fail "the snapshot is not listed"
lost "$snaps/night/a.img"
cmp "$mnt/a.img" "$src/a.img"
rmdir "$snaps/night"
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs

step "power loss with --durable: nothing is lost"
mount_fg --durable
cp "$mnt/a.img" "$tmp/a.ref"
cp "$mnt/b.img" "$tmp/b.ref"
mkdir "$snaps/night"
overwrite a.img
lose_power
mount_fs --durable
cmp "$snaps/night/a.img" "$tmp/a.ref"
cmp "$snaps/night/b.img" "$tmp/b.ref"
rmdir "$snaps/night"
umount_fs

step "a damaged cluster is EIO, the others are right"
mount_fs
cp "$mnt/a.img" "$tmp/a.ref"
mkdir "$snaps/night"
overwrite a.img
umount_fs
image=$(images night a.img)
offset=$(qemu-img map -f qcow2 --output=json "$image" | python3 -c '
import json, sys
print(next(r["offset"] for r in json.load(sys.stdin) if r["data"] and r["depth"] == 0))')
printf '\377\000\377\000' | dd of="$image" bs=1 seek=$((offset + 100)) conv=notrunc status=none
mount_fs
lost "$snaps/night/a.img"
dd if="$snaps/night/a.img" bs=4096 skip=200 status=none | cmp - <(tail -c +$((200 * 4096 + 1)) "$tmp/a.ref")
cmp "$snaps/night/b.img" "$src/b.img"
rmdir "$snaps/night"
umount_fs

step "an image that is no image stops nothing but its disk"
mount_fs
mkdir "$snaps/night"
overwrite a.img
umount_fs
head -c 70000 /dev/urandom | dd of="$(images night a.img)" conv=notrunc status=none
mount_fs
lost "$snaps/night/a.img"
cmp "$snaps/night/b.img" "$src/b.img"
rmdir "$snaps/night"
umount_fs

step "fleece-limit reached, break-snapshot: the guest goes on, that disk's view breaks"
mount_fs --fleece-limit=600K
mkdir "$snaps/night"
cp "$mnt/b.img" "$tmp/b.ref"
overwrite a.img 1500000
cmp "$mnt/a.img" "$src/a.img"
lost "$snaps/night/a.img"
cmp "$snaps/night/b.img" "$tmp/b.ref"
umount_fs
mount_fs
lost "$snaps/night/a.img"
rmdir "$snaps/night"
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs

step "fleece-limit reached, break-guest-write: the write fails, the view stays"
mount_fs --fleece-limit=600K --on-cbw-error=break-guest-write
mkdir "$snaps/night"
cp "$src/a.img" "$tmp/a.ref"
! overwrite a.img 1500000 2>"$tmp/err" || fail "the write went through"
grep -q 'No space left' "$tmp/err" || fail "not ENOSPC: $(cat "$tmp/err")"
cmp "$snaps/night/a.img" "$tmp/a.ref"
rmdir "$snaps/night"
overwrite a.img 1500000
umount_fs

step "full storage: the same with a filesystem that has no space left"

mount -t tmpfs -o size=3m,mode=700 tmpfs "$fleece"
mount_fs --fleece-reserve=0
cp "$src/b.img" "$tmp/b.ref"
mkdir "$snaps/night"
for _ in 1 2 3 4; do
	overwrite a.img 2000001
	truncate -s 4000000 "$mnt/a.img"
	rmdir "$snaps/night"
	mkdir "$snaps/night"
	head -c 6M /dev/zero >"$fleece/ballast" 2>/dev/null || true
	overwrite a.img 2000001
	rm "$fleece/ballast"
	lost "$snaps/night/a.img"
	cmp "$snaps/night/b.img" "$tmp/b.ref"
done
rmdir "$snaps/night"
umount_fs
