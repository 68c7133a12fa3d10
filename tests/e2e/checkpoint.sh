#!/bin/bash
# Checkpoints as users meet them: what is given back and what is refused, who may, what survives.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in setfattr getfattr setpriv fallocate; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
ctl=$(dirname "$fleecefs")/fleecectl
head -c 16M /dev/urandom >"$src/vm.img"
mkdir "$src/d"
echo small >"$src/d/x"

# The state of snapshot $1, or of a file in it.
state() {
	getfattr --only-values --absolute-names -n user.fleecefs.state "$snaps/$1"
}

overwrite() {
	dd if=/dev/urandom of="$mnt/vm.img" bs=4k seek="$1" count="$2" conv=notrunc status=none
}

used() {
	du -sk "$fleece" | cut -f 1
}

is_checkpoint() {
	[ "$(state "$1")" = checkpoint ] || fail "$1 is $(state "$1")"
	[ "$(state "$1/vm.img")" = checkpoint ] || fail "$1/vm.img is $(state "$1/vm.img")"
	refused 'Input/output error' cat "$snaps/$1/vm.img"
	[ "$(stat -c '%s %a' "$snaps/$1/vm.img")" = "$((16 << 20)) 644" ] || fail "$(stat "$snaps/$1/vm.img")"
	[ "$(find "$snaps/$1" -mindepth 1 -printf '%P\n' | sort | tr '\n' ' ')" = 'd d/x vm.img ' ] ||
		fail "$(ls -AR "$snaps/$1")"
	[ -d "$snaps/$1/.checkpoint" ] || fail "$1 has no .checkpoint"
	[ -z "$(ls -A "$snaps/$1/.checkpoint")" ] || fail "$1/.checkpoint is not empty"
}

step "mkdir .checkpoint"
mount_fs -o allow_other
mkdir "$snaps/one"
overwrite 0 1000
cp "$src/vm.img" "$tmp/before"
overwrite 1000 1000
[ "$(used)" -gt 7000 ] || fail "$(used) KiB are used"
[ ! -e "$snaps/one/.checkpoint" ] || fail "it is one already"
exec 9<"$snaps/one/vm.img"
refused 'Device or resource busy' mkdir "$snaps/one/.checkpoint"
[ "$(state one)" = ok ] || fail "one is $(state one)"
cmp -n $((4 << 20)) -i $((8 << 20)) "$snaps/one/vm.img" "$mnt/vm.img"
cat <&9 >/dev/null
exec 9<&-
mkdir "$snaps/one/.checkpoint"
is_checkpoint one
[ "$(used)" -lt 200 ] || fail "$(used) KiB are used"
refused 'File exists' mkdir "$snaps/one/.checkpoint"
refused 'Read-only file system' rmdir "$snaps/one/.checkpoint"
refused 'Read-only file system' mkdir "$snaps/one/.checkpoint/x"
refused 'Read-only file system' mkdir "$snaps/one/d/.checkpoint"
refused 'Read-only file system' touch "$snaps/one/vm.img"
check_images

step "writes copy nothing for it"
overwrite 0 4000
[ "$(used)" -lt 200 ] || fail "$(used) KiB are used"
cat "$mnt/.fleecefs/status.json" >"$tmp/status"
grep -q '"state": *"checkpoint"' "$tmp/status" || fail "$(cat "$tmp/status")"
grep -q 'fleecefs_snapshot_state{snapshot="one",fleecefs_snapshot_state="checkpoint"} 1' "$mnt/.fleecefs/metrics" ||
	fail "$(grep _state "$mnt/.fleecefs/metrics")"

step "setfattr, and what it refuses"
mkdir "$snaps/two"
cp "$src/vm.img" "$tmp/two"
overwrite 100 50
cmp "$snaps/two/vm.img" "$tmp/two"
refused 'Invalid argument' setfattr -n user.fleecefs.checkpoint -v 0 "$snaps/two"
refused 'Read-only file system' setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/two/vm.img"
refused 'Read-only file system' setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/two/d"
refused 'Read-only file system' setfattr -n user.fleecefs.other -v 1 "$snaps/two"
refused 'Read-only file system' setfattr -x user.fleecefs.checkpoint "$snaps/two"
as() {
	setpriv --reuid=54321 --regid=54321 --clear-groups "$@"
}
# neither the kernel's rights nor those of snapshots/ alone are enough
refused 'Permission denied' as mkdir "$snaps/two/.checkpoint"
chmod 777 "$mnt"
mkdir "$snaps/three"
refused 'Permission denied' as mkdir "$snaps/three/.checkpoint"
refused 'Permission denied' as setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/three"
[ "$(state three)" = ok ] || fail "three is $(state three)"
chmod 777 "$snaps"
as setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/three"
chmod 755 "$snaps" "$mnt"
is_checkpoint three
cmp "$snaps/two/vm.img" "$tmp/two"
setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/two"
setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/two"
is_checkpoint two
mv "$snaps/two" "$snaps/2"
is_checkpoint 2
mv "$snaps/2" "$snaps/two"
rmdir "$snaps/three"

