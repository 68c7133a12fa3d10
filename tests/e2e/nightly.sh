#!/bin/bash
# Snapshots over time: the same name every night, many side by side dropped in any order, daemons
# that are killed, sources that change behind the mount's back.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-img >/dev/null || skip "needs qemu-img"
snaps=$mnt/snapshots

step "an unchanged disk looks unchanged in each night's snapshot"
mkdir "$src/sub"
head -c 3000001 /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/sub/b.img"
ln -s a.img "$src/link"
printf 'old' >"$src/gone"
mount_fs
mkdir "$snaps/nightly"
looks() {
	(cd "$snaps/nightly" && stat -c '%n %i %s %f %u:%g %y %z %b' a.img sub/b.img link)
}
looks >"$tmp/night1"
cat "$snaps/nightly/a.img" "$snaps/nightly/sub/b.img" "$snaps/nightly/gone" >/dev/null
for disk in a.img sub/b.img; do
	[ "$(stat -c %i "$snaps/nightly/$disk")" != "$(stat -c %i "$mnt/$disk")" ] ||
		fail "live and frozen $disk share an inode number"
done
[ ! -e "$snaps/nightly/fresh" ] || fail "a file from nowhere"
rmdir "$snaps/nightly"
mkdir "$snaps/nightly"
looks | diff "$tmp/night1" - || fail "an unchanged disk looks changed"

step "nothing of the dropped snapshot shows in the new one"
ino=$(stat -c %i "$snaps/nightly/a.img")
for night in 1 2 3 4 5; do
	exec 9<"$snaps/nightly/a.img"
	cat <&9 >/dev/null
	exec 9<&-
	head -c 2500000 /dev/urandom >"$tmp/new"
	dd if="$tmp/new" of="$mnt/a.img" bs=64k conv=notrunc status=none
	truncate -s $((2600000 + night)) "$mnt/a.img"
	ln -sfn "target$night" "$mnt/link"
	mv "$mnt/gone" "$mnt/fresh"
	cp "$mnt/a.img" "$tmp/expected"
	rmdir "$snaps/nightly"
	mkdir "$snaps/nightly"
	cmp "$snaps/nightly/a.img" "$tmp/expected" || fail "stale content"
	[ "$(stat -c %i "$snaps/nightly/a.img")" = "$ino" ] || fail "the inode number changed"
	[ "$(readlink "$snaps/nightly/link")" = "target$night" ] || fail "stale symlink"
	[ -e "$snaps/nightly/fresh" ] || fail "stale absence"
	[ ! -e "$snaps/nightly/gone" ] || fail "stale name"
	mv "$mnt/fresh" "$mnt/gone"
	rmdir "$snaps/nightly"
	mkdir "$snaps/nightly"
done
rmdir "$snaps/nightly"
umount_fs

step "five snapshots, dropped in any order"
for order in "1 2 3 4 5" "5 4 3 2 1" "3 1 5 2 4" "2 4 1 5 3"; do
	mount_fs
	for i in 1 2 3 4 5; do
		cp "$mnt/a.img" "$tmp/ref$i"
		mkdir "$snaps/s$i"
		start_scribbler --seed "$i" "$mnt/a.img"
		wait_for 30 sh -c "[ \$(cat '$tmp/scribbled') -gt 40 ]"
		stop "$scribbler"
	done
	left=" 1 2 3 4 5 "
	for i in $order; do
		rmdir "$snaps/s$i"
		left=${left/" $i "/" "}
		[ ! -e "$snaps/s$i" ] || fail "s$i is still to be seen"
		start_scribbler --seed "9$i" "$mnt/a.img"
		stop "$scribbler"
		for j in $left; do
			cmp "$snaps/s$j/a.img" "$tmp/ref$j" || fail "s$j is wrong after dropping s$i"
			check_convert "s$j" a.img "$tmp/ref$j"
		done
		check_images >/dev/null
		# An image without an older snapshot that needs it is gone at once.
		read -r oldest _ <<<"$left" || oldest=6
		for j in 1 2 3 4 5; do
			[ "$j" -ge "${oldest:-6}" ] || ! images | grep -qF "/s$j/" ||
				fail "images of s$j are left: $(images)"
		done
	done
	[ -z "$(images)" ] || fail "images are left: $(images)"
	umount_fs
	echo "order $order: good"
done

step "rename of a snapshot"
mount_fs
cp "$mnt/a.img" "$tmp/ref"
mkdir "$snaps/before"
mv "$snaps/before" "$snaps/after"
printf 'changed' | dd of="$mnt/a.img" bs=1 seek=5000 conv=notrunc status=none
[ ! -e "$snaps/before" ] || fail "the old name is still there"
cmp "$snaps/after/a.img" "$tmp/ref"
check_convert after a.img "$tmp/ref"
umount_fs
mount_fs
cmp "$snaps/after/a.img" "$tmp/ref"
rmdir "$snaps/after"
umount_fs

step "a killed daemon loses nothing"
for round in 1 2 3 4; do
	mount_fg
	cp "$mnt/a.img" "$tmp/ref.first"
	mkdir "$snaps/first"
	start_scribbler --until-error --seed "$round" --pause 0 "$mnt/a.img" "$mnt/sub/b.img"
	wait_for 30 sh -c "[ \$(cat '$tmp/scribbled') -gt 100 ]"
	mkdir "$snaps/second"
	sleep "0.$round"
	kill -KILL "$daemon"
	wait "$daemon" || true
	wait "$scribbler" || fail "the writer failed otherwise than by the kill"
	umount "$mnt"
	check_images leaks
	mount_fs
	cmp "$snaps/first/a.img" "$tmp/ref.first" || fail "first lost data in the kill"
	cat "$snaps/second/a.img" "$snaps/second/sub/b.img" >"$tmp/ref.second"
	check_images leaks
	start_scribbler --seed 77 "$mnt/a.img" "$mnt/sub/b.img"
	stop "$scribbler"
	cmp "$snaps/first/a.img" "$tmp/ref.first" || fail "first is wrong after the kill"
	cat "$snaps/second/a.img" "$snaps/second/sub/b.img" | cmp - "$tmp/ref.second" ||
		fail "second is wrong after the kill"
	check_convert first a.img "$tmp/ref.first"
	rmdir "$snaps/first" "$snaps/second"
	[ -z "$(images)" ] || fail "images are left: $(images)"
	umount_fs
done

step "a source changed behind the mount's back"
mount_fs
cp "$mnt/sub/b.img" "$tmp/ref"
mkdir "$snaps/night"
umount_fs
printf 'unseen' | dd of="$src/a.img" bs=1 seek=70000 conv=notrunc status=none
mount_fs
[ -d "$snaps/night" ] || fail "the snapshot is not listed"
! cat "$snaps/night/a.img" >"$tmp/out" 2>"$tmp/err" || fail "a changed disk is read as if frozen"
grep -q 'Input/output error' "$tmp/err" || fail "not EIO: $(cat "$tmp/err")"
cmp "$snaps/night/sub/b.img" "$tmp/ref" || fail "the other disk is broken as well"
cmp "$mnt/a.img" "$src/a.img" || fail "the live disk is not readable"
mkdir "$snaps/next"
cmp "$snaps/next/a.img" "$src/a.img" || fail "a new snapshot of that disk"
rmdir "$snaps/night" "$snaps/next"
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs
