#!/bin/bash
# Space given back while a backup reads: what goes, what stays, what is refused; with real tools.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in setfattr getfattr fallocate setpriv tar; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
ctl=$(dirname "$fleecefs")/fleecectl
head -c 160M /dev/urandom >"$src/vm.img"
truncate -s 100M "$src/sparse.img"
head -c 20777 /dev/urandom >"$src/odd.img"
for i in 0 30 60 90; do
	dd if=/dev/urandom of="$src/sparse.img" bs=1M seek=$i count=5 conv=notrunc status=none
done
chmod 644 "$src"/*.img

attr() {
	getfattr --only-values --absolute-names -n "user.fleecefs.$1" "$snaps/$2"
}

overwrite() {
	dd if=/dev/urandom of="$mnt/vm.img" bs=64k seek="$1" count="$2" conv=notrunc status=none
}

used() {
	du -sm "$fleece" | cut -f 1
}

# MiB $2 of file $1 cannot be read. Not what the kernel has of it, which is right.
lost() {
	forget "$snaps/$1"
	refused 'Input/output error' dd if="$snaps/$1" bs=1M skip="$2" count=1 of=/dev/null
}

as() {
	setpriv --reuid=54321 --regid=54321 --clear-groups "$@"
}

step "tar of a snapshot that consumes"
mount_fs -o allow_other
mkdir "$snaps/one"
cp --sparse=always "$src/vm.img" "$src/sparse.img" "$tmp"
overwrite 0 2000
before=$(used)
[ "$before" -gt 120 ] || fail "$before MiB are used"
refused 'Permission denied' as setfattr -n user.fleecefs.consume -v 1 "$snaps/one"
setfattr -n user.fleecefs.consume -v 1 "$snaps/one"
[ "$(attr consume one/vm.img)" = 1 ] || fail "$(attr consume one/vm.img)"
mkdir "$tmp/restored"
tar -C "$snaps/one" -cSf - . | tar -C "$tmp/restored" -xSf -
cmp "$tmp/vm.img" "$tmp/restored/vm.img"
cmp "$tmp/sparse.img" "$tmp/restored/sparse.img"
[ "$(used)" -lt $((before - 70)) ] || fail "$(used) MiB of $before are used"
given=$(($(attr released one/vm.img) >> 20))
{ [ "$given" -ge 80 ] && [ "$given" -le 96 ]; } || fail "$given MiB were given up"
[ "$(attr state one)" = ok ] || fail "one is $(attr state one)"
lost one/vm.img 0
lost one/vm.img 79
cmp -i $((100 << 20)) "$tmp/vm.img" "$snaps/one/vm.img"

step "writes there save nothing"
was=$(attr preserved one)
overwrite 0 1000
[ "$(attr preserved one)" = "$was" ] || fail "$(attr preserved one) bytes are preserved, $was were"
lost one/vm.img 3
check_images

step "an older snapshot keeps what it needs"
mkdir "$snaps/two"
cp "$src/vm.img" "$tmp/two"
mkdir "$snaps/three"
setfattr -n user.fleecefs.consume -v 1 "$snaps/three/vm.img"
overwrite 0 2000
cat "$snaps/three/vm.img" >/dev/null
lost three/vm.img 0
cmp "$snaps/two/vm.img" "$tmp/two"

step "holes by hand"
setfattr -n user.fleecefs.consume -v 0 "$snaps/one"
refused 'Read-only file system' fallocate -p -o 100M -l 10M "$snaps/one/vm.img"
refused 'Read-only file system' fallocate -p -o 100M -l 10M "$snaps/two/vm.img"
setfattr -n user.fleecefs.consume -v 1 "$snaps/two/vm.img"
fallocate -p -o 100M -l 10M "$snaps/two/vm.img"
lost two/vm.img 105
# A page that the kernel has, and of which a part is left, would be filled up with zeros.
cat "$snaps/two/odd.img" >/dev/null
setfattr -n user.fleecefs.consume -v 1 "$snaps/two/odd.img"
for range in '474 9000' '4096 5000' '4095 1' '0 20777' '16384 4393'; do
	refused 'Invalid argument' fallocate -p -o "${range% *}" -l "${range#* }" "$snaps/two/odd.img"
	cmp "$snaps/two/odd.img" "$src/odd.img"
done
fallocate -p -o 4096 -l 4096 "$snaps/two/odd.img"
fallocate -p -o 16384 -l 8192 "$snaps/two/odd.img"
for i in 1 4 5; do
	refused 'Input/output error' dd if="$snaps/two/odd.img" bs=4096 skip=$i count=1 of=/dev/null
done
cmp -n 4096 "$snaps/two/odd.img" "$src/odd.img"
cmp -i 8192 -n 8192 "$snaps/two/odd.img" "$src/odd.img"
refused 'Read-only file system' fallocate -z -o 1M -l 1M "$snaps/two/vm.img"
refused 'Read-only file system' fallocate -o 1M -l 1M "$snaps/two/vm.img"
refused 'Read-only file system' truncate -s 1M "$snaps/two/vm.img"
refused 'Read-only file system' dd if=/dev/zero of="$snaps/two/vm.img" bs=1M count=1 conv=notrunc
refused 'Read-only file system' dd if=/dev/zero of="$snaps/two/vm.img" bs=1M count=1
/usr/bin/env python3 - "$snaps/two/vm.img" <<'END' || fail "a frozen page can be written"
import mmap, os, sys

fd = os.open(sys.argv[1], os.O_RDWR)
try:
    page = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
except OSError:
    sys.exit(0)
page[0:4] = b"evil"
page.flush()
sys.exit(1)
END
setfattr -n user.fleecefs.consume -v 0 "$snaps/two/vm.img"
cmp -n $((100 << 20)) "$snaps/two/vm.img" "$tmp/two"
cmp -i $((110 << 20)) "$snaps/two/vm.img" "$tmp/two"
chmod 666 "$mnt/vm.img"
mkdir "$snaps/four"
setfattr -n user.fleecefs.consume -v 1 "$snaps/four/vm.img"
# one that was opened while it was allowed
exec 9<>"$snaps/four/vm.img"
setfattr -n user.fleecefs.consume -v 0 "$snaps/four/vm.img"
refused 'Read-only file system' /usr/bin/env python3 -c 'import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.fallocate64(9, 3, ctypes.c_long(1 << 20), ctypes.c_long(1 << 20)):
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))'
exec 9<&-
setfattr -n user.fleecefs.consume -v 1 "$snaps/four/vm.img"
refused 'Permission denied' as fallocate -p -o 1M -l 1M "$snaps/four/vm.img"
cmp "$snaps/four/vm.img" "$src/vm.img"

step "unmount, and a kill"
overwrite 1600 160
umount_fs
"$ctl" check "$fleece" >"$tmp/err" || fail "$(cat "$tmp/err")"
"$ctl" gc --dry-run "$fleece" >"$tmp/err"
grep -q ': 0 to remove' "$tmp/err" || fail "$(cat "$tmp/err")"
"$ctl" map --fleece-dir "$fleece" two/vm.img >"$tmp/err"
grep -q '^given up, or changed and not kept: 10M$' "$tmp/err" || fail "$(cat "$tmp/err")"
"$ctl" map --fleece-dir "$fleece" four/vm.img >"$tmp/err"
grep -q '^preserved 10M, ' "$tmp/err" || fail "$(cat "$tmp/err")"
grep -q '^given up, or changed and not kept: [89][0-9]M$' "$tmp/err" || fail "$(cat "$tmp/err")" # cmp read it
mount_fs
lost one/vm.img 0
lost two/vm.img 105
cmp -n $((100 << 20)) "$snaps/two/vm.img" "$tmp/two"
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
umount -l "$mnt"
mount_fs
lost two/vm.img 105
lost three/vm.img 0
cmp -n $((100 << 20)) "$snaps/two/vm.img" "$tmp/two"
mkdir "$snaps/three/.checkpoint"
cmp -i $((110 << 20)) "$snaps/two/vm.img" "$tmp/two"
for i in one two three four; do
	rmdir "$snaps/$i"
done
[ -z "$(find "$fleece" -mindepth 1 -not -name '.*')" ] || fail "$(find "$fleece")"
umount_fs
