#!/bin/bash
# SOURCE that is full, that has unreadable sectors, whose storage runs out below it, that fails as a
# whole, with real filesystems, under both policies. The guest is told; the views are right or say that
# they are not; once SOURCE is mended all that was not lost is right.
#
#   source.sh FLEECEFS [KIND…]     full inside sectors thin ext4 xfs
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in mkfs.ext4 debugfs fsfreeze losetup filefrag qemu-img; do
	command -v $tool >/dev/null || skip "needs $tool"
done
kinds=("${@:2}")
[ ${#kinds[@]} -gt 0 ] || kinds=(full inside sectors thin ext4 xfs)
snaps=$mnt/snapshots
mkdir "$tmp/fast" "$tmp/refs"
mount -t tmpfs -o size=900m tmpfs "$tmp/fast"
mount -t tmpfs -o mode=700 tmpfs "$fleece"
disk=$tmp/fast/image

mount_source() {
	mount -o loop "$disk" "$src" 2>"$tmp/err"
}

# A SOURCE of type $1 with disks of random bytes; a.img has a hole at its end.
new_source() {
	local type=$1 last
	shift
	if [ "$type" = xfs ]; then
		truncate -s 400M "$disk"
		mkfs.xfs -q -f "$disk"
	else
		truncate -s 64M "$disk"
		mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0 "$@" "$disk"
		# The journal lies behind all tables. They have their space: what runs out is that of data.
		last=$(debugfs -R 'blocks <8>' "$disk" 2>/dev/null | tr -s ' ' '\n' | sort -n | tail -1)
		fallocate -n -l $(((last + 1) * 4096)) "$disk"
	fi
	mount_source || skip "no loop device: $(cat "$tmp/err")"
	head -c 8M /dev/urandom >"$src/a.img"
	truncate -s 40M "$src/a.img"
	head -c 2000001 /dev/urandom >"$src/b.img"
	sync -f "$src"
}

old_source() {
	umount "$src"
	rm "$disk"
	rm -rf "${fleece:?}"/* "$fleece"/.[!.]*
}

freeze() {
	mkdir "$snaps/$1"
	cp --sparse=always "$src/a.img" "$tmp/fast/$1.a"
	cp "$src/b.img" "$tmp/fast/$1.b"
}

right() {
	cmp "$snaps/$1/a.img" "$tmp/fast/$1.a"
	cmp "$snaps/$1/b.img" "$tmp/fast/$1.b"
}

lost() {
	! timeout 20 cat "$1" >/dev/null 2>"$tmp/err" || fail "$1 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "$1: not EIO: $(cat "$tmp/err")"
}

# Writes $3 random blocks of 4 KiB to $1 from block $2 on; dd's options may follow.
write() {
	local file=$1 at=$2 count=$3
	shift 3
	timeout 60 dd if=/dev/urandom of="$file" bs=4k seek="$at" count="$count" iflag=fullblock conv=notrunc \
		status=none "$@" 2>"$tmp/err"
}

# The guest's write gets error $1.
refused() {
	local error=$1
	shift
	! write "$@" || fail "a write to $1 goes through"
	grep -q "$error" "$tmp/err" || fail "the guest gets: $(cat "$tmp/err")"
}

# Takes all space of SOURCE; a filesystem that allocates late finds some more each time.
fill() {
	for _ in 1 2 3; do
		head -c 1G /dev/zero >>"$mnt/ballast" 2>"$tmp/err" || true
		grep -q 'No space left' "$tmp/err" || fail "the filler gets: $(cat "$tmp/err")"
		sync -f "$src"
	done
}

has_space() {
	[ "$(df --output=avail -k "$src" | tail -1)" -gt 20000 ]
}

# Space of a deleted file comes back when the kernel has let go of it.
unfill() {
	rm "$mnt/ballast"
	wait_for 20 has_space || fail "no space comes back: $(df "$src")"
}

kill_daemon() {
	kill -KILL "$daemon"
	wait "$daemon" 2>/dev/null || true
	umount "$mnt"
}

# What there is stays what it is, in this daemon, in the next, in one after a clean end.
right_for_good() {
	local s
	for s in "$@"; do
		right "$s"
	done
	kill_daemon
	mount_fg --exclude=ballast
	for s in "$@"; do
		right "$s"
	done
	umount_fs
	mount_fg --exclude=ballast
	for s in "$@"; do
		right "$s"
		check_convert "$s" a.img "$tmp/fast/$s.a"
	done
	check_images
}

full() {
	step "SOURCE is full, on-cbw-error=$1"
	new_source ext4
	mount_fg --on-cbw-error="$1" --exclude=ballast
	freeze one
	fill
	refused 'No space left' "$mnt/a.img" 2040 100 conv=notrunc,fsync # its last data, then a hole
	refused 'No space left' "$mnt/a.img" 9000 100 conv=notrunc,fsync
	refused 'No space left' "$mnt/b.img" 600 100 conv=notrunc,fsync
	write "$mnt/b.img" 0 10 || fail "a write that needs no space gets: $(cat "$tmp/err")"
	right one
	freeze two
	refused 'No space left' "$mnt/a.img" 2040 1000 conv=notrunc,fsync
	write "$mnt/a.img" 0 300 || fail "a write that needs no space gets: $(cat "$tmp/err")"
	right one
	right two
	right_for_good one two
	unfill
	write "$mnt/a.img" 2040 1000 conv=notrunc,fsync || fail "with space again the guest gets: $(cat "$tmp/err")"
	right one
	right two
	rmdir "$snaps/one" "$snaps/two"
	umount_fs
	old_source
}

# Fleecing images on the filesystem that is full.
inside() {
	local fleece=$src/.fleecefs
	step "SOURCE is full, and FLEECE_DIR in it, on-cbw-error=$1"
	new_source ext4
	mount_fg --fleece-reserve=0 --on-cbw-error="$1"
	freeze one
	write "$mnt/a.img" 0 10
	fill
	if [ "$1" = break-snapshot ]; then
		write "$mnt/a.img" 100 500 || fail "the guest's write fails: $(cat "$tmp/err")"
		lost "$snaps/one/a.img"
	else
		refused 'No space left' "$mnt/a.img" 100 500
		cmp "$snaps/one/a.img" "$tmp/fast/one.a"
	fi
	cmp "$snaps/one/b.img" "$tmp/fast/one.b"
	kill_daemon
	mount_fg --fleece-reserve=0 --on-cbw-error="$1"
	unfill
	[ "$1" = break-guest-write ] || lost "$snaps/one/a.img"
	[ "$1" = break-snapshot ] || cmp "$snaps/one/a.img" "$tmp/fast/one.a"
	cmp "$snaps/one/b.img" "$tmp/fast/one.b"
	write "$mnt/a.img" 100 500 || fail "with space again the guest gets: $(cat "$tmp/err")"
	freeze two
	write "$mnt/a.img" 0 2000
	right two
	rmdir "$snaps/one"
	right two
	rm -f "$mnt/ballast"
	fill
	kill_daemon
	printf 0 | dd of="$fleece/.session" conv=notrunc status=none # as on another boot
	mount_fg --fleece-reserve=0 --on-cbw-error="$1"
	lost "$snaps/two/a.img"
	rmdir "$snaps/two"
	umount_fs
	umount "$src"
	rm "$disk"
}

# Sectors that cannot be read, and can be written: the image below the loop device ends before them.
sectors() {
	local end
	step "SOURCE has unreadable sectors, on-cbw-error=$1"
	new_source ext4 -O ^has_journal
	rm "$src/b.img"
	head -c 16M /dev/urandom >"$src/c.img" # so that b.img is the last
	head -c 2000001 /dev/urandom >"$src/b.img"
	sync -f "$src"
	end=$(filefrag -v "$src/b.img" | awk '$1 == "0:" { sub(/\.\..*/, "", $4); print $4 }')
	[ "$(filefrag -v "$src/a.img" "$src/c.img" | tr -s ' ' | sed -n 's/^ [0-9]*: .*: *[0-9]*\.\. *\([0-9]*\): .*/\1/p' |
		sort -n | tail -1)" -lt "$end" ] || fail "b.img is not the last file of SOURCE: $(filefrag -v "$src"/*.img)"
	mount_fg --on-cbw-error="$1"
	freeze one
	write "$mnt/b.img" 2 3
	cp "$src/b.img" "$tmp/fast/b.now"
	sync -f "$src"
	cp "$disk" "$tmp/fast/whole"
	truncate -s $(((end + 100) * 4096)) "$disk"
	dd if="$src/b.img" iflag=nocache count=0 status=none
	! cat "$src/b.img" >/dev/null 2>&1 || skip "the loop device reads what is not there"
	! cat "$snaps/one/b.img" >/dev/null 2>&1 || fail "unreadable sectors are read"
	cmp -n 409600 "$snaps/one/b.img" "$tmp/fast/one.b"
	cmp "$snaps/one/a.img" "$tmp/fast/one.a"
	write "$mnt/a.img" 100 1000 || fail "a readable disk: $(cat "$tmp/err")"
	write "$mnt/b.img" 0 80 || fail "the readable part: $(cat "$tmp/err")"
	if [ "$1" = break-snapshot ]; then
		write "$mnt/b.img" 110 20 || fail "the guest gets: $(cat "$tmp/err")"
		lost "$snaps/one/b.img"
	else
		refused 'Input/output error' "$mnt/b.img" 110 20
		cmp -n 409600 "$snaps/one/b.img" "$tmp/fast/one.b"
	fi
	cmp "$snaps/one/a.img" "$tmp/fast/one.a"

	# The sectors can be read again: what they held then comes back.
	dd if="$tmp/fast/whole" of="$disk" bs=4096 seek=$((end + 100)) skip=$((end + 100)) conv=notrunc status=none
	dd if="$src/b.img" iflag=nocache count=0 status=none
	if [ "$1" = break-snapshot ]; then
		lost "$snaps/one/b.img"
		cmp "$snaps/one/a.img" "$tmp/fast/one.a"
	else
		write "$mnt/b.img" 110 20 || fail "the guest gets: $(cat "$tmp/err")"
		cmp -i $((80 * 4096)) -n $((30 * 4096)) "$mnt/b.img" "$tmp/fast/b.now"
		right_for_good one
	fi
	rm "$tmp/fast/whole"
	rmdir "$snaps/one"
	umount_fs
	old_source
}

# A thin volume below SOURCE that has no blocks left: what is written to new places cannot be kept.
thin() {
	local at
	step "the storage below SOURCE runs out, on-cbw-error=$1"
	new_source ext4
	# The filesystem's own blocks have their places, too, also that of the disk's extents: should one of them not be
	# kept, ext4 gives up as a whole, sooner or later.
	for at in 2500 3000 3500 4000 4500 5000; do
		dd if=/dev/urandom of="$src/a.img" bs=4k seek=$at count=1 conv=notrunc status=none
	done
	fsfreeze -f "$src"
	fsfreeze -u "$src"
	mount_fg --on-cbw-error="$1"
	freeze one
	head -c 1G /dev/zero >"$tmp/fast/ballast" 2>/dev/null || true
	refused 'No space left\|Input/output error' "$mnt/a.img" 8000 500 conv=notrunc,fsync
	refused 'No space left\|Input/output error' "$mnt/a.img" 9000 500 oflag=direct
	write "$mnt/a.img" 0 500 oflag=direct || fail "a write that needs no block gets: $(cat "$tmp/err")"
	right one
	rm "$tmp/fast/ballast"
	right one
	dd if="$src/a.img" iflag=nocache count=0 status=none
	right one
	write "$mnt/a.img" 300 9900 conv=notrunc,fsync || fail "with blocks again the guest gets: $(cat "$tmp/err")"
	right_for_good one
	rmdir "$snaps/one"
	umount_fs
	old_source
}

# SOURCE's filesystem fails as a whole, and is mounted anew: what it had not written is gone, and with
# it what views need that share it with the live disk.
fails() {
	local type=$1 state=lost s
	shift
	step "SOURCE, $type, fails: $*"
	new_source "$type"
	mount_fg "$@"
	write "$mnt/b.img" 100 50
	case "$*" in *durable*) state=right ;; esac
	freeze one
	write "$mnt/a.img" 0 100
	freeze two
	write "$mnt/a.img" 50 100 conv=notrunc,fsync
	python3 "$here/storage.py" shutdown "$src"
	refused 'Input/output error' "$mnt/a.img" 20 10
	refused 'Input/output error' "$mnt/a.img" 50 10
	refused 'Input/output error' "$mnt/b.img" 0 10
	! cat "$mnt/a.img" >/dev/null 2>&1 || fail "$type is not shut down"
	for s in one two; do
		! cat "$snaps/$s/b.img" >/dev/null 2>"$tmp/err" || fail "what SOURCE cannot give is read"
	done
	! timeout 60 mkdir "$snaps/three" 2>/dev/null || rmdir "$snaps/three"
	kill_daemon
	umount "$src"
	mount_source || fail "$(cat "$tmp/err")"
	mount_fg "$@"
	for s in one two; do
		if [ $state = lost ]; then
			lost "$snaps/$s/a.img"
			lost "$snaps/$s/b.img"
		else
			right $s
		fi
	done
	! grep 'power failed' "$tmp/log" || fail "it has not"
	freeze four
	write "$mnt/a.img" 0 3000 || fail "mended SOURCE: $(cat "$tmp/err")"
	right four
	rmdir "$snaps"/*
	umount_fs
	old_source
}

for kind in "${kinds[@]}"; do
	case $kind in
	full | inside | sectors | thin)
		"$kind" break-snapshot
		"$kind" break-guest-write
		;;
	xfs | ext4)
		if ! command -v "mkfs.$kind" >/dev/null || ! grep -qw "$kind" /proc/filesystems; then
			echo "left out: $kind"
			continue
		fi
		fails "$kind"
		fails "$kind" --durable --on-cbw-error=break-guest-write
		;;
	esac
done
