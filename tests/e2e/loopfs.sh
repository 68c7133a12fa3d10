#!/bin/bash
# ext4 in a loop device on a live file, with two writers at work all the time: each of several
# snapshots, copied with tar while they go on, is the filesystem of one moment.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

snaps=$mnt/snapshots
truncate -s 192M "$src/guest.img"
mkfs.ext4 -q -F "$src/guest.img"

step "mount, attach, write"
mount_fs
loop=$(losetup --find --show "$mnt/guest.img" 2>"$tmp/err") || skip "no loop device: $(cat "$tmp/err")"
loops+=("$loop")
mkdir "$tmp/guest" "$tmp/view"
mount -t ext4 "$loop" "$tmp/guest"
mkdir "$tmp/guest/one" "$tmp/guest/two" "$tmp/guest/static"
for i in $(seq 50); do
	head -c 200001 /dev/urandom >"$tmp/guest/static/$i"
done
sync -f "$tmp/guest"
(cd "$tmp/guest/static" && sha256sum -- *) >"$tmp/sums"
start_writer "$tmp/guest/one" "$tmp/one.log" --seed 1
one=$writer
start_writer "$tmp/guest/two" "$tmp/two.log" --seed 2 --biggest 20000
two=$writer

# Operations of both writers that were acknowledged (ACK) or begun (BEGIN) by now.
count() {
	grep -c "^$1 " "$tmp/one.log"
	grep -c "^$1 " "$tmp/two.log"
}

step "four snapshots, one after the other, all copied at the end"
for s in s1 s2 s3 s4; do
	count ACK >"$tmp/$s.before"
	mkdir "$snaps/$s"
	count BEGIN >"$tmp/$s.after"
	sleep 1
done
for s in s2 s4 s1 s3; do
	mkdir "$tmp/$s"
	tar -C "$snaps/$s" -cSf - guest.img 2>"$tmp/tar.err" | tar -C "$tmp/$s" -xSf -
	[ ! -s "$tmp/tar.err" ] || fail "tar says: $(cat "$tmp/tar.err")"
done
for writer in "$one" "$two"; do
	kill -0 "$writer" || fail "a writer ended early"
done

step "each copy is the filesystem of its moment"
check_copy() {
	local s=$1 name line image status=0 acked begun
	image=$tmp/$s/guest.img
	cmp "$image" "$snaps/$s/guest.img" || fail "$s: copy and frozen file differ"
	e2fsck -fy "$image" >"$tmp/replay" 2>&1 || status=$?
	[ "$status" -le 1 ] || fail "$s: journal replay: $(cat "$tmp/replay")"
	e2fsck -fn "$image" >"$tmp/fsck" 2>&1 || fail "$s: not clean: $(cat "$tmp/fsck")"
	mount -o loop,ro "$image" "$tmp/view"
	(cd "$tmp/view/static" && sha256sum --quiet -c "$tmp/sums")
	for name in one two; do
		[ $name = one ] && line=1p || line=2p
		acked=$(sed -n $line "$tmp/$s.before")
		begun=$(sed -n $line "$tmp/$s.after")
		python3 "$here/busy.py" check "$tmp/view/$name" "$tmp/$name.log" \
			--acked "$acked" --begun "$begun"
	done
	umount "$tmp/view"
}
for s in s3 s1; do
	check_copy $s
done

step "drop two, the others stay right, writers go on"
rmdir "$snaps/s3" "$snaps/s1"
for s in s2 s4; do
	check_copy $s
done
stop "$one"
stop "$two"
rmdir "$snaps/s4" "$snaps/s2"
[ -z "$(images)" ] || fail "images are left: $(images)"

step "end"
umount "$tmp/guest"
losetup -d "$loop"
umount_fs
e2fsck -fn "$src/guest.img" >"$tmp/fsck" 2>&1 || fail "the live disk is damaged: $(cat "$tmp/fsck")"
