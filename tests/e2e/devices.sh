#!/bin/bash
# Block devices served as files: loop devices, by symlinks in SOURCE. Which symlinks are served and
# which are not; snapshots of a device that is written; what becomes of them when the device was
# changed, replaced, resized or detached; and who else may use it meanwhile.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

snaps=$mnt/snapshots
name=/dev/fleecefs-e2e-$$
fleecectl=$(dirname "$fleecefs")/fleecectl

# Attaches $tmp/$1.img, of $2 MiB, as $name-$1; the loop device is in $loop.
attach() {
	[ -e "$tmp/$1.img" ] || head -c "$2"M /dev/urandom >"$tmp/$1.img"
	loop=$(losetup --find --show "$tmp/$1.img" 2>"$tmp/err") || skip "no loop device: $(cat "$tmp/err")"
	loops+=("$loop")
	links+=("$name-$1")
	ln -sfn "${loop#/dev/}" "$name-$1"
}

mount_dev() {
	mount_fg --device="$name-*" "$@"
}

end() {
	umount_fs
	wait "$daemon" || fail "the daemon ends with $?: $(tail -3 "$tmp/log")"
}

# Is frozen file $1 what file $2 is, or (with eio) not to be read at all?
frozen_is() {
	cmp "$snaps/$1" "$2" || fail "$1 is not what it was when it was frozen"
}
frozen_gone() {
	if cat "$snaps/$1" >"$tmp/got" 2>"$tmp/err"; then
		fail "$1 can be read"
	fi
	grep -q 'Input/output error' "$tmp/err" || fail "not EIO: $(cat "$tmp/err")"
	[ ! -s "$tmp/got" ] || fail "$1 gives $(stat -c %s "$tmp/got") bytes, then EIO"
}

attach a 24
a=$loop
[ -e "/sys/block/${a#/dev/}/diskseq" ] || skip "this kernel does not number its disks"
attach b 8
b=$loop

step "which symlinks are files, and which stay symlinks"
ln -s "$name-a" "$src/a"
ln -s "$name-a" "$src/same"
ln -s "$name-b" "$src/b"
echo "a file" >"$src/file"
plain=(relative dots double other null file-link loop foreign dir-link through)
ln -s "../../../../../../..$name-b" "$src/relative"
ln -s "/dev/../$name-b" "$src/dots"
ln -s "/dev/$name-b" "$src/double"
ln -s "$b" "$src/other" # no pattern names it
ln -s "$name-null" "$src/null"
ln -s "$name-file" "$src/file-link"
ln -s "$name-loop" "$src/loop"
ln -s "$name-b" "$src/foreign"
chown -h 12345 "$src/foreign"
ln -s "$name-dir" "$src/dir-link"
ln -s "$name-a/b" "$src/through"
links+=("$name-null" "$name-file" "$name-loop" "$name-dir")
ln -s null "$name-null"
ln -s "$src/file" "$name-file"
ln -s "$name-loop" "$name-loop"
ln -s . "$name-dir"
mount_dev
for f in a same b; do
	[ "$(stat -c '%F %h' "$mnt/$f")" = "regular file 1" ] || fail "$f: $(stat "$mnt/$f")"
done
for f in "${plain[@]}"; do
	[ -L "$mnt/$f" ] || fail "$f: $(stat "$mnt/$f")"
	[ "$(readlink "$mnt/$f")" = "$(readlink "$src/$f")" ] || fail "$f leads elsewhere"
done
[ "$(find "$mnt" -maxdepth 1 -type f | sort | tr '\n' ' ')" = "$mnt/a $mnt/b $mnt/file $mnt/same " ] ||
	fail "find sees $(find "$mnt" -maxdepth 1 -type f)"
[ "$(stat -c %s "$mnt/a")" = $((24 << 20)) ] || fail "a has $(stat -c %s "$mnt/a") bytes"
[ "$(stat -c %i "$mnt/a")" = "$(stat -c %i "$mnt/same")" ] || fail "two symlinks to a device are two files"
[ "$(stat -c %a:%U:%G "$mnt/a")" = "$(stat -c %a:%U:%G "$a")" ] || fail "mode and owner are not the device's"
cmp "$mnt/a" "$tmp/a.img"

step "a freeze shows files; what is not there makes it fail"
mkdir "$snaps/s"
frozen_is s/a "$tmp/a.img"
frozen_is s/same "$tmp/a.img"
frozen_is s/b "$tmp/b.img"
for f in "${plain[@]}"; do
	[ -L "$snaps/s/$f" ] || fail "$f is frozen as $(stat -c %F "$snaps/s/$f")"
