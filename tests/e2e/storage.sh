#!/bin/bash
# Fleece storage that fills up or fails, with real filesystems, under both policies. What gives way is
# what on-cbw-error says; a view that broke never looks empty, is never read as anything, and says so to
# every backup program; all else stays right, also after the daemon was killed.
#
#   storage.sh FLEECEFS [KIND…]     full quota readonly shutdown removed renamed
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in mkfs.ext4 losetup rsync tar; do
	command -v $tool >/dev/null || skip "needs $tool"
done
kinds=("${@:2}")
[ ${#kinds[@]} -gt 0 ] || kinds=(full quota readonly shutdown removed renamed)
storage=$tmp/storage
snaps=$mnt/snapshots
fleece=$storage/fleece
mkdir "$storage" "$tmp/fast" "$tmp/backup"
mount -t tmpfs -o size=512m tmpfs "$tmp/fast"
mount -t tmpfs tmpfs "$src"

# A filesystem for the fleecing images.
new_storage() {
	fleece=$storage/fleece
	if [ "$1" = quota ]; then # of btrfs, for it holds for root as well
		truncate -s 200M "$tmp/fast/image"
		mkfs.btrfs -q -f "$tmp/fast/image" >/dev/null
		mount -o loop "$tmp/fast/image" "$storage" 2>"$tmp/err" && btrfs quota enable "$storage" 2>"$tmp/err" ||
			return 1
		btrfs -q subvolume create "$storage/limited"
		fleece=$storage/limited/fleece
	else
		truncate -s 64M "$tmp/fast/image"
		mkfs.ext4 -q -F -E lazy_itable_init=0 "$tmp/fast/image"
		mount_storage 2>"$tmp/err" || skip "no loop device: $(cat "$tmp/err")"
	fi
}

mount_storage() {
	mount -o loop,errors=remount-ro "$tmp/fast/image" "$storage" || return 1
	loop=$(findmnt -no SOURCE "$storage")
}

old_storage() {
	umount "$storage"
	rm "$tmp/fast/image"
}

# By way of the filesystem's top, for a subvolume that is full takes no changes, not even this.
set_quota() {
	btrfs -q qgroup limit "$1" "0/$(btrfs inspect-internal rootid "$storage/limited")" "$storage"
}

# Brings $1 about.
break_storage() {
	sync -f "$storage"
	case $1 in
	full) head -c 1G /dev/zero >"$storage/ballast" 2>/dev/null || true ;;
	quota) set_quota 100K ;;
	readonly) echo provoked >"/sys/fs/ext4/${loop#/dev/}/trigger_fs_error" ;;
	shutdown) python3 "$here/storage.py" shutdown "$storage" ;;
	removed) rm -rf "$fleece" ;;
	renamed) mv "$fleece" "$storage/elsewhere" ;;
	esac
}

mend_storage() {
	case $1 in
	full) rm "$storage/ballast" ;;
	quota) set_quota none ;;
	readonly | shutdown)
		umount "$storage"
		losetup --find --show "$tmp/fast/image" >"$tmp/loop"
		e2fsck -fy "$(cat "$tmp/loop")" >"$tmp/fsck" 2>&1 || [ $? = 1 ] || fail "$(cat "$tmp/fsck")"
		losetup -d "$(cat "$tmp/loop")"
		mount_storage
		;;
	renamed) mv "$storage/elsewhere" "$fleece" ;;
	esac
}

kill_daemon() {
	kill -KILL "$daemon"
	wait "$daemon" 2>/dev/null || true
	umount "$mnt"
}

# Overwrites $1 with new bytes as a guest would, also in $tmp/live.
overwrite() {
	head -c "$(stat -c %s "$src/$1")" /dev/urandom >"$tmp/live"
	timeout 60 dd if="$tmp/live" of="$mnt/$1" bs=64k conv=notrunc status=none 2>"$tmp/err"
}

# $1/$2, of size $3, is lost for good, and every program says so.
check_lost() {
	[ "$(stat -c %s "$1/$2")" = "$3" ] || fail "the size of $1/$2 changed"
	! cat "$1/$2" >/dev/null 2>"$tmp/err" || fail "$1/$2 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "not EIO: $(cat "$tmp/err")"
	! cp "$1/$2" "$tmp/out" 2>/dev/null || fail "cp says nothing"
	! tar -C "$1" -cSf - "$2" >"$tmp/out" 2>/dev/null || fail "tar says nothing"
	echo earlier >"$tmp/backup/$2"
	! rsync -a --delete "$1/" "$tmp/backup/" 2>"$tmp/err" || fail "rsync says nothing"
	[ "$(cat "$tmp/backup/$2")" = earlier ] || fail "rsync has destroyed the earlier backup"
}

speed() {
	python3 "$here/storage.py" speed "$mnt/a.img"
}

break_snapshot() {
	local kind=$1 before after
	step "$kind, break-snapshot: the guest goes on"
	new_storage "$kind"
	head -c 3000001 /dev/urandom >"$src/a.img"
	head -c 1M /dev/urandom >"$src/b.img"
	mount_fg --fleece-reserve=0
	before=$(speed)
	cp "$src/a.img" "$tmp/a.old"
	mkdir "$snaps/old"
	dd if=/dev/urandom of="$mnt/a.img" bs=64k count=2 conv=notrunc status=none
	mkdir "$snaps/s"
	cp "$src/a.img" "$tmp/a.ref"
	cp "$src/b.img" "$tmp/b.ref"
	dd if=/dev/urandom of="$mnt/b.img" bs=4k count=1 conv=notrunc status=none
	break_storage "$kind"
	overwrite a.img || fail "the guest's write fails: $(cat "$tmp/err")"
	cmp "$src/a.img" "$tmp/live"
	cmp "$mnt/a.img" "$tmp/live"
	if [ "$kind" = renamed ]; then # which nobody notices who has it open
		cmp "$snaps/old/a.img" "$tmp/a.old"
		cmp "$snaps/s/a.img" "$tmp/a.ref"
	else
		check_lost "$snaps/s" a.img 3000001
		check_lost "$snaps/old" a.img 3000001
		# what is slow stays slow; another's load for a second does not
		for _ in 1 2 3; do
			after=$(speed)
			echo "$before ms without a snapshot, $after ms after the break"
			[ "$after" -gt $((before * 3 + 500)) ] || break
		done
		[ "$after" -le $((before * 3 + 500)) ] || fail "the guest is slow after the break"
	fi
	[ "$kind" = shutdown ] || [ "$kind" = removed ] || cmp "$snaps/s/b.img" "$tmp/b.ref"

	kill_daemon
	mend_storage "$kind"
	mount_fg --fleece-reserve=0
	if [ "$kind" = removed ]; then
		[ -z "$(ls "$snaps")" ] || fail "snapshots without images: $(ls "$snaps")"
	elif [ "$kind" = renamed ]; then
		cmp "$snaps/s/a.img" "$tmp/a.ref"
	else
		check_lost "$snaps/s" a.img 3000001
		check_lost "$snaps/old" a.img 3000001
		case $kind in # a filesystem that failed may have lost what was not flushed
		readonly | shutdown) check_lost "$snaps/s" b.img 1048576 ;;
		*) cmp "$snaps/s/b.img" "$tmp/b.ref" ;;
		esac
	fi
	cp "$src/a.img" "$tmp/a.ref"
	mkdir "$snaps/new"
	overwrite a.img || fail "a write after that fails: $(cat "$tmp/err")"
	cmp "$snaps/new/a.img" "$tmp/a.ref"
	rmdir "$snaps"/*
	[ -z "$(images)" ] || fail "images are left: $(images)"
	umount_fs
	# What noted a loss for a FLEECE_DIR that is gone nobody can place any more: it stays, empty.
	[ "$kind" = removed ] || [ -z "$(find "$src/.fleecefs" -type f 2>/dev/null)" ] ||
		fail "left in SOURCE: $(find "$src/.fleecefs")"
	rm -rf "$src/.fleecefs"
	old_storage
}

break_guest_write() {
	local kind=$1 options=(--fleece-reserve=0 --on-cbw-error=break-guest-write)
	step "$kind, break-guest-write: the write fails, the views stay right"
	case $kind in readonly | shutdown) options+=(--durable) ;; esac
	new_storage "$kind"
	head -c 3000001 /dev/urandom >"$src/a.img"
	mount_fg "${options[@]}"
	mkdir "$snaps/s"
	cp "$src/a.img" "$tmp/a.ref"
	break_storage "$kind"
	! overwrite a.img || fail "the write goes through, and its old data could not be saved"
	grep -qE 'No space left|Input/output error' "$tmp/err" || fail "the guest gets $(cat "$tmp/err")"
	[ "$kind" = shutdown ] || [ "$kind" = removed ] || cmp "$snaps/s/a.img" "$tmp/a.ref"
	kill_daemon
	mend_storage "$kind"
	mount_fg "${options[@]}"
	if [ "$kind" != removed ]; then
		cmp "$snaps/s/a.img" "$tmp/a.ref"
		rmdir "$snaps/s"
	fi
	overwrite a.img || fail "the write fails on mended storage: $(cat "$tmp/err")"
	umount_fs
	old_storage
}

for kind in "${kinds[@]}"; do
	if [ "$kind" = quota ] && ! command -v mkfs.btrfs >/dev/null; then
		echo "left out: quotas, for want of btrfs"
		continue
	fi
	break_snapshot "$kind"
	[ "$kind" = renamed ] || break_guest_write "$kind"
done
