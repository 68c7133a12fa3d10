#!/bin/bash
# Things that have no business in FLEECE_DIR and in SOURCE: symlinks, FIFOs, device nodes, directories
# and files in the place of ours. Nothing hangs, nothing behind them is touched, what is sound mounts.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

# Many mounts end here, each with a sync: in memory that takes no time.
mkdir "$tmp/fast"
mount -t tmpfs -o mode=755 tmpfs "$tmp/fast"
src=$tmp/fast/source
mnt=$tmp/fast/mnt
fleece=$tmp/fast/fleece
mkdir "$src" "$mnt" "$fleece"
snaps=$mnt/snapshots
canary=$tmp/fast/canary
mkdir -p "$canary/sub" "$src/sub"
echo CANARY >"$canary/file"
echo CANARY >"$canary/sub/file"
for disk in a b sub/c; do
	head -c 300001 /dev/urandom >"$src/$disk.img"
done
loopdev=7:250 # a block device whose opening would be seen: nothing is attached to it
canary_state() {
	find "$canary" -printf '%P %y %m %U:%G %s %T@\n' | sort
	cat "$canary/file" "$canary/sub/file"
}
canary_state >"$tmp/before"
untouched() {
	canary_state | cmp - "$tmp/before" || fail "what a planted name leads to was changed"
}

# Mounts with the log in $tmp/log; must be quick, whatever lies about.
mount_logged() {
	: >"$tmp/log"
	timeout 30 "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" "$@" </dev/null >"$tmp/log" 2>&1 ||
		fail "status $?: $(cat "$tmp/log")"
	mountpoint -q "$mnt" || fail "no mount"
}

lost() {
	! timeout 20 cat "$1" >/dev/null 2>"$tmp/err" || fail "$1 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "$1: not EIO: $(cat "$tmp/err")"
}

# Puts a thing of kind $1 in the place of $2.
plant() {
	rm -rf "$2"
	case $1 in
	link) ln -s "$canary/file" "$2" ;;
	dirlink) ln -s "$canary" "$2" ;;
	dangling) ln -s "$canary/new" "$2" ;;
	fifo) mkfifo "$2" ;;
	device) mknod "$2" b "${loopdev%:*}" "${loopdev#*:}" ;;
	socket) python3 -c 'import os, socket, sys
os.chdir(os.path.dirname(sys.argv[1])); socket.socket(socket.AF_UNIX).bind(os.path.basename(sys.argv[1]))' "$2" ;;
	dir) mkdir "$2" && : >"$2/inside" ;;
	empty) : >"$2" ;;
	hard) ln "$canary/file" "$2" ;;
	esac
}

step "in the place of images, checksums and manifests"
for kind in link dirlink dangling fifo device socket dir empty; do
	for part in a.img manifest xxh3; do
		mount_fs
		cp "$src/a.img" "$tmp/a.ref"
		mkdir "$snaps/old" "$snaps/sound"
		dd if=/dev/urandom of="$mnt/a.img" bs=4096 count=9 conv=notrunc status=none
		mv "$snaps/old" "$snaps/damaged"
		umount_fs
		case $part in
		a.img) victim=$(images damaged a.img) ;;
		manifest) victim=$fleece/damaged/manifest ;;
		xxh3) victim=$(images sound a.img) victim=${victim%.qcow2}.xxh3 ;;
		esac
		[ -f "$victim" ] || fail "there is no $victim"
		plant $kind "$victim"
		mount_logged
		case $part in
		a.img) lost "$snaps/damaged/a.img" ;;
		manifest) lost "$snaps/damaged/b.img" ;;
		xxh3) lost "$snaps/sound/a.img" ;;
		esac
		[ $part = xxh3 ] || cmp "$snaps/sound/a.img" "$tmp/a.ref"
		cmp "$snaps/sound/sub/c.img" "$src/sub/c.img"
		[ $part = xxh3 ] || grep -q "$(basename "$victim")" "$tmp/log" || fail "$victim is not named: $(cat "$tmp/log")"
		timeout 20 dd if=/dev/urandom of="$mnt/a.img" bs=4096 count=20 conv=notrunc status=none
		timeout 20 rmdir "$snaps/damaged" "$snaps/sound"
		umount_fs
		[ "$(find "$fleece" -mindepth 1 ! -name '.lock' ! -name .source ! -name .session ! -name .clean ! -name .known | wc -l)" = 0 ] ||
			fail "left after rmdir: $(find "$fleece")"
		untouched
	done
