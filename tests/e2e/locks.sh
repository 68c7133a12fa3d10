#!/bin/bash
# One fleecefs for each SOURCE and FLEECE_DIR; QEMU is kept from writing past the mount.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-io >/dev/null || skip "needs qemu-io"
snaps=$mnt/snapshots
mkdir "$tmp/other" "$tmp/mnt2" "$src/dir"
truncate -s 4M "$src/a.img" "$src/dir/b.img" "$src/gone.img"
echo small >"$src/small"

writes() {
	timeout 20 qemu-io -f raw -c "write -P $((RANDOM % 256)) 64k 4k" "$1" >"$tmp/out" 2>&1 &&
		! grep -q 'error\|failed' "$tmp/out"
}

refused() {
	! writes "$1" || fail "qemu-io writes to $1, past the mount"
	grep -qi 'lock' "$tmp/out" || fail "refused for another reason: $(cat "$tmp/out")"
}

# A second mount with these options must fail, say so, and harm nothing.
second() {
	if timeout 30 "$fleecefs" "$@" </dev/null >"$tmp/out" 2>&1; then
		fail "a second mount: $*"
	fi
	grep -q 'another fleecefs' "$tmp/out" || fail "no clear message: $(cat "$tmp/out")"
	! mountpoint -q "$tmp/mnt2" || fail "a mount is left"
	writes "$mnt/a.img" || fail "the first mount suffered: $(cat "$tmp/out")"
}

step "a second fleecefs on the same SOURCE or FLEECE_DIR is refused"
mount_fg
second "$src" "$tmp/mnt2" --fleece-dir="$tmp/other"
second "$src" "$tmp/mnt2"
second "$tmp/other" "$tmp/mnt2" --fleece-dir="$fleece"
mkdir "$tmp/bound"
mount --bind "$src" "$tmp/bound"
second "$tmp/bound" "$tmp/mnt2" --fleece-dir="$tmp/other"
umount "$tmp/bound"

step "nor on one inside it, or around it; on the mount it is right"
second "$src/dir" "$tmp/mnt2" --fleece-dir="$tmp/other"
mkdir "$tmp/space b" "$tmp/space b/inner"
timeout 30 "$fleecefs" "$tmp/space b/inner" "$tmp/mnt2" --fleece-dir="$tmp/other" </dev/null
mkdir "$tmp/mnt3" "$tmp/third"
! timeout 30 "$fleecefs" "$tmp/space b" "$tmp/mnt3" --fleece-dir="$tmp/third" </dev/null >"$tmp/out" 2>&1 || fail "a SOURCE around another's"
grep -q "another fleecefs has $tmp/space b/inner mounted" "$tmp/out" || fail "$(cat "$tmp/out")"
timeout 30 "$fleecefs" "$tmp/space b" "$tmp/mnt3" --fleece-dir="$tmp/third" --source-lock=off </dev/null
umount_fs "$tmp/mnt3"
pids=$(daemons " $tmp/mnt2 ")
kill -KILL "$pids"
wait_for 20 gone "$pids"
timeout 30 "$fleecefs" "$tmp/space b" "$tmp/mnt3" --fleece-dir="$tmp/third" </dev/null || fail "one that is dead is in the way"
umount_fs "$tmp/mnt3"
umount -l "$tmp/mnt2"
timeout 30 "$fleecefs" "$mnt/dir" "$tmp/mnt2" --fleece-dir="$tmp/other" </dev/null
writes "$tmp/mnt2/b.img" || fail "on another's mount: $(cat "$tmp/out")"
umount_fs "$tmp/mnt2"

step "QEMU cannot write to a source; to the mount it can; reading is free"
refused "$src/a.img"
refused "$src/dir/b.img"
writes "$mnt/dir/b.img" || fail "$(cat "$tmp/out")"
mkdir "$snaps/one"
writes "$mnt/a.img"
refused "$src/a.img"
cp "$src/a.img" "$mnt/new.img"
refused "$src/new.img"
mv "$mnt/new.img" "$mnt/dir/moved.img"
refused "$src/dir/moved.img"
qemu-img info "$src/a.img" >/dev/null
qemu-img convert -f raw -O raw "$src/a.img" "$tmp/copy"
cmp "$tmp/copy" "$src/a.img"
timeout 20 qemu-io -r -f raw -c 'read 0 64k' "$src/a.img" >/dev/null

step "a fleecing image cannot be opened for writing, nor repaired"
image=$(echo "$fleece"/one/a.img-fleece-*.qcow2)
qemu-img check -q "$image"
qemu-img info --backing-chain "$image" >/dev/null
qemu-img convert -f qcow2 -O raw "$image" "$tmp/copy"
! qemu-img check -q -r all "$image" >"$tmp/out" 2>&1 || fail "qemu-img repairs an image in use"
! timeout 20 qemu-io -f qcow2 -c 'write 0 4k' "$image" >"$tmp/out" 2>&1 || fail "qemu-io writes to an image"
rmdir "$snaps/one"