done
[ "$(images s a | wc -l)$(images s same | wc -l)" = 10 ] || [ "$(images s a | wc -l)$(images s same | wc -l)" = 01 ] ||
	fail "one device has $(images | wc -l) images"
ln -s "$name-missing" "$src/missing"
! mkdir "$snaps/t" 2>/dev/null || fail "frozen without a device that should be there"
grep -q "missing: the block device that this symlink leads to.*not there" "$tmp/log" || fail "it is not said why"
if [ -e "$snaps/t" ] || [ -e "$fleece/t" ]; then fail "something is left of it"; fi
rm "$src/missing"
for f in "${plain[@]}"; do
	rm "$src/$f"
done
rmdir "$snaps/s"

step "a size that cannot change"
not() {
	local expected=$1
	shift
	if "$@" >/dev/null 2>"$tmp/err"; then fail "it works: $*"; fi
	grep -q "$expected" "$tmp/err" || fail "$* says $(cat "$tmp/err")"
}
not 'Operation not permitted' truncate -s 1M "$mnt/b"
not 'Operation not permitted' truncate -s 64M "$mnt/b"
truncate -s 8M "$mnt/b"
not 'No space left' dd if=/dev/zero of="$mnt/b" bs=1M seek=8 count=1 conv=notrunc
not 'No space left' dd if=/dev/zero of="$mnt/b" bs=3M seek=2 count=1 conv=notrunc
not 'No space left' dd if=/dev/zero of="$mnt/b" oflag=append bs=512 count=1 conv=notrunc
not 'No space left' fallocate -l 9M "$mnt/b"
fallocate -l 8M "$mnt/b"
[ "$(stat -c %s "$mnt/b")" = $((8 << 20)) ] || fail "b has another size now"
cmp -n $((6 << 20)) "$mnt/b" "$tmp/b.img"
cmp <(tail -c 2M "$mnt/b") <(head -c 2M /dev/zero)

step "random changes, in the page cache and past it, by the mount and, with nothing frozen, behind it"
python3 "$here/devices.py" "$mnt/a" "$a" "$snaps" ${STEPS:+--steps "$STEPS"} ${SEED:+--seed "$SEED"}

step "restored by cp with holes, dd, qemu-img: not a byte of before is left"
cp "$a" "$tmp/before"
mkdir "$snaps/s"
{ head -c 1M /dev/zero && head -c 2M /dev/urandom && head -c 21M /dev/zero; } >"$tmp/backup"
fallocate --dig-holes "$tmp/backup"
cp --sparse=always "$tmp/backup" "$mnt/a"
cmp "$mnt/a" "$tmp/backup"
cmp "$a" "$tmp/backup"
dd if="$tmp/before" of="$mnt/a" bs=1M conv=notrunc,fsync status=none
cmp "$a" "$tmp/before"
qemu-img convert -n -f raw -O raw "$tmp/backup" "$mnt/a"
cmp "$a" "$tmp/backup"
frozen_is s/a "$tmp/before"

step "the image alone, with the device behind it, is the frozen disk"
qemu-img check -q "$(images s a)$(images s same)"
qemu-img convert -f qcow2 -O raw "$(images s a)$(images s same)" "$tmp/converted"
cmp "$tmp/converted" "$tmp/before"
"$fleecectl" check "$fleece" >"$tmp/out" 2>&1 || fail "fleecectl: $(cat "$tmp/out")"

step "incremental images of it, and its checksum"
cp "$a" "$tmp/old"
mkdir "$snaps/old"
dd if=/dev/urandom of="$mnt/a" bs=4k count=3 seek=100 conv=notrunc status=none
dd if=/dev/zero of="$mnt/a" bs=4k count=200 seek=256 conv=notrunc status=none
mkdir "$snaps/new"
cp "$a" "$tmp/new"
dd if=/dev/urandom of="$mnt/a" bs=1M count=3 conv=notrunc status=none
qemu-img convert -f qcow2 -O raw "$snaps/new/.since/-/a.qcow2" "$tmp/converted"
cmp "$tmp/converted" "$tmp/new"
cp "$snaps/new/.since/old/a.qcow2" "$tmp/incr.qcow2"
cp "$tmp/old" "$tmp/full.raw"
qemu-img rebase -u -f qcow2 -F raw -b full.raw "$tmp/incr.qcow2"
qemu-img check -q "$tmp/incr.qcow2"
qemu-img convert -f qcow2 -O raw "$tmp/incr.qcow2" "$tmp/converted"
cmp "$tmp/converted" "$tmp/new"
[ "$(stat -c %s "$tmp/incr.qcow2")" -lt $((2 << 20)) ] || fail "$(stat -c %s "$tmp/incr.qcow2") bytes for 203 clusters"
(cd "$snaps/new" && grep ' a$' .xxh128 | xxhsum -c --quiet)
rmdir "$snaps/old" "$snaps/new"
cp "$tmp/backup" "$mnt/a"