step "increments against checkpoints"
mkdir -p "$tmp/chain/base" "$tmp/chain/next" "$tmp/chain/last"
mkdir "$snaps/base"
cp "$snaps/base/.since/-/vm.img.qcow2" "$tmp/chain/base"
overwrite 50 70
mkdir "$snaps/base/.checkpoint"
overwrite 100 200
overwrite 3000 5
mkdir "$snaps/next"
cp "$src/vm.img" "$tmp/next"
cp "$snaps/next/.since/base/vm.img.qcow2" "$tmp/chain/next"
overwrite 0 20
mkdir "$snaps/next/.checkpoint"
overwrite 110 20
rmdir "$snaps/base"
mkdir "$snaps/last"
cp "$src/vm.img" "$tmp/last"
overwrite 0 4000
cp "$snaps/last/.since/next/vm.img.qcow2" "$tmp/chain/last"
[ "$(stat -c %s "$tmp/chain/next/vm.img.qcow2")" -lt 2000000 ] || fail "$(ls -l "$tmp"/chain/*)"
[ "$(stat -c %s "$tmp/chain/last/vm.img.qcow2")" -lt 500000 ] || fail "$(ls -l "$tmp"/chain/*)"
for i in next last; do
	qemu-img check -q "$tmp/chain/$i/vm.img.qcow2"
	qemu-img convert -O raw "$tmp/chain/$i/vm.img.qcow2" "$tmp/out"
	cmp "$tmp/out" "$tmp/$i"
done
refused 'Input/output error' cp "$snaps/next/.since/-/vm.img.qcow2" "$tmp/out"
rmdir "$snaps/next" "$snaps/last"

step "unmount, and a kill"
umount_fs
"$ctl" check "$fleece" >"$tmp/err" || fail "$(cat "$tmp/err")"
"$ctl" list "$fleece" >"$tmp/err"
[ "$(grep -c ' checkpoint ' "$tmp/err")" = 2 ] || fail "$(cat "$tmp/err")"
"$ctl" map --fleece-dir "$fleece" one/vm.img >"$tmp/err"
grep -q '^preserved 0, ' "$tmp/err" || fail "$(cat "$tmp/err")"
grep -q '^given up, or changed and not kept: 1[0-9]M$' "$tmp/err" || fail "$(cat "$tmp/err")"
mv "$fleece/one/vm.img-fleece-1.dirty" "$tmp/ledger"
! "$ctl" check "$fleece" >"$tmp/err" || fail "a missing ledger is not seen"
grep -q 'one/vm.img-fleece-1.qcow2: its record of changes is missing' "$tmp/err" || fail "$(cat "$tmp/err")"
cp "$tmp/ledger" "$fleece/one/vm.img-fleece-1.dirty"
printf x | dd of="$fleece/one/vm.img-fleece-1.dirty" bs=1 seek=4101 conv=notrunc status=none
! "$ctl" check "$fleece" >"$tmp/err" || fail "a damaged ledger is not seen"
grep -q 'one/vm.img-fleece-1.qcow2: its record of changes is damaged' "$tmp/err" || fail "$(cat "$tmp/err")"
cp --sparse=always "$tmp/ledger" "$fleece/one/vm.img-fleece-1.dirty"
mount_fs
is_checkpoint one
is_checkpoint two
overwrite 2000 10
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
umount -l "$mnt"
mount_fs
is_checkpoint one
is_checkpoint two
mkdir "$snaps/three"
cp "$src/vm.img" "$tmp/three"
overwrite 0 300
cmp "$snaps/three/vm.img" "$tmp/three"

step "a power failure"
power_fails() {
	pid=$(daemons " $mnt ")
	kill -KILL "$pid"
	wait_for 20 gone "$pid"
	umount -l "$mnt"
	sed -i '1s/.*/00000000-0000-0000-0000-000000000000/' "$fleece/.session"
}
power_fails
mount_fs --durable
mkdir "$snaps/after"
refused 'Input/output error' cat "$snaps/after/.since/one/vm.img.qcow2"
rmdir "$snaps/after"
for i in one two three; do
	[ "$(state $i)" = torn ] || fail "$i is $(state $i)"
	rmdir "$snaps/$i"
done
mkdir "$snaps/four"
overwrite 0 300
mkdir "$snaps/four/.checkpoint"
overwrite 200 300
power_fails
mount_fs
is_checkpoint four
rmdir "$snaps/four"
[ -z "$(find "$fleece" -mindepth 1 -not -name '.*')" ] || fail "$(find "$fleece")"
umount_fs

step "storage that is full is full no more"
wide=$fleece
fleece=$tmp/full
mkdir "$fleece"
mount -t tmpfs -o size=4M,mode=700 none "$fleece"
mount_fs --fleece-reserve=0 --on-cbw-error=break-guest-write
mkdir "$snaps/full"
! overwrite 0 4000 2>/dev/null || fail "16 MiB fit into 4"
head -c 4M /dev/zero >"$fleece/filler" 2>/dev/null || : # what a cluster did not fit into
[ "$(state full)" = ok ] || fail "full is $(state full)"
mkdir "$snaps/full/.checkpoint"
rm "$fleece/filler"
is_checkpoint full
[ "$(used)" -lt 200 ] || fail "$(used) KiB are used"
check_images
overwrite 0 4000
mkdir "$snaps/next"
changed=$(/usr/bin/env python3 -c 'import json, sys; print(json.load(sys.stdin)["disks"][1]["changed_bytes"])' \
	<"$snaps/next/.since/full/changes.json")
[ "$changed" = $((4000 * 4096)) ] || fail "$changed bytes have changed"
rmdir "$snaps/full" "$snaps/next"
umount_fs
umount "$fleece"
fleece=$wide

step "a single-threaded mount, and a reader about to close"
mount_fs -s
mkdir "$snaps/five"
overwrite 0 10
for _ in 1 2 3 4 5; do
	cat "$snaps/five/vm.img" >/dev/null
done
setfattr -n user.fleecefs.checkpoint -v 1 "$snaps/five"
is_checkpoint five
rmdir "$snaps/five"
umount_fs