step "a deleted disk's space is free, with and without a snapshot; so is a replaced one's"
open_deleted() {
	find "/proc/$daemon/fd" -lname "$src/*(deleted)" | wc -l
}
rm "$mnt/gone.img"
mv "$mnt/dir/moved.img" "$mnt/small"
wait_for 5 [ "$(open_deleted)" = 0 ] || fail "the daemon holds $(open_deleted) deleted files"
mkdir "$snaps/two"
rm "$mnt/small"
rmdir "$snaps/two"
wait_for 5 [ "$(open_deleted)" = 0 ] || fail "the daemon holds $(open_deleted) deleted files"
umount_fs
writes "$src/a.img" || fail "still locked after the unmount: $(cat "$tmp/out")"

step "a killed daemon holds no lock; an unmounted one is waited for"
mount_fg
kill -KILL "$daemon"
wait "$daemon" || true
writes "$src/a.img"
mount_fs
for i in 1 2 3 4 5 6 7 8; do
	[ $((i % 2)) = 0 ] || mkdir "$snaps/s"
	writes "$mnt/a.img"
	umount "$mnt"
	[ $((i % 2)) = 0 ] && dir=$fleece || dir=$tmp/other
	timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$dir" </dev/null || fail "round $i"
	[ ! -d "$snaps/s" ] || rmdir "$snaps/s"
done
umount_fs

step "--source-lock=off: the source may be written, and the mount shows at once what it has"
mount_fs --source-lock=off
writes "$src/a.img" || fail "$(cat "$tmp/out")"
python3 - "$src/a.img" "$mnt/a.img" <<'EOF' || fail "the mount shows what was there before"
import os, sys

source = os.open(sys.argv[1], os.O_RDWR)
live = os.open(sys.argv[2], os.O_RDWR)
for i in range(1, 30):
    size = os.lseek(live, 0, os.SEEK_END)
    os.pread(live, 65536, 0)
    os.pread(live, 65536, size - 4096)
    data = bytes([i]) * 4096
    os.pwrite(source, data, 4096 * (i % 8))
    os.pwrite(source, data, size)
    assert os.lseek(live, 0, os.SEEK_END) == size + 4096, "length"
    assert os.stat(sys.argv[2]).st_size == size + 4096, "length by name"
    assert os.pread(live, 8192, size) == data, "new end"
    assert os.pread(live, 4096, 4096 * (i % 8)) == data, "overwritten"
    os.pwrite(live, b"by the mount", 100)
    assert os.pread(source, 12, 100) == b"by the mount", "written through the mount"
    os.pwrite(source, b"past", 100)
    assert os.pread(live, 12, 100) == b"pasthe mount", "overwritten after a write through the mount"
sync = os.open(sys.argv[2], os.O_RDWR | os.O_SYNC | os.O_APPEND)
assert os.write(sync, b"odd") == 3 and os.fstat(source).st_size % 4096 == 3, "appended"
EOF
umount_fs
! timeout 20 "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" --source-lock=maybe 2>"$tmp/out" || fail "maybe?"
grep -q "source-lock=maybe" "$tmp/out"

step "a source that QEMU has open is reported"
mkfifo "$tmp/commands"
timeout 60 qemu-io -f raw "$src/a.img" <"$tmp/commands" >"$tmp/qemu" 2>&1 &
qemu=$!
children+=("$qemu")
exec 9>"$tmp/commands"
echo 'write 0 4k' >&9
wait_for 10 grep -q wrote "$tmp/qemu"
# (the daemon must not have the pipe, or QEMU would not see its end)
timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" </dev/null 2>"$tmp/err" 9>&- || fail "no mount: $(cat "$tmp/err")"
grep -q "a.img: another program" "$tmp/err" || fail "QEMU's disk is not named: $(cat "$tmp/err")"
! grep -q "b.img: another program" "$tmp/err" || fail "a wrong one is named"
exec 9>&-
wait "$qemu" || fail "QEMU has not ended by itself: $(cat "$tmp/qemu")"
umount_fs

step "with few descriptors the largest files are locked"
for i in $(seq 100); do echo "$i" >"$src/dir/small-$i"; done
# (a daemon that may not raise the limit)
timeout 60 setpriv --bounding-set=-sys_resource sh -c 'ulimit -n 160; exec "$@"' - \
	"$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" </dev/null 2>"$tmp/err"
grep -q "more files than descriptors" "$tmp/err" || fail "not said: $(cat "$tmp/err")"
refused "$src/a.img"
refused "$src/dir/b.img"
umount_fs
echo passed