done

step "in the place of .lock, .session, .clean, .known, .source and their temporary files"
for kind in link dirlink dangling fifo device dir hard; do
	# one temporary file is made as the other
	for name in .lock .session .session.tmp .clean .known .source; do
		plant $kind "$fleece/$name"
		status=0
		timeout 20 "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" </dev/null >"$tmp/log" 2>&1 || status=$?
		[ $status -lt 124 ] || fail "$kind for $name: status $status"
		if [ $status = 0 ]; then
			timeout 20 mkdir "$snaps/s"
			cmp "$snaps/s/a.img" "$src/a.img"
			timeout 20 rmdir "$snaps/s"
			umount_fs
		else
			grep -q "${name%.tmp}" "$tmp/log" || fail "$kind for $name is not named: $(cat "$tmp/log")"
		fi
		rm -rf "${fleece:?}/$name"
		if [ $kind = hard ] && [ "$name" = .lock ]; then # which is ours to empty, whatever else names it
			echo CANARY >"$canary/file"
			canary_state >"$tmp/before"
		fi
		untouched
	done
done

step "in the place of .alive, while it lives and after it was killed"
truncate -s 1M "$tmp/fast/disk"
cp "$tmp/fast/disk" "$tmp/fast/disk.ref"
loop=$(losetup --find --show "$tmp/fast/disk" 2>/dev/null) && loops+=("$loop") || loop=
for kind in link hard fifo device; do
	plant $kind "$fleece/.alive"
	if [ $kind = device ] && [ -n "$loop" ]; then
		rm "$fleece/.alive"
		mknod "$fleece/.alive" b 7 "${loop#/dev/loop}"
	fi
	: >"$tmp/log"
	mount_fg
	mkdir "$snaps/s"
	wait_for 20 test -f "$fleece/.alive" -a ! -L "$fleece/.alive" -a -s "$fleece/.alive" || fail "no pulse with a $kind in its place"
	untouched
	cmp "$tmp/fast/disk" "$tmp/fast/disk.ref" || fail "a device was written"
	kill -KILL "$daemon"
	{ wait "$daemon" || true; } 2>/dev/null
	umount "$mnt" || umount -l "$mnt"
	[ $kind != hard ] || kind=fifo # a short file is one that the power failed for
	plant $kind "$fleece/.alive"
	mount_logged
	grep -q '\.alive is damaged' "$tmp/log" || fail "$kind is not named: $(cat "$tmp/log")"
	lost "$snaps/s/a.img"
	untouched
	rmdir "$snaps/s"
	umount_fs
	rm -rf "$fleece/.alive"
done

step "in the place of a snapshot: mkdir says what is in the way"
mount_fg
for kind in link dirlink dangling fifo device dir empty; do
	plant $kind "$fleece/taken"
	! timeout 20 mkdir "$snaps/taken" 2>/dev/null || fail "mkdir over a $kind"
	grep -q "$fleece/taken.*move it away" "$tmp/log" || fail "not said: $(cat "$tmp/log")"
	rm -rf "$fleece/taken"
	: >"$tmp/log"
done
timeout 20 mkdir "$snaps/taken"
timeout 20 rmdir "$snaps/taken"
umount "$mnt"
wait "$daemon"