step "nobody else: no mount, no other fleecefs, no QEMU that writes"
not 'busy' mount -o ro "$a" "$tmp"
if timeout 20 qemu-io -f host_device -c 'write 0 4k' "$a" >"$tmp/out" 2>&1 && ! grep -qi lock "$tmp/out"; then
	fail "QEMU writes to the device: $(cat "$tmp/out")"
fi
cmp "$a" "$tmp/backup"

step "unmounted and mounted again"
end
"$fleecectl" check "$fleece" >"$tmp/out" 2>&1 || fail "fleecectl: $(cat "$tmp/out")"
mount_dev
frozen_is s/a "$tmp/before"
mtime=$(stat -c %.9Y "$snaps/s/a")
mkdir "$snaps/t"
mkdir "$snaps/u"
[ "$(stat -c %.9Y "$snaps/t/a")" = "$(stat -c %.9Y "$snaps/u/a")" ] || fail "unchanged, and another mtime"
[ "$(stat -c %.9Y "$snaps/t/a")" != "$mtime" ] || fail "what was done while it was not mounted is nobody's"
rmdir "$snaps/t" "$snaps/u"
before=$(stat -c %.9Y:%.9Z "$mnt/a")
printf x | dd of="$mnt/a" bs=1 seek=5000 conv=notrunc status=none
[ "$(stat -c %.9Y:%.9Z "$mnt/a")" != "$before" ] || fail "written, and the same times"
before=$(stat -c %.9Y:%.9Z "$mnt/a")
fallocate -p -o 8192 -l 4096 "$mnt/a"
[ "$(stat -c %.9Y:%.9Z "$mnt/a")" != "$before" ] || fail "punched, and the same times"

step "killed while it is written"
cp "$a" "$tmp/now"
mkdir "$snaps/killed"
sleep 1.2 # until it is noted that it lives
(while dd if=/dev/urandom of="$mnt/a" bs=64k seek=$((RANDOM % 300)) count=16 conv=notrunc status=none; do :; done) 2>/dev/null &
children+=($!)
sleep 0.5
kill -KILL "$daemon"
{ wait "$daemon" || true; } 2>/dev/null
umount "$mnt" || umount -l "$mnt"
mount_dev
frozen_is s/a "$tmp/before"
frozen_is killed/a "$tmp/now"
rmdir "$snaps/killed"

step "a symlink that goes leaves the frozen disk; led elsewhere, it is another disk"
rm "$mnt/a" "$mnt/same"
frozen_is s/a "$tmp/before"
ln -s "$name-b" "$mnt/a"
cmp "$mnt/a" "$b"
frozen_is s/a "$tmp/before"
end
mount_dev
frozen_is s/a "$tmp/before"
cmp "$mnt/a" "$b"
end
ln -sfn "$name-a" "$src/a"

step "written while it was not mounted: lost, and said"
mount_dev
mkdir "$snaps/w"
end
printf x | dd of="$a" bs=1 seek=5000 conv=notrunc,fsync status=none
mount_dev
frozen_gone w/a
frozen_gone s/a
grep -q 'changed while fleecefs was not mounted' "$tmp/log"
rmdir "$snaps/w"
mkdir "$snaps/w"
echo 0 >"/sys/block/${a#/dev/}/queue/iostats" # where nothing is counted, nothing shows
end
mount_dev
echo 1 >"/sys/block/${a#/dev/}/queue/iostats"
frozen_gone w/a
cmp "$snaps/w/b" "$b"
rmdir "$snaps/w" "$snaps/s"
[ -z "$(images)" ] || fail "images are left: $(images)"

step "written after a kill: lost"
mkdir "$snaps/w"
sleep 1.2
kill -KILL "$daemon"
{ wait "$daemon" || true; } 2>/dev/null
umount "$mnt" || umount -l "$mnt"
printf '%020d\n' $(($(date +%s) - 60)) >"$fleece/.alive" # it died a minute ago
printf y | dd of="$a" bs=1 seek=5000 conv=notrunc,fsync status=none
mount_dev
frozen_gone w/a
rmdir "$snaps/w"