step "what others keep in FLEECE_DIR is left alone"
mkdir -p "$fleece/theirs/deep" "$fleece/empty"
echo precious >"$fleece/theirs/deep/vm.qcow2"
echo precious >"$fleece/file"
mount_logged
[ ! -s "$tmp/log" ] || fail "something is said: $(cat "$tmp/log")"
mkdir "$snaps/s"
rmdir "$snaps/s"
! mkdir "$snaps/theirs" 2>/dev/null || fail "mkdir in a directory that is not ours"
umount_fs
[ -d "$fleece/empty" ] || fail "an empty directory is gone"
mkdir "$fleece/mounted"
mount -t tmpfs tmpfs "$fleece/mounted"
mount_fs
! mkdir "$snaps/mounted" 2>"$tmp/err" || fail "a snapshot in the place of a mount point"
grep -q 'resource busy' "$tmp/err" || fail "no reason: $(cat "$tmp/err")"
mkdir "$snaps/empty"
[ -f "$fleece/empty/manifest" ] || fail "no snapshot in the place of an empty directory"
rmdir "$snaps/empty"
umount_fs
umount "$fleece/mounted"
grep -q precious "$fleece/theirs/deep/vm.qcow2" "$fleece/file" || fail "it is gone"
rm -r "$fleece/theirs" "$fleece/file"
mkdir "$tmp/apart"
! timeout 20 "$fleecefs" "$src" "$tmp/apart" --fleece-dir="$tmp/fast" </dev/null 2>"$tmp/err" || fail "FLEECE_DIR above SOURCE"
grep -q 'holds SOURCE' "$tmp/err" || fail "no reason: $(cat "$tmp/err")"

step "in SOURCE: nothing but regular files is opened"
mkfifo "$src/fifo"
mknod "$src/device" b "${loopdev%:*}" "${loopdev#*:}"
mknod "$src/sub/null" c 1 3
ln -s "$canary/file" "$src/out"
ln -s "$canary" "$src/sub/dir-out"
ln -s "$src/fifo" "$src/to-fifo"
mount_fs
timeout 20 mkdir "$snaps/s"
for top in "$mnt" "$snaps/s"; do
	[ "$(stat -c %F "$top/fifo" "$top/device" "$top/sub/null" "$top/out" | sort -u | wc -l)" = 4 ] || fail "types differ"
	[ "$(readlink "$top/out")" = "$canary/file" ] || fail "a symlink reads otherwise"
	! timeout 20 dd if="$top/device" count=1 of="$tmp/out" status=none 2>"$tmp/err" || fail "a device is opened"
	! timeout 20 dd if="$top/sub/null" count=1 of="$tmp/out" status=none 2>>"$tmp/err" || fail "a device is opened"
	[ "$(grep -c 'Permission denied' "$tmp/err")" = 2 ] || fail "not nodev: $(cat "$tmp/err")"
	timeout 20 tar -C "$top" --exclude=./snapshots -cf - . | tar -tf - >/dev/null
done
findmnt -no OPTIONS "$mnt" | grep -q nosuid || fail "no nosuid: $(findmnt -no OPTIONS "$mnt")"
timeout 20 rmdir "$snaps/s"
umount_fs
untouched

step ".fleecefs in SOURCE that is not ours is not used"
fleece=$tmp/fast/fleece2
mkdir -m 700 "$fleece"
for kind in dirlink theirs writable; do
	case $kind in
	dirlink) plant $kind "$src/.fleecefs" ;;
	theirs) mkdir "$src/.fleecefs" && chown 65534 "$src/.fleecefs" ;;
	writable) mkdir "$src/.fleecefs" && chmod 777 "$src/.fleecefs" ;;
	esac
	mount_logged -o allow_other
	mkdir "$snaps/s"
	timeout 20 rm "$mnt/a.img" # its snapshot breaks, for it cannot be kept aside
	lost "$snaps/s/a.img"
	cmp "$snaps/s/b.img" "$src/b.img"
	cp "$tmp/a.ref" "$mnt/a.img"
	rmdir "$snaps/s"
	umount_fs
	untouched
	[ -z "$(find "$src/.fleecefs/" -mindepth 1 ! -path '*/sub*' ! -name file)" ] || fail "$kind was used: $(find "$src/.fleecefs/")"
	rm -rf "$src/.fleecefs"
done