step "another device under the same name, and under the same number: lost"
mkdir "$snaps/w"
end
losetup -d "$a"
attach c 24
ln -sfn "${loop#/dev/}" "$name-a"
mount_dev
frozen_gone w/a
cmp "$mnt/a" "$tmp/c.img"
rmdir "$snaps/w"
mkdir "$snaps/w"
c=$loop
end
losetup -d "$c"
losetup "$c" "$tmp/c.img"
mount_dev
frozen_gone w/a # the same storage, but who knows what was done to it
cmp "$mnt/a" "$tmp/c.img"

step "grown: frozen views stay; shrunk: they break, and never show what comes after"
mkdir "$snaps/small"
cp "$c" "$tmp/small"
head -c 1M /dev/urandom >>"$tmp/c.img"
losetup -c "$c"
[ "$(stat -c %s "$mnt/a")" = $((25 << 20)) ] || fail "the live file has not grown"
mkdir "$snaps/large"
cp "$c" "$tmp/large"
dd if=/dev/urandom of="$mnt/a" bs=1M count=25 conv=notrunc status=none
frozen_is small/a "$tmp/small"
frozen_is large/a "$tmp/large"
truncate -s 24M "$tmp/c.img"
losetup -c "$c"
sleep 2.2
truncate -s 25M "$tmp/c.img"
losetup -c "$c"
frozen_gone large/a
grep -q 'is gone, or has become smaller' "$tmp/log" || fail "it is not said why"
dd if=/dev/zero of="$mnt/a" bs=1M count=25 conv=notrunc status=none
rmdir "$snaps/small" "$snaps/large" "$snaps/w"

step "without its storage: errors, and the rest goes on"
mkdir "$snaps/w"
truncate -s 0 "$tmp/c.img"
losetup -c "$c"
not . cat "$mnt/a"
not . dd if=/dev/zero of="$mnt/a" bs=4k count=1 conv=notrunc
not . cat "$snaps/w/a"
cmp "$snaps/w/b" "$b"
! mkdir "$snaps/x" 2>/dev/null || fail "frozen without a device"
truncate -s 25M "$tmp/c.img"
losetup -c "$c"
frozen_gone w/a
mkdir "$snaps/x"
cmp "$snaps/x/a" "$c"
rmdir "$snaps/w" "$snaps/x"
end

step "in use by another: not opened, not frozen, until it ends"
mkfs.ext4 -q -F "$b"
mkdir "$tmp/fs"
mount -t ext4 "$b" "$tmp/fs"
mount_dev
not 'busy' cat "$mnt/b"
! mkdir "$snaps/x" 2>/dev/null || fail "a device that another has is frozen"
grep -q "$name-b is in use" "$tmp/log" || fail "it is not said which is in use"
umount "$tmp/fs"
mkdir "$snaps/x"
cmp "$snaps/x/b" "$b"
rmdir "$snaps/x"

step "a filesystem on the live file, busy, frozen, and replayed"
guest=$(losetup --find --show "$mnt/b")
loops+=("$guest")
mount -t ext4 "$guest" "$tmp/fs"
mkdir "$tmp/fs/one" "$tmp/view"
start_writer "$tmp/fs/one" "$tmp/one.log" --seed 3 --biggest 9000
for s in x y; do
	acked=$(grep -c '^ACK ' "$tmp/one.log")
	mkdir "$snaps/$s"
	begun=$(grep -c '^BEGIN ' "$tmp/one.log")
	sleep 0.5
	dd if="$snaps/$s/b" of="$tmp/copy" bs=1M status=none
	status=0
	e2fsck -fy "$tmp/copy" >"$tmp/replay" 2>&1 || status=$?
	[ "$status" -le 1 ] || fail "$s: journal replay: $(cat "$tmp/replay")"
	mount -o loop,ro "$tmp/copy" "$tmp/view"
	python3 "$here/busy.py" check "$tmp/view/one" "$tmp/one.log" --acked "$acked" --begun "$begun"
	umount "$tmp/view"
done
stop "$writer"
umount "$tmp/fs"
losetup -d "$guest"
cmp "$snaps/y/b" <(qemu-img convert -f qcow2 -O raw "$(images y b)" "$tmp/converted" && cat "$tmp/converted")

step "without the option a symlink, and the frozen disk is given up"
end
mount_fg -o "device=$name-a"
[ -L "$mnt/b" ] || fail "b: $(stat "$mnt/b")"
frozen_gone x/b
frozen_gone y/b
rmdir "$snaps/x" "$snaps/y"
end
not 'exclude each other' "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" --device="$name-a" --durable
not "in /dev is expected" "$fleecefs" "$src" "$mnt" --device='vg0/*'
